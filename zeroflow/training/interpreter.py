"""Shorter imports, for programs that import thousands of modules.

`python -m zeroflow.training.interpreter MODULE ARGUMENT ...` runs MODULE, with these imports, as
`python -m MODULE ARGUMENT ...` would.
"""

import gc
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

R = TypeVar("R")

_FRAME_SLOTS = 70_000
"""Size of the frame of `with_room`: a little more than half of a chunk of 1 MiB, in pointers."""


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


def with_room(function: Callable[[], R]) -> R:
    """Call `function`, with half a megabyte for the frames of all calls in it.

    Python keeps frames in chunks of 16 KiB, and gives a chunk back to the system when the calls in
    it have returned. If the calls of a loop are just beyond the end of a chunk, each maps and
    unmaps memory: the imports of Prefect did so 20,000 times. The frame of this function is so
    large that Python maps a larger chunk, which has room for the deepest calls.
    """
    return function()


with_room.__code__ = with_room.__code__.replace(co_stacksize=_FRAME_SLOTS)


def main() -> None:
    """Run the module in the command line, which calls `collect_again` after its imports."""
    gc.disable()
    del sys.argv[0]
    with_room(lambda: runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True))


if __name__ == "__main__":
    main()
