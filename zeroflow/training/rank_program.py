"""What the program of every rank has in common: job, lock, process group, log and last report."""

import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from zeroflow import artifacts
from zeroflow.run_folder import RunFolder
from zeroflow.training import failures, zero
from zeroflow.training.events import EVENTS, Failed
from zeroflow.training.failures import Diverged
from zeroflow.training.job import RankJob
from zeroflow.training.processes import LOG_MARK, WATCH_PARENT
from zeroflow.training.stopping import Stop, StopRequest

Job = TypeVar("Job", bound=RankJob)


def main(job_type: type[Job], work: Callable[[Job, Stop], None]) -> None:
    """Do `work` on the job in the file that the command line names, as one of its ranks.

    Of each rank there is one process at a time in a run's directory. A rank whose parent was killed
    may still be saving: its successor waits for it, until the launcher takes that for a hang.

    A failure is reported in events.jsonl, as an exit code could not tell the reason.
    """
    rank = int(os.environ.get("RANK", "0"))
    log_to_parent(rank)
    job_file = Path(sys.argv[1])
    job = job_type.read(job_file)
    watch = WATCH_PARENT in sys.argv[2:]
    request = StopRequest(watch_parent=watch, ranks=job.training.workload.ranks)
    folder = RunFolder(job_file.parent)
    try:
        waiting_for = f"a rank of an earlier command in {folder.path} finishes its step and saves"
        with artifacts.exclusive(folder.worker_lock(rank), waiting_for=waiting_for):
            if rank == 0:
                zero.remove_stale_rendezvous(folder.path)
            with zero.process_group(job.training.workload.device):
                work(job, lambda: zero.is_any(bool(request)))
    except Exception as error:
        failure = Failed(
            message=failures.message(error, folder.path),
            reason=failures.reason(error),
            rank=rank,
            step=error.step if isinstance(error, Diverged) else None,
        )
        EVENTS.append(folder.events, failure)
        if zero.ranks() == 1:
            raise
        # The usual way out would destroy the process group, and wait for ranks that wait for us
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)


def log_to_parent(rank: int) -> None:
    """Log to the launcher: rank 0 everything from INFO on, the other ranks warnings and errors."""

    class Line(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            prefix = f"rank {rank}: " if rank else ""
            return f"{LOG_MARK}{record.levelno // 10}{prefix}{super().format(record)}"

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Line())
    level = logging.WARNING if rank else logging.INFO
    logging.basicConfig(level=level, handlers=[handler])


def make_deterministic() -> None:
    """Make PyTorch use only kernels whose results are the same from run to run."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product
    torch.use_deterministic_algorithms(True)
    # Filling new tensors would only help to debug reads of uninitialised memory, and costs time
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
