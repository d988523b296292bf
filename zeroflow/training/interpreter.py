"""Shorter imports, for programs that import thousands of modules.

`python -m zeroflow.training.interpreter MODULE ARGUMENT ...` runs MODULE, with these imports, as
`python -m MODULE ARGUMENT ...` would.
"""

import gc
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collections() -> Iterator[None]:
    """Import in the block without garbage collections, and do not collect what was imported.

    Importing creates many objects that stay, and each collection would look at all of them again,
    which takes a third of the time of the imports.
    """
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collected:
            gc.enable()


def collect_again() -> None:
    """Enable garbage collections again after `main`; they skip the objects that exist by now."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def main() -> None:
    """Run the module in the command line, which calls `collect_again` after its imports."""
    gc.disable()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
