"""Measure the stages of ZeRO: `python flows/zero_lab.py --help`."""

import sys

from zeroflow.cli.early import begin

if __name__ == "__main__":
    begin("zero-lab", sys.argv[1:])

from zeroflow.cli.flow import main
from zeroflow.orchestration.names import ZERO_LAB

if __name__ == "__main__":
    main(ZERO_LAB)
