"""Prove that resume is exact, as a flow in Prefect: `python flows/prove_resume.py --kills 5`."""

import sys

from zeroflow.cli.first_line import announce

if __name__ == "__main__":
    announce(sys.argv[1:])

from zeroflow.cli.flow import main
from zeroflow.orchestration.names import PROVE_RESUME

if __name__ == "__main__":
    main(PROVE_RESUME)
