"""Run a job in its ranks: start them, watch them, and report how they ended.

Ranks are always separate processes: GPU memory is returned when they exit, and after a crash or an
out-of-memory kill the flow can still report it. torchrun is not used: it takes seconds to start,
one rank needs no rendezvous, and torchrun is one more process that can be killed.
"""

import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from zeroflow.run_folder import RunFolder
from zeroflow.training import hosts, ownership, zero
from zeroflow.training.environment import rank_environment
from zeroflow.training.events import EVENTS, Done, Event, Failed, Stopped
from zeroflow.training.failures import TrainingFailed, TrainingStopped
from zeroflow.training.processes import rank_processes
from zeroflow.training.pulse import Pulse, PulseReader

_POLL_SECONDS = 0.2

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
    nodes: int = 1,
    hang_seconds: int | None = None,
    compile_cache: Path | None = None,
) -> None:
    """Run `python -m module job_file` once for every rank and wait until all have succeeded.

    Their output goes to the log. If this process is interrupted, it asks them to stop and waits for
    them; if it dies, they notice and stop by themselves, see `stopping`. If one rank fails, the
    others are ended, because they would wait for it.

    Args:
        job_file: in the folder of the run.
        nodes: number of machines. If there are several, their users start the ranks; see `hosts`.
        on_event: called with every new event, and with the newest pulse as it changes.
        hang_seconds: time without a heartbeat after which ranks are killed; None waits forever.
        compile_cache: folder for compiled code, unless the environment names one; None leaves it
            to PyTorch.

    Raises:
        RunIsBusy: ranks launched by another process for this run are running.
        TrainingFailed: a rank failed; the message has its reason or its last output.
        TrainingStopped: the ranks were stopped from outside.
    """
    folder = RunFolder(job_file.parent)
    busy = f"another process is working on run {folder.name}"
    with ownership.exclusive(folder.launch_lock, busy):
        if nodes > 1:
            _follow_hosts(module, job_file, on_event, nodes, ranks, hang_seconds)
            return
        rendezvous = zero.rendezvous_file(folder.path)
        shared = rank_environment(compile_cache)
        environments = [shared | zero.environment(rank, ranks, rendezvous) for rank in range(ranks)]
        try:
            _run(module, job_file, environments, on_event, hang_seconds)
        finally:
            rendezvous.unlink(missing_ok=True)


def _run(
    module: str,
    job_file: Path,
    environments: Sequence[dict[str, str]],
    on_event: Callable[[Event | Pulse], None],
    hang_seconds: int | None,
) -> None:
    folder = RunFolder(job_file.parent)
    progress = _Progress(folder, on_event)
    with rank_processes(module, job_file, environments) as ranks:
        while None in (codes := ranks.exit_codes()):
            progress.follow()
            if hang_seconds and progress.seconds_since_last() > hang_seconds:
                ranks.kill()
                raise TrainingFailed(
                    f"{module} made no progress for {hang_seconds} s and was killed", "hang"
                )
            if any(codes):  # the other ranks wait for the failed one
                codes = ranks.end_after_failure(folder.checkpoints)
                break
            time.sleep(_POLL_SECONDS)
    progress.follow()
    _require_good_end(module, codes, progress.last, folder, ranks.last_output)


def _follow_hosts(
    module: str,
    job_file: Path,
    on_event: Callable[[Event | Pulse], None],
    nodes: int,
    ranks: int,
    hang_seconds: int | None,
) -> None:
    """Follow the ranks of several machines to their end.

    Torchrun restarts the ranks after any failure. So a failure without its own remedy counts as a
    kill: it is added to the ledger, and the next call follows the restarted ranks.
    """
    progress = _Progress(RunFolder(job_file.parent), on_event)

    def ended() -> bool:
        progress.follow()
        return isinstance(progress.last, Done | Stopped | Failed)

    with hosts.announced(module, job_file, nodes=nodes, ranks=ranks, ended=ended):
        while not ended():
            begun = progress.last is not None  # machines may be joined hours later
            if hang_seconds and begun and progress.seconds_since_last() > hang_seconds:
                raise TrainingFailed(
                    f"the ranks of {nodes} machines made no progress for {hang_seconds} s", "hang"
                )
            time.sleep(_POLL_SECONDS)
    match progress.last:
        case Failed() as failure:
            own = failure.reason in ("out of memory", "diverged")
            reason = failure.reason if own else "killed"
            raise TrainingFailed(failure.message, reason, failure.step)
        case Stopped() as stopped:
            raise TrainingStopped(stopped.message)


class _Progress:
    """Events of a launch, and the time since its ranks last showed that they live."""

    def __init__(self, folder: RunFolder, on_event: Callable[[Event | Pulse], None]) -> None:
        self._events = EVENTS.follow(folder.events, from_end=True)
        self._pulses, self._heartbeat = PulseReader(folder.alive), Heartbeat(folder.alive)
        self._on_event = on_event
        self.last: Event | None = None
        """The first failure, otherwise the last event."""

    def follow(self) -> None:
        for event in self._events.new_records():
            if not isinstance(self.last, Failed):  # what follows are consequences of the first
                self.last = event
            self._on_event(event)
        if pulse := self._pulses.new():
            self._on_event(pulse)

    def seconds_since_last(self) -> float:
        return self._heartbeat.seconds_since_last()


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
            last = None  # other ranks only report that they lost the killed one
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


class Heartbeat:
    """Watches the file that ranks touch, using this process's monotonic clock.

    File times are compared only with each other, so changes of the system clock have no effect.
    """

    def __init__(self, alive: Path) -> None:
        self._file, self._seen, self._since = alive, 0, time.monotonic()

    def seconds_since_last(self) -> float:
        touched = self._file.stat().st_mtime_ns if self._file.exists() else 0
        if touched != self._seen:
            self._seen, self._since = touched, time.monotonic()
        return time.monotonic() - self._since
