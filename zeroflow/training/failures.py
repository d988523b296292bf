"""Failures of training, and the messages with which a rank reports them."""

import os
from pathlib import Path
from typing import Literal

import torch

from zeroflow import artifacts

FailureReason = Literal["killed", "hang", "out of memory", "diverged", "error"]
"""killed: the process ended without an error message. diverged: a loss, gradient or update was
non-finite or unusual."""

# Error texts of PyTorch and Triton
_NO_COMPILER = ("No working C++ compiler", "Failed to find C compiler")


class TrainingFailed(RuntimeError):
    """A rank ended with an error, or was killed."""

    def __init__(
        self, message: str, reason: FailureReason = "error", step: int | None = None
    ) -> None:
        """
        Args:
            step: step at which training diverged.
        """
        super().__init__(message)
        self.reason, self.step = reason, step
        self.will_retry = False
        """True if another start, perhaps with changed settings, may succeed."""

    def add_advice(self, advice: str) -> None:
        if advice:
            self.args = (f"{self}\n{advice}",)


class RunIsBusy(TrainingFailed):
    """Another process is working on the run."""


class TrainingStopped(RuntimeError):
    """Training stopped cleanly on request."""


class Diverged(FloatingPointError):
    """A loss, gradient or update is non-finite or unusual. Raised by a rank."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


def reason(error: Exception) -> FailureReason:
    """Classify the error of a rank."""
    if isinstance(error, Diverged):
        return "diverged"
    # PyTorch's CPU allocator raises a plain RuntimeError
    out = isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)
    return "out of memory" if out else "error"


def message(error: Exception, run_dir: Path) -> str:
    """Return the message about a rank's error that the user sees."""
    if isinstance(error, Diverged | ValueError):
        return str(error)
    if any(lack in str(error) for lack in _NO_COMPILER):
        return (
            "torch.compile and Triton need a C and a C++ compiler, but none was found: install gcc "
            "and g++, or set CC and CXX; on a CPU, --no-compile needs neither"
        )
    if not isinstance(error, OSError) or not error.strerror:
        return f"{type(error).__name__}: {error}"
    if error.errno not in artifacts.NO_ROOM or error.strerror != os.strerror(error.errno):
        return artifacts.explained(error)
    return (
        f"{error.strerror}, writing to {error.filename or run_dir}: free some space, raise the "
        "limit or move the cache (--cache-dir); existing checkpoints are kept, and the same "
        "command resumes from the newest"
    )
