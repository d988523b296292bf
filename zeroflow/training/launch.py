"""TODO docstring."""

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

from zeroflow import artifacts, records
from zeroflow.run_folder import RunFolder
from zeroflow.tracking.tracker import Tracker
from zeroflow.training import checkpoint, zero
from zeroflow.training.job import (
    RunIsBusy,
    TrainingFailed,
    TrainingJob,
    TrainingStopped,
    TrainResult,
    finished,
)

log = logging.getLogger(__name__)


WATCH_PARENT = "--watch-parent"


LAUNCHED = "ZEROFLOW_LAUNCHED"
"""Environment variable with the time at which the child was launched."""


LOGGED = "\x1e"
"""Begins each line that a child logs, and tells it from what else is printed there; a digit for
its level follows, and its text."""


_STOP_SECONDS = 120.0


_GRACE_SECONDS = 10.0


_POLL_SECONDS = 0.2


_LAST_LINES = 20


_KILLED = (-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS)
"""Exit codes of what did not end by itself. A rank that finds another gone aborts, otherwise."""


_ROOM_TO_SPEAK = 2**20
"""Bytes that the disk should have left, or a process could not write down why it failed."""


def train(
    job: TrainingJob, on_event: Callable[[records.Line], None] = lambda event: None
) -> TrainResult:
    """Train in a process of its own, going on from the newest checkpoint, and tell MLflow of it.

    Args:
        on_event: called here with every new line of events.jsonl.

    Raises:
        TrainingFailed: with the process's own reason, or its last output.
        TrainingStopped: it was stopped from outside after writing a checkpoint.
    """
    artifacts.write_json(job.folder.job, job.model_dump(mode="json"))
    with _tracked(job) as begin:

        def follow(line: records.Line) -> None:
            if line["event"] == "started":
                begin()
            on_event(line)

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
    """What has MLflow follow the training from now on, until the block ends.

    It is called once the process has started, as that drops lines of metrics.jsonl that come again.
    """
    tracker: Tracker | None = None
    status = "KILLED"

    def begin() -> None:
        nonlocal tracker
        metrics = records.Tail(job.folder.metrics)
        tracker = Tracker(job.tracking, job.folder, metrics.new_lines)

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
    on_event: Callable[[records.Line], None],
    *,
    ranks: int = 1,
    hang_seconds: int | None = None,
    compile_cache: Path | None = None,
) -> None:
    """Run `python -m module job_file`, once for every rank, until all end well.

    Their output goes to this module's logger. If this process is interrupted, they are asked to
    stop and waited for; if this process dies, they notice and stop by themselves. If one fails, the
    others, which would wait for it, are ended.

    Args:
        job_file: in the folder of the run.
        hang_seconds: without a sign of life, after which it is killed; None waits for ever.
        compile_cache: where compiled code is kept; None, or the user's environment, for elsewhere.

    Raises:
        RunIsBusy: another process has launched one for this run and is there still.
        TrainingFailed: with the process's own reason, or its last output.
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
        RunIsBusy: another process holds it; says what was `found`.
    """
    with ExitStack() as held:
        try:
            held.enter_context(artifacts.exclusive(lock, timeout_seconds=0))
        except TimeoutError as error:
            raise RunIsBusy(f"{found}: wait for its end, or use another --run-name") from error
        yield


@contextmanager
def ownership() -> Iterator[Callable[[Path], None]]:
    """What makes the directory of a run this process's own until the block ends.

    It raises `RunIsBusy` where another process owns it; with that one's end it is free.
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
    on_event: Callable[[records.Line], None],
    hang_seconds: int | None,
    environments: Sequence[dict[str, str]],
) -> None:
    folder = RunFolder(job_file.parent)
    tail = records.Tail(folder.events, records.size(folder.events))
    outcome: records.Line = {"event": "nothing"}

    def follow() -> None:
        nonlocal outcome
        for line in tail.new_lines():
            if outcome["event"] != "failed":  # what comes after the first failure follows from it
                outcome = line
            on_event(line)

    signs = _SignsOfLife(folder.alive)
    with _children(module, job_file, environments) as (processes, last_output):
        while None in (codes := [process.poll() for process in processes]):
            follow()
            if hang_seconds and signs.seconds_since_last() > hang_seconds:
                _kill(processes)
                raise TrainingFailed(
                    f"{module} has shown no sign of life for {hang_seconds} s: killed", "hang"
                )
            if any(codes):  # the others wait for it
                codes = _end(processes, folder.checkpoints)
                break
            time.sleep(_POLL_SECONDS)
    follow()
    ended = f"{module} ended with exit code {next(filter(None, codes), 0)}"
    if len(codes) > 1:
        told = (f"{rank}: {'none' if c is None else c}" for rank, c in enumerate(codes))
        ended = f"{module} ended on some rank (exit codes by rank: {', '.join(told)})"
        killed = [rank for rank, code in enumerate(codes) if code in _KILLED]
        if killed and outcome.get("rank") not in killed:
            outcome = {"event": "nothing"}  # what others say is that it is gone
    match outcome["event"]:
        case "done":
            return
        case "failed":
            raise TrainingFailed(outcome["message"], outcome["reason"], outcome["step"])
        case "stopped":
            raise TrainingStopped(outcome["message"])
    if (free := shutil.disk_usage(folder.path).free) < _ROOM_TO_SPEAK:
        raise TrainingFailed(
            f"{module} ended, and the disk of {folder.path} has {free} bytes left: free some, or "
            "move the cache (--cache-dir)"
        )
    said = "\n".join([" Its last output:", *last_output]) if last_output else ""
    raise TrainingFailed(
        f"{ended} and said nothing of why; killed, or out of memory?{said}",
        "killed",
    )


def _end(processes: Sequence[subprocess.Popen[Any]], checkpoints: Path) -> list[int | None]:
    """Kill what does not end by itself now that a rank has failed; exit codes from before that.

    A failure of all is told by one after the other, and a checkpoint that is being written is what
    the next start goes on from.
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
    """Watches for changes of the file that training touches, by this process's own clock.

    Times of files are compared with each other only: a clock that is set changes nothing.
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
                stdin=subprocess.PIPE,  # never written to: its end tells the child that we are gone
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C is for this process, which then stops it in order
                env=environment,
            )
            processes.append(process)
            # in this context, as Prefect finds the flow run that a log line belongs to there
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
    # Else glibc gives every large tensor back to the kernel, page by page: a fifth of a CPU's step
    kept = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    if compile_cache is not None:
        # PyTorch's is a temporary folder of the user, which may be gone after a reboot
        names = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
        kept |= {name: str(compile_cache / folder) for name, folder in names.items()}
    given = dict(os.environ)
    if compile_cache is not None and not Path(cache_from_source(torch.__file__)).exists():
        # A container may keep no bytecode: then every process compiles PyTorch's sources first
        given.pop("PYTHONDONTWRITEBYTECODE", None)
        kept["PYTHONPYCACHEPREFIX"] = str(compile_cache / "python")
    return kept | given | {"PYTHONUNBUFFERED": "1", LAUNCHED: str(time.time())}


def _pass_on(process: subprocess.Popen[str], last_output: deque[str]) -> None:
    """Log what the child logs. All else, warnings of libraries and tracebacks, is for --verbose."""
    assert process.stdout is not None
    for line in map(str.rstrip, process.stdout):
        level, text = logging.DEBUG, line
        if line.startswith(LOGGED) and line[1:2].isdigit():
            level, text = 10 * int(line[1]), line[2:]
        last_output.append(text)
        log.log(level, "%s", text)


def _stop(processes: Sequence[subprocess.Popen[Any]]) -> None:
    """Ask them to save and end, wait for it, and leave nothing behind."""
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
    """End them and all their children, those that were `known` before included."""
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
