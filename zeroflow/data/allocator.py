"""Memory that the C library has been given back and keeps, where that is glibc.

Source: mallopt(3), malloc_trim(3), https://man7.org/linux/man-pages/man3/mallopt.3.html
"""

import ctypes
from typing import Any

_M_ARENA_MAX = -8  # malloc.h


def give_back() -> None:
    """Let the system have what is free, such as the 70 MB that were taken to load a vocabulary."""
    if trim := _function("malloc_trim"):
        trim(0)


def share_arenas(count: int) -> None:
    """Have all threads take memory from so many places, not from one each.

    What is free in one is of no use to a thread that takes from another.
    """
    if mallopt := _function("mallopt"):
        mallopt(_M_ARENA_MAX, count)


def _function(name: str) -> Any:
    """None where the library has no such thing."""
    return getattr(ctypes.CDLL(None), name, None)
