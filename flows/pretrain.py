"""Raw text to a trained and checked model: `python flows/pretrain.py --size tiny`."""

import sys

from zeroflow.cli.early import begin

if __name__ == "__main__":
    begin("pretrain", sys.argv[1:])

from zeroflow.cli.flow import main
from zeroflow.orchestration.names import PRETRAIN

if __name__ == "__main__":
    main(PRETRAIN)
else:
    # Deployments of earlier versions refer to the flow in this file
    from zeroflow.orchestration.flows import pretrain  # noqa: F401
