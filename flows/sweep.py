"""Compare sizes, seeds, rates or ZeRO stages: `python flows/sweep.py --sizes tiny small`."""

from zeroflow.cli.flow import main
from zeroflow.orchestration.names import SWEEP

if __name__ == "__main__":
    main(SWEEP)
else:
    # Deployments of earlier versions name the flow of this file
    from zeroflow.orchestration.flows import sweep  # noqa: F401
