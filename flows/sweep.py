"""Compare sizes, seeds, rates or ZeRO stages: `python flows/sweep.py --sizes tiny small`."""

import sys

from zeroflow.cli.early import begin

if __name__ == "__main__":
    begin("sweep", sys.argv[1:])

from zeroflow.cli.flow import main
from zeroflow.orchestration.names import SWEEP

if __name__ == "__main__":
    main(SWEEP)
else:
    # Deployments of earlier versions refer to the flow in this file
    from zeroflow.orchestration.flows import sweep  # noqa: F401
