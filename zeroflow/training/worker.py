"""What every process that `job.launch` starts has in common: its job, its end and its last word."""

import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from zeroflow import artifacts
from zeroflow.run_folder import RunFolder
from zeroflow.training import zero
from zeroflow.training.events import EVENTS, Failed
from zeroflow.training.job import FailureReason, RankJob
from zeroflow.training.launch import LOGGED, WATCH_PARENT

_SAME_REQUEST_SECONDS = 1.0
_ORPHAN_SECONDS = 600.0
"""In which ranks whose parent is gone end their step and save."""

_NO_COMPILER = ("No working C++ compiler", "Failed to find C compiler")
"""What PyTorch's and Triton's errors say."""

Stop = Callable[[], bool]
"""Whether any rank was asked to stop; all of them have to ask at the same place."""


Job = TypeVar("Job", bound=RankJob)


class StopRequest:
    """Set by SIGTERM, SIGINT or the end of the parent; a later second signal ends at once."""

    def __init__(self, *, watch_parent: bool, ranks: int = 1) -> None:
        self._since: float | None = None
        self._ranks = ranks
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        if watch_parent:
            threading.Thread(target=self._wait_for_parent, daemon=True).start()

    def __bool__(self) -> bool:
        return self._since is not None

    def _on_signal(self, number: int, frame: object) -> None:
        # A scheduler's signal to all processes comes as its parent's end as well: one request
        if self._since and time.monotonic() - self._since > _SAME_REQUEST_SECONDS:
            os._exit(128 + number)
        self._since = self._since or time.monotonic()

    def _wait_for_parent(self) -> None:
        while os.read(0, 4096):  # not sys.stdin, whose lock would be held at exit
            pass
        self._since = self._since or time.monotonic()
        if self._ranks > 1:
            # It may wait for one that is gone as well, and nobody is there to see it
            if zero.ranks() == self._ranks:
                time.sleep(_ORPHAN_SECONDS)
            os._exit(1)


def main(job_type: type[Job], work: Callable[[Job, Stop], None]) -> None:
    """Do `work` on the job in the file that the command line names, as one of its ranks, of which
    there is one each in its directory.

    What is left of a job whose parent was killed ends its step and saves first: it is waited for,
    until the parent takes that for hung.

    A failure is told to the parent through events.jsonl, as no exit code could.
    """
    rank = int(os.environ.get("RANK", "0"))
    _log_to_parent(rank)
    job_file = Path(sys.argv[1])
    job = job_type.read(job_file)
    watch = WATCH_PARENT in sys.argv[2:]
    request = StopRequest(watch_parent=watch, ranks=job.training.workload.ranks)
    folder = RunFolder(job_file.parent)
    try:
        waiting_for = (
            f"what an earlier command left at work in {folder.path} ends its step and saves"
        )
        with artifacts.exclusive(folder.worker_lock(rank), waiting_for=waiting_for):
            if rank == 0:
                zero.remove_stale_rendezvous(folder.path)
            with zero.process_group(job.training.workload.device):
                work(job, lambda: zero.is_any(bool(request)))
    except Exception as error:
        failure = Failed(
            message=_message(error, folder.path),
            reason=_reason(error),
            rank=rank,
            step=error.step if isinstance(error, Diverged) else None,
        )
        EVENTS.append(folder.events, failure)
        if zero.ranks() == 1:
            raise
        # On the usual way out it would wait for those that wait for it
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)


def _log_to_parent(rank: int) -> None:
    """Rank 0 says what goes on, the others what goes wrong."""

    class Line(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            of = f"rank {rank}: " if rank else ""
            return f"{LOGGED}{record.levelno // 10}{of}{super().format(record)}"

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Line())
    level = logging.WARNING if rank else logging.INFO
    logging.basicConfig(level=level, handlers=[handler])


class Diverged(FloatingPointError):
    """Loss, gradient or update went wrong."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


def _reason(error: Exception) -> FailureReason:
    if isinstance(error, Diverged):
        return "diverged"
    # PyTorch's CPU allocator raises a plain RuntimeError
    out = isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)
    return "out of memory" if out else "error"


def _message(error: Exception, run_dir: Path) -> str:
    if isinstance(error, Diverged | ValueError):
        return str(error)
    if any(lack in str(error) for lack in _NO_COMPILER):
        return (
            "torch.compile and Triton need a C and a C++ compiler, and found none: install gcc and "
            "g++, or name others in CC and CXX; on a CPU, --no-compile does without"
        )
    if not isinstance(error, OSError) or not error.strerror:
        return f"{type(error).__name__}: {error}"
    if error.errno not in artifacts.NO_ROOM or error.strerror != os.strerror(error.errno):
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return (
        f"{error.strerror}, writing to {error.filename or run_dir}: free some, raise the limit or "
        "move the cache (--cache-dir); the checkpoints that are there are kept, and the same "
        "command goes on from the newest"
    )


def make_deterministic() -> None:
    """Have PyTorch use only kernels whose results are the same from run to run."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
