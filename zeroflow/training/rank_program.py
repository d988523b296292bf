"""The common program of all ranks: job, lock, process group, log and failure report."""

import logging
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import torch

from zeroflow import artifacts
from zeroflow.run_folder import RunFolder
from zeroflow.training import failures, host_watch, kernels, zero
from zeroflow.training.environment import CUBLAS_WORKSPACE
from zeroflow.training.events import EVENTS, Failed
from zeroflow.training.failures import Diverged
from zeroflow.training.job import RankJob, TrainingJob
from zeroflow.training.processes import LOG_MARK
from zeroflow.training.stopping import Agreement, Parent, Stop, StopRequest
from zeroflow.units import count

log = logging.getLogger("zeroflow.training")

Job = TypeVar("Job", bound=RankJob)

_START_AGAIN = os.EX_TEMPFAIL
"""Exit code of a rank that has saved because other machines were asked to stop. Torchrun restarts
ranks that end with a code other than 0."""


@dataclass(frozen=True)
class RankProgram(Generic[Job]):
    """The program of the ranks of a kind of job: `PROGRAM` of a module."""

    job_type: type[Job]
    work: Callable[[Job, Stop], None]

    def main(self) -> None:
        """Run the program as one rank of torchrun or Slurm, on the job file in the command line."""
        zero.set_rank_environment()
        log_to_terminal(_rank())
        self.run(Path(sys.argv[1]))

    def run(self, job_file: Path, parent: Parent | None = None) -> None:
        """Run the program as one rank of the job in `job_file`.

        If the same rank of an earlier command still runs, because its parent was killed, wait for
        it: it may be saving a checkpoint. If that takes too long, the launcher considers this rank
        hung.

        A failure is reported in events.jsonl, because an exit code cannot give the reason.

        Args:
            parent: the launcher, on this machine; None under torchrun or Slurm.
        """
        rank, folder = _rank(), RunFolder(job_file.parent)
        job = self.job_type.read(job_file)
        several = job.training.workload.nodes > 1
        if several:
            job = _among_hosts(self.job_type, job_file, rank)
        looks = rank == 0 and parent is None  # one rank that looks at the file is enough
        stop = Agreement(StopRequest(parent, file=folder.stop if looks else None))
        try:
            _require_ranks(job.training.workload.ranks, job_file)
            waiting_for = f"ranks of an earlier command in {folder.path} to finish and save"
            with artifacts.exclusive(folder.worker_lock(rank), waiting_for=waiting_for):
                if rank == 0:
                    zero.remove_stale_rendezvous(folder.path)
                work = job.training.workload
                with zero.process_group(work.device, alone=work.is_sharded):
                    self.work(_with_kernels(job, folder), stop)
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
            # A normal exit would destroy the process group, and so wait for ranks that wait for
            # this one
            traceback.print_exc()
            sys.stdout.flush()
            os._exit(1)
        if several and stop.is_for_others:
            sys.exit(_START_AGAIN)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _among_hosts(job_type: type[Job], job_file: Path, rank: int) -> Job:
    """Prepare a rank of several machines, and return the newest job."""
    folder = RunFolder(job_file.parent)
    host_watch.log_to_file(folder, rank)
    host_watch.choose_interface()
    host_watch.wait_for_job(folder)

    def end(why: str) -> None:
        EVENTS.append(folder.events, Failed(message=why, reason="killed", rank=rank))
        log.error("%s", why)
        os._exit(1)  # the main thread may wait forever

    host_watch.watch(folder, end)
    return on_machines_that_are_there(job_type.read(job_file))


def on_machines_that_are_there(job: Job) -> Job:
    """Return the job for the started ranks, if it may be trained on fewer machines than planned."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    planned = job.training.workload
    if not isinstance(job, TrainingJob) or job.min_nodes is None or started == planned.ranks:
        return job
    nodes, rest = divmod(started, planned.ranks // planned.nodes)
    if rest or not job.min_nodes <= nodes <= planned.nodes:
        return job
    there = count(nodes, "machine")
    log.warning("training on %s of %d, with the same batches", there, planned.nodes)
    peak = job.peak_flops and job.peak_flops * started / planned.ranks
    training = job.training.replace(workload=planned.on_machines(nodes))
    return job.replace(training=training, peak_flops=peak)


def _with_kernels(job: Job, folder: RunFolder) -> Job:
    """Return the job with the fastest kernels, the same on all ranks."""
    training = job.training
    choose = partial(
        kernels.choose, training.workload, folder.cache.kernels, z_loss=training.z_loss
    )
    return job.replace(training=training.replace(kernels=zero.on_rank0(choose)))


def _require_ranks(wanted: int, job_file: Path) -> None:
    """
    Raises:
        ValueError: torchrun or Slurm started another number of ranks than the job has.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != wanted:
        raise ValueError(
            f"{job_file} needs {count(wanted, 'rank')}, not {started}: start {wanted}, or repeat "
            "the command of the run with other numbers of machines and ranks"
        )


def log_to_terminal(rank: int) -> None:
    """Log to standard error, for a rank under torchrun: INFO and above on rank 0, else warnings."""
    logging.basicConfig(
        level=logging.WARNING if rank else logging.INFO,
        format=f"%(asctime)s  {f'rank {rank}: ' if rank else ''}%(message)s",
        datefmt="%H:%M:%S",
    )


def log_to_parent(rank: int) -> None:
    """Log to the launcher: INFO and above on rank 0, warnings on other ranks."""

    class Line(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            prefix = f"rank {rank}: " if rank else ""
            return f"{LOG_MARK}{record.levelno // 10}{prefix}{super().format(record)}"

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Line())
    level = logging.WARNING if rank else logging.INFO
    logging.basicConfig(level=level, handlers=[handler])


def make_deterministic() -> None:
    """Make PyTorch use only kernels that give the same results in every run."""
    os.environ.setdefault(*CUBLAS_WORKSPACE)
    torch.use_deterministic_algorithms(True)
    # Filling new tensors costs time, and only helps to find reads of uninitialised memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
