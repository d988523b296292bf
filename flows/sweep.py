"""Compare sizes, seeds, rates or ZeRO stages: `python flows/sweep.py --sizes tiny small`."""

import sys

from zeroflow.cli.first_line import begin
from zeroflow.orchestration.names import SWEEP

if __name__ == "__main__":
    begin(SWEEP, sys.argv)

from zeroflow.cli.flow import main

if __name__ == "__main__":
    main(SWEEP)
else:
    # Deployments of earlier versions refer to the flow in this file
    from zeroflow.orchestration.flows import sweep  # noqa: F401
