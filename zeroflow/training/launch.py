"""Starts the ranks of a job, watches them and ends them.

Ranks always run in processes of their own: GPU memory is returned when they exit, and after a crash
or an out-of-memory kill the flow is alive to report it. torchrun is not between them: it takes
seconds to start, a single process needs no rendezvous, and it is one more process to be killed.
"""

import contextvars
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any

import psutil
import torch

from zeroflow import artifacts
from zeroflow.run_folder import RunFolder
from zeroflow.tracking.tracker import Tracker
from zeroflow.training import checkpoint, zero
from zeroflow.training.events import EVENTS, Done, Event, Failed, Started, Stopped
from zeroflow.training.job import (
    RunIsBusy,
    TrainingFailed,
    TrainingJob,
    TrainingStopped,
    TrainResult,
    finished,
)
from zeroflow.training.metrics import METRICS, points

log = logging.getLogger(__name__)


WATCH_PARENT = "--watch-parent"


LAUNCHED = "ZEROFLOW_LAUNCHED"
"""Environment variable: the time at which the child was launched."""


LOGGED = "\x1e"
"""Begins each line that a child logs, to tell it from other output; a digit for the level and the
text follow."""


_STOP_SECONDS = 120.0


_GRACE_SECONDS = 10.0


_POLL_SECONDS = 0.2


_LAST_LINES = 20


_KILLED = (-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS)
"""Exit codes of a rank that did not end by itself. One that lost contact to another aborts."""


_ROOM_TO_SPEAK = 2**20
"""Bytes of free disk that a rank needs to write down why it failed."""


def train(job: TrainingJob, on_event: Callable[[Event], None] = lambda event: None) -> TrainResult:
    """Train in processes of their own, from the newest checkpoint, and have MLflow follow.

    Args:
        on_event: called in this process with every new event.

    Raises:
        TrainingFailed: with the reason that a rank gave, or its last output.
        TrainingStopped: training was stopped from outside after writing a checkpoint.
    """
    job.write(job.folder.job)
    with _tracked(job) as begin:

        def follow(event: Event) -> None:
            if isinstance(event, Started):
                begin()
            on_event(event)

        launch(
            "zeroflow.training",
            job.folder.job,
            follow,
            ranks=job.training.workload.ranks,
            hang_seconds=job.hang_seconds,
            compile_cache=job.compile_cache,
        )
    if (result := finished(job)) is None:
        raise TrainingFailed(f"training ended without a result in {job.folder.training}")
    return result


@contextmanager
def _tracked(job: TrainingJob) -> Iterator[Callable[[], None]]:
    """Yield a function that has MLflow follow the training until the block ends.

    To be called when the ranks have started: they first drop the lines of metrics.jsonl whose steps
    are trained again.
    """
    tracker: Tracker | None = None
    status = "KILLED"

    def begin() -> None:
        nonlocal tracker
        metrics = METRICS.follow(job.folder.metrics)
        tracker = Tracker(job.tracking, job.folder, lambda: points(metrics.new_records()))

    try:
        yield begin
        status = "FINISHED"
    except TrainingFailed:
        status = "FAILED"
        raise
    finally:
        if tracker:
            tracker.close(status)


def launch(
    module: str,
    job_file: Path,
    on_event: Callable[[Event], None],
    *,
    ranks: int = 1,
    hang_seconds: int | None = None,
    compile_cache: Path | None = None,
) -> None:
    """Run `python -m module job_file` once for every rank, until all have ended well.

    Their output goes to this module's logger. If this process is interrupted, it asks them to stop
    and waits for them; if it dies, they notice and stop by themselves. If one rank fails, the
    others, which would wait for it, are ended.

    Args:
        job_file: in the folder of the run.
        hang_seconds: time without a sign of life after which ranks are killed; None waits forever.
        compile_cache: folder for compiled code, unless the environment names one; None leaves it
            to PyTorch.

    Raises:
        RunIsBusy: another process has launched ranks for this run, and they are running.
        TrainingFailed: with the reason that a rank gave, or its last output.
        TrainingStopped: the ranks were stopped from outside.
    """
    folder = RunFolder(job_file.parent)
    with alone(folder.launch_lock, f"another process is at work on run {folder.name}"):
        meeting = zero.rendezvous_file(folder.path)
        environments = [
            _environment(compile_cache) | zero.environment(rank, ranks, meeting)
            for rank in range(ranks)
        ]
        try:
            _launch(module, job_file, on_event, hang_seconds, environments)
        finally:
            meeting.unlink(missing_ok=True)


@contextmanager
def alone(lock: Path, found: str) -> Iterator[None]:
    """Hold `lock`, or fail at once.

    Raises:
        RunIsBusy: another process holds it; the message begins with `found`.
    """
    with ExitStack() as held:
        try:
            held.enter_context(artifacts.exclusive(lock, timeout_seconds=0))
        except TimeoutError as error:
            raise RunIsBusy(f"{found}: wait for its end, or use another --run-name") from error
        yield


@contextmanager
def ownership() -> Iterator[Callable[[Path], None]]:
    """Yield a function that makes a run's directory this process's own until the block ends.

    It raises `RunIsBusy` if another process owns the directory, which its end frees.
    """
    with ExitStack() as held:
        owned: set[Path] = set()

        def acquire(run_dir: Path) -> None:
            if run_dir not in owned:
                found = f"another process is at work on run {run_dir.name}"
                held.enter_context(alone(RunFolder(run_dir).owner_lock, found))
                owned.add(run_dir)

        yield acquire


def _launch(
    module: str,
    job_file: Path,
    on_event: Callable[[Event], None],
    hang_seconds: int | None,
    environments: Sequence[dict[str, str]],
) -> None:
    folder = RunFolder(job_file.parent)
    events = EVENTS.follow(folder.events, from_end=True)
    last: Event | None = None

    def follow() -> None:
        nonlocal last
        for event in events.new_records():
            if not isinstance(last, Failed):  # what comes after the first failure follows from it
                last = event
            on_event(event)

    signs = _SignsOfLife(folder.alive)
    with _children(module, job_file, environments) as (processes, last_output):
        while None in (codes := [process.poll() for process in processes]):
            follow()
            if hang_seconds and signs.seconds_since_last() > hang_seconds:
                _kill(processes)
                raise TrainingFailed(
                    f"{module} showed no sign of life for {hang_seconds} s: killed", "hang"
                )
            if any(codes):  # the others wait for it
                codes = _end(processes, folder.checkpoints)
                break
            time.sleep(_POLL_SECONDS)
    follow()
    _require_good_end(module, codes, last, folder, last_output)


def _require_good_end(
    module: str,
    codes: Sequence[int | None],
    last: Event | None,
    folder: RunFolder,
    last_output: Sequence[str],
) -> None:
    """
    Args:
        codes: exit codes by rank; None of ranks that had to be killed.
        last: the first failure that a rank reported, else the last event.
    """
    ended = f"{module} ended with exit code {next(filter(None, codes), 0)}"
    if len(codes) > 1:
        listed = (f"{rank}: {'none' if c is None else c}" for rank, c in enumerate(codes))
        ended = f"{module} ended on some rank (exit codes by rank: {', '.join(listed)})"
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
    if (free := shutil.disk_usage(folder.path).free) < _ROOM_TO_SPEAK:
        raise TrainingFailed(
            f"{module} ended, and the disk of {folder.path} has {free} bytes left: free some, or "
            "move the cache (--cache-dir)"
        )
    output = "\n".join([" Its last output:", *last_output]) if last_output else ""
    raise TrainingFailed(
        f"{ended} without an error message; killed, or out of memory?{output}", "killed"
    )


def _end(processes: Sequence[subprocess.Popen[Any]], checkpoints: Path) -> list[int | None]:
    """Kill the ranks that do not end by themselves after one has failed.

    They get some time: all may be reporting the same failure, and a checkpoint that is being
    written is what the next start resumes from.

    Returns:
        the exit codes by rank; None of those killed here
    """
    began = time.monotonic()
    while None in (codes := [process.poll() for process in processes]):
        writing = checkpoint.unfinished(checkpoints)
        if time.monotonic() - began > (_STOP_SECONDS if writing else _GRACE_SECONDS):
            break
        time.sleep(_POLL_SECONDS)
    _kill(processes)
    return codes


class _SignsOfLife:
    """Watches the file that ranks touch, by this process's own clock.

    File times are only compared with each other, so setting the system clock changes nothing.
    """

    def __init__(self, alive: Path) -> None:
        self._file, self._seen, self._since = alive, 0, time.monotonic()

    def seconds_since_last(self) -> float:
        touched = self._file.stat().st_mtime_ns if self._file.exists() else 0
        if touched != self._seen:
            self._seen, self._since = touched, time.monotonic()
        return time.monotonic() - self._since


@contextmanager
def _children(
    module: str, job_file: Path, environments: Sequence[dict[str, str]]
) -> Iterator[tuple[list[subprocess.Popen[str]], deque[str]]]:
    processes: list[subprocess.Popen[str]] = []
    last_output: deque[str] = deque(maxlen=_LAST_LINES)
    readers = []
    try:
        for environment in environments:
            process = subprocess.Popen(
                [sys.executable, "-m", module, str(job_file), WATCH_PARENT],
                stdin=subprocess.PIPE,  # never written to: its end tells the child that we died
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # only this process gets Ctrl-C, and stops it in order
                env=environment,
            )
            processes.append(process)
            # In a copy of this context: from it Prefect knows which flow run a log line belongs to
            context = contextvars.copy_context()
            reader = threading.Thread(
                target=context.run, args=(_pass_on, process, last_output), daemon=True
            )
            reader.start()
            readers.append(reader)
        yield processes, last_output
        for reader in readers:
            reader.join(timeout=5)
    finally:
        _stop(processes)


def _environment(compile_cache: Path | None) -> dict[str, str]:
    # By default glibc returns every large tensor to the kernel, page by page: a fifth of a CPU step
    kept = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    if compile_cache is not None:
        # By default PyTorch uses a temporary folder, which may be gone after a reboot
        names = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
        kept |= {name: str(compile_cache / folder) for name, folder in names.items()}
    given = dict(os.environ)
    if compile_cache is not None and not Path(cache_from_source(torch.__file__)).exists():
        # A container image may come without bytecode: every process would compile PyTorch's sources
        given.pop("PYTHONDONTWRITEBYTECODE", None)
        kept["PYTHONPYCACHEPREFIX"] = str(compile_cache / "python")
    return kept | given | {"PYTHONUNBUFFERED": "1", LAUNCHED: str(time.time())}


def _pass_on(process: subprocess.Popen[str], last_output: deque[str]) -> None:
    """Log what the child logs; other output, such as tracebacks, at the level of --verbose."""
    assert process.stdout is not None
    for line in map(str.rstrip, process.stdout):
        level, text = logging.DEBUG, line
        if line.startswith(LOGGED) and line[1:2].isdigit():
            level, text = 10 * int(line[1]), line[2:]
        last_output.append(text)
        log.log(level, "%s", text)


def _stop(processes: Sequence[subprocess.Popen[Any]]) -> None:
    """Ask the ranks to save and end, wait for them, and kill what is left."""
    if any(process.poll() is None for process in processes):
        log.info("asking the training process to save and stop")
    families = [member for process in processes for member in _family(process.pid)]
    until = time.monotonic() + _STOP_SECONDS
    try:
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in processes:
            process.wait(max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        log.error("the training process did not stop within %d s: killed", _STOP_SECONDS)
    finally:
        _kill(processes, families)


def _kill(processes: Sequence[subprocess.Popen[Any]], known: Sequence[psutil.Process] = ()) -> None:
    """Kill the ranks and all their children, also those that were `known` before."""
    families = [member for process in processes for member in _family(process.pid)]
    for member in [*known, *families]:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    for process in processes:
        process.wait()


def _family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return []
