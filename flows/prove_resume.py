"""Prove that resume is exact, seen in Prefect: `python flows/prove_resume.py --kills 5`."""

from zeroflow.cli.flow import main
from zeroflow.orchestration.flows import prove_resume

if __name__ == "__main__":
    main(prove_resume)
