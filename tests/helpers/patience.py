"""Waiting in tests. Timings decide no test, so they pass on a busy machine."""

import time
from collections.abc import Callable
from typing import Any

import pytest

HANG_SECONDS = 900.0
"""A wait that takes longer has no end: it is not a matter of speed."""


def wait_until(there: Callable[[], Any], what: str = "it") -> Any:
    """Return what `there` returns, as soon as that is true."""
    until = time.monotonic() + HANG_SECONDS
    while not (found := there()):
        if time.monotonic() > until:
            pytest.fail(f"{what} did not come about in {HANG_SECONDS:g} s")
        time.sleep(0.05)
    return found
