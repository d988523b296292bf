"""Limits on the freed memory that the C library keeps; only glibc has these calls.

Without these limits, a process keeps much of the memory that it has freed: glibc returns memory to
the system from the end of a pool only, and many threads have a pool of their own.

Source: mallopt(3), malloc_trim(3), https://man7.org/linux/man-pages/man3/mallopt.3.html
"""

import ctypes
from typing import Any

_M_ARENA_MAX = -8  # malloc.h


def give_back() -> None:
    """Return freed memory to the system, such as the 70 MB that loading a vocabulary leaves."""
    if trim := _function("malloc_trim"):
        trim(0)


def share_arenas(count: int) -> None:
    """Limit the number of memory pools of all threads; the default is 8 for each core.

    Memory that is free in one pool cannot be used by threads of another pool. So with fewer pools
    the process needs less memory, at the cost of threads that wait for each other's allocations.
    """
    if mallopt := _function("mallopt"):
        mallopt(_M_ARENA_MAX, count)


def _function(name: str) -> Any:
    """A function of the C library; None if it has no such function."""
    return getattr(ctypes.CDLL(None), name, None)
