"""Show the outcome of a read from the Hugging Face Hub for each kind of failure, and its time.

    python benchmarks/hub_faults.py [--patience reading]

The hub is a test server on loopback with the faults of `tests/helpers/faults.py`. With `reading`,
the patience of a run, the table takes more than twenty minutes.
"""

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("", "tests/helpers")]

from faults import CONTENT, READ, TROUBLES, hurried, longest, meet  # noqa: E402

from zeroflow.data.hub import READING  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patience", choices=["hurried", "reading"], default="hurried")
    quick = parser.parse_args().patience == "hurried"
    out = sys.stdout.write
    out("| fault | outcome | requests | seconds | at most |\n|---|---|---|---|---|\n")
    for trouble in TROUBLES:
        patience = hurried(0.3 if trouble.says else 10.0) if quick else READING
        data, error, seconds, requests = meet(trouble, patience)
        again = "transient" if error and error.transient else "final"
        outcome = f"{again}: {error.cause}" if error else "read"
        assert error or data == CONTENT[READ], trouble
        most = longest(patience, READ.stop - READ.start)
        out(f"| {trouble.name} | {outcome} | {requests} | {seconds:.1f} | {most:.1f} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
