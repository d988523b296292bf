"""Prove that resume is exact, as a flow in Prefect: `python flows/prove_resume.py --kills 5`."""

import sys

from zeroflow.cli.early import begin

if __name__ == "__main__":
    begin("prove-resume", sys.argv[1:])

from zeroflow.cli.flow import main
from zeroflow.orchestration.names import PROVE_RESUME

if __name__ == "__main__":
    main(PROVE_RESUME)
