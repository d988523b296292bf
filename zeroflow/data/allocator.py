"""Limits on the memory that the C library keeps after it was freed; only glibc has these calls.

Source: mallopt(3), malloc_trim(3), https://man7.org/linux/man-pages/man3/mallopt.3.html
"""

import ctypes
from typing import Any

_M_ARENA_MAX = -8  # malloc.h


def give_back() -> None:
    """Return free memory to the system, such as the 70 MB that loading a vocabulary leaves."""
    if trim := _function("malloc_trim"):
        trim(0)


def share_arenas(count: int) -> None:
    """Limit the memory pools that threads allocate from; by default there are 8 for each core.

    A thread cannot use memory that is free in the pool of another thread.
    """
    if mallopt := _function("mallopt"):
        mallopt(_M_ARENA_MAX, count)


def _function(name: str) -> Any:
    """A function of the C library; None if it has no such function."""
    return getattr(ctypes.CDLL(None), name, None)
