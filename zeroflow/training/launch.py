"""Run a job in its ranks: start them, watch them, and report how they ended.

Ranks are always separate processes, even a single one: the flow survives a crash or an
out-of-memory kill and can report it, and the GPU memory of a failed job is freed. On one machine,
torchrun is not used: it takes seconds to start, one rank needs no rendezvous, and it leaves orphans
if it is killed.
"""

import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from zeroflow.run_folder import RunFolder
from zeroflow.training import checkpoint, ownership, zero
from zeroflow.training.environment import LAUNCHED, Place
from zeroflow.training.events import Done, Event, Failed, Stopped
from zeroflow.training.failures import TrainingFailed, TrainingStopped
from zeroflow.training.following import Progress
from zeroflow.training.processes import Task, rank_processes
from zeroflow.training.pulse import Pulse

_POLL_SECONDS = 0.1
"""Time between two checks of the ranks."""

_KILLED = (-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS)
"""Exit codes of a killed rank. A rank that loses its connection to another rank aborts instead."""

_REPORT_BYTES = 2**20
"""Free disk space that a rank needs to report why it failed."""


def launch(
    module: str,
    job_file: Path,
    on_event: Callable[[Event | Pulse], None],
    *,
    ranks: int = 1,
    hang_seconds: int | None = None,
    compile_cache: Path | None = None,
) -> None:
    """Run the rank program `module` on `job_file` in every rank, and wait until all have succeeded.

    The output of the ranks goes to the log. If this process is interrupted, it asks them to stop
    and waits for them. If it dies, they notice and stop by themselves; see `stopping`. If one rank
    fails, the others are ended, because they would wait for it forever.

    Args:
        module: has a `PROGRAM`, see `rank_program`.
        job_file: file in the folder of the run.
        on_event: called with every new event, and with the newest pulse as it changes.
        hang_seconds: time without a heartbeat after which ranks are killed; None waits forever.
        compile_cache: folder for compiled code, unless the environment names one; None for
            PyTorch's default.

    Raises:
        RunIsBusy: another process has launched ranks for this run, which are still running.
        TrainingFailed: a rank failed; the message has its reason or its last output.
        TrainingStopped: the ranks were stopped from outside.
    """
    folder = RunFolder(job_file.parent)
    busy = f"another process is working on run {folder.name}"
    with ownership.exclusive(folder.launch_lock, busy):
        rendezvous = zero.rendezvous_file(folder.path)
        task = Task(
            module=module,
            job_file=job_file,
            environment={LAUNCHED: str(time.time()), zero.RENDEZVOUS: str(rendezvous)},
        )
        places = [Place(rank, ranks, compile_cache) for rank in range(ranks)]
        try:
            _run(task, places, folder, on_event, hang_seconds)
        finally:
            rendezvous.unlink(missing_ok=True)


def _run(
    task: Task,
    places: Sequence[Place],
    folder: RunFolder,
    on_event: Callable[[Event | Pulse], None],
    hang_seconds: int | None,
) -> None:
    module, progress = task.module, Progress(folder, on_event)
    with rank_processes(places, folder.path) as ranks:
        ranks.begin(task)
        while None in (codes := ranks.exit_codes()):
            progress.follow()
            if hang_seconds and progress.seconds_since_last() > hang_seconds:
                ranks.kill()
                raise TrainingFailed(
                    f"{module} made no progress for {hang_seconds} s and was killed", "hang"
                )
            if any(codes):  # a rank has failed, and the others wait for it
                codes = ranks.end_after_failure(
                    lambda: bool(checkpoint.unfinished(folder.checkpoints))
                )
                break
            time.sleep(_POLL_SECONDS)
    progress.follow()
    _require_good_end(module, codes, progress.last, folder, ranks.last_output)


def _require_good_end(
    module: str,
    codes: Sequence[int | None],
    last: Event | None,
    folder: RunFolder,
    last_output: Sequence[str],
) -> None:
    """
    Args:
        codes: exit codes by rank; None for ranks that had to be killed.
        last: the first failure that a rank reported, otherwise the last event.
    """
    ended = f"{module} ended with exit code {next(filter(None, codes), 0)}"
    if len(codes) > 1:
        listed = (f"{rank}: {'none' if c is None else c}" for rank, c in enumerate(codes))
        ended = f"{module} failed on a rank (exit codes by rank: {', '.join(listed)})"
        killed = [rank for rank, code in enumerate(codes) if code in _KILLED]
        if killed and not (isinstance(last, Failed) and last.rank in killed):
            last = None  # a report of another rank, which only lost its connection to this one
    match last:
        case Done():
            return
        case Failed():
            raise TrainingFailed(last.message, last.reason, last.step)
        case Stopped():
            raise TrainingStopped(last.message)
    if (free := shutil.disk_usage(folder.path).free) < _REPORT_BYTES:
        raise TrainingFailed(
            f"{module} ended, and the disk of {folder.path} has {free} bytes left: free some "
            "space, or move the cache (--cache-dir)"
        )
    output = "\n".join([" Its last output:", *last_output]) if last_output else ""
    raise TrainingFailed(
        f"{ended} without an error message; killed, or out of memory?{output}", "killed"
    )
