"""Raw text to a trained and checked model: `python flows/pretrain.py --size tiny`."""

from zeroflow.cli.flow import main
from zeroflow.orchestration.flows import pretrain

if __name__ == "__main__":
    main(pretrain)
