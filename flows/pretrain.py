"""Raw text to a trained and checked model: `python flows/pretrain.py --size tiny`."""

import sys

from zeroflow.cli.first_line import begin
from zeroflow.orchestration.names import PRETRAIN

if __name__ == "__main__":
    begin(PRETRAIN, sys.argv)

from zeroflow.cli.flow import main

if __name__ == "__main__":
    main(PRETRAIN)
else:
    # Deployments of earlier versions refer to the flow in this file
    from zeroflow.orchestration.flows import pretrain  # noqa: F401
