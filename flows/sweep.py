"""Compare sizes, seeds, rates or ZeRO stages: `python flows/sweep.py --sizes tiny small`."""

from zeroflow.cli.flow import main
from zeroflow.orchestration.flows import sweep

if __name__ == "__main__":
    main(sweep)
