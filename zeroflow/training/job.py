"""What a training process is given, and how it is started, watched and stopped.

Training always runs in a process of its own: GPU memory is returned at its exit, and a crash or an
out-of-memory kill leaves the flow alive to say so. torchrun is not between them: one process has
nobody to meet, and torchrun takes seconds to start and is one more that can be killed.
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
from typing import Any, Literal

import psutil
import torch
from pydantic import PositiveInt

from zeroflow import artifacts
from zeroflow.config import Config
from zeroflow.data.batches import Skip
from zeroflow.data.shards import ShardSet
from zeroflow.data.tokenizer import TokenizerFiles
from zeroflow.generate import SamplingConfig
from zeroflow.model.llama import ModelConfig
from zeroflow.reuse import StageResult
from zeroflow.tracking import Tracker, TrackingConfig
from zeroflow.training import checkpoint, events, zero
from zeroflow.training.checkpoint import Retention
from zeroflow.training.loop import TrainingConfig

log = logging.getLogger(__name__)

RESULT = "training.json"
WATCH_PARENT = "--watch-parent"
LAUNCHED = "ZEROFLOW_LAUNCHED"
"""Environment variable with the time at which the child was launched."""

LOGGED = "\x1e"
"""Begins each line that a child logs, and tells it from what else is printed there; a digit for
its level follows, and its text."""

JOB = "job.json"
CHECKPOINTS = "checkpoints"
_STOP_SECONDS = 120.0
_GRACE_SECONDS = 10.0
_POLL_SECONDS = 0.2
_LAST_LINES = 20
_KILLED = (-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS)
"""Exit codes of what did not end by itself. A rank that finds another gone aborts, otherwise."""

_ROOM_TO_SPEAK = 2**20
"""Bytes that the disk should have left, or a process could not write down why it failed."""

FailureReason = Literal["killed", "hang", "out of memory", "diverged", "error"]
"""killed: it ended without a word. diverged: its numbers went wrong."""


class Cadence(Config):
    """After how many steps something is done."""

    log: PositiveInt
    validate_: PositiveInt
    checkpoint: PositiveInt


class RankJob(Config):
    """What ranks have to know of any job to do it together."""

    run_dir: Path
    model: ModelConfig
    training: TrainingConfig


class TrainingJob(RankJob):
    """Everything the training processes of a run need."""

    cadence: Cadence
    retention: Retention
    hang_seconds: PositiveInt
    """Without a finished step, validation or checkpoint, after which it is taken for hung."""

    roll_back_spikes: bool
    skips: tuple[Skip, ...] = ()
    """Windows of the data that are left out."""

    shards: ShardSet
    validation_rows: PositiveInt
    """Rows in a validation, the first of those that are held out."""

    tokenizer: TokenizerFiles
    prompt: str
    sampling: SamplingConfig
    tracking: TrackingConfig
    compile_cache: Path | None = None
    """Where compiled code is kept; None where PyTorch keeps it."""

    peak_flops: float | None
    """Of all devices, dense, in bf16, also where products are in fp8; None if it is unknown, or the
    run in fp32: then no MFU is given."""

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / CHECKPOINTS


class TrainResult(StageResult):
    """What a finished training leaves in training.json."""

    checkpoint: Path
    steps: int
    tokens: int
    train_loss: float
    val_loss: float
    val_bpb: float | None
    first_val_loss: float
    """Before the first step."""

    tokens_per_second: float | None
    """Over the seconds of all steps but the first of a process: see `goodput.TRAINING`. None where
    there were no others."""

    mfu: float | None
    peak_memory_bytes: int
    sample: str


class TrainingFailed(RuntimeError):
    """A training process ended by an error, or was ended."""

    def __init__(
        self, message: str, reason: FailureReason = "error", step: int | None = None
    ) -> None:
        """
        Args:
            step: that the numbers went wrong at.
        """
        super().__init__(message)
        self.reason, self.step = reason, step
        self.will_retry = False
        """Whether something was changed, so that another start has a chance."""

    def add_advice(self, advice: str) -> None:
        if advice:
            self.args = (f"{self}\n{advice}",)


class RunIsBusy(TrainingFailed):
    """Another process has launched one for this run and is there still."""


class TrainingStopped(RuntimeError):
    """A training process was asked to stop, and did so in order."""


def finished(job: TrainingJob) -> TrainResult | None:
    """The result of this job, if it was trained to its last step before."""
    result = _result(job)
    done = result and result.steps == job.training.steps and result.checkpoint.exists()
    return result if done else None


def why_trained(job: TrainingJob, others: Callable[[], str]) -> str:
    """Why a job that is not finished is not, or from where it goes on.

    Args:
        others: says why no other run serves.
    """
    step = checkpoint.newest_step(job.checkpoints)
    newest = f"its newest checkpoint is of step {step:,} of {job.training.steps:,}"
    if (result := _result(job)) and result.steps < job.training.steps and step:
        return f"it was trained to step {result.steps:,}, and more are asked for: {newest}"
    if result and not result.checkpoint.exists():
        return f"{result.checkpoint.name} is gone: {newest if step else 'no checkpoint is left'}"
    if step:
        return f"it was not trained to its end: {newest}"
    if (job.run_dir / JOB).exists():
        return "it was started before, and ended without a checkpoint"
    return others()


def _result(job: TrainingJob) -> TrainResult | None:
    path = job.run_dir / RESULT
    return TrainResult.model_validate(artifacts.read_json(path)) if path.exists() else None


def train(
    job: TrainingJob, on_event: Callable[[events.Line], None] = lambda event: None
) -> TrainResult:
    """Train in a process of its own, going on from the newest checkpoint, and tell MLflow of it.

    Args:
        on_event: called here with every new line of events.jsonl.

    Raises:
        TrainingFailed: with the process's own reason, or its last output.
        TrainingStopped: it was stopped from outside after writing a checkpoint.
    """
    job_file = job.run_dir / JOB
    artifacts.write_json(job_file, job.model_dump(mode="json"))
    with _tracked(job) as begin:

        def follow(line: events.Line) -> None:
            if line["event"] == "started":
                begin()
            on_event(line)

        launch(
            "zeroflow.training",
            job_file,
            job.run_dir,
            follow,
            ranks=job.training.ranks,
            hang_seconds=job.hang_seconds,
            compile_cache=job.compile_cache,
        )
    if (result := finished(job)) is None:
        raise TrainingFailed(f"training ended without a result in {job.run_dir / RESULT}")
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
        metrics = events.Tail(job.run_dir / events.METRICS)
        tracker = Tracker(job.tracking, job.run_dir, metrics.new_lines)

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
    run_dir: Path,
    on_event: Callable[[events.Line], None],
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
        hang_seconds: without a sign of life, after which it is killed; None waits for ever.
        compile_cache: where compiled code is kept; None, or the user's environment, for elsewhere.

    Raises:
        RunIsBusy: another process has launched one for this run and is there still.
        TrainingFailed: with the process's own reason, or its last output.
    """
    with alone(run_dir / "launch", f"another process is at work on run {run_dir.name}"):
        meeting = zero.meeting_place(run_dir)
        environments = [
            _environment(compile_cache) | zero.environment(rank, ranks, meeting)
            for rank in range(ranks)
        ]
        try:
            _launch(module, job_file, run_dir, on_event, hang_seconds, environments)
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

        def own(run_dir: Path) -> None:
            if run_dir not in owned:
                found = f"another process is at work on run {run_dir.name}"
                held.enter_context(alone(run_dir / "owner", found))
                owned.add(run_dir)

        yield own


def _launch(
    module: str,
    job_file: Path,
    run_dir: Path,
    on_event: Callable[[events.Line], None],
    hang_seconds: int | None,
    environments: Sequence[dict[str, str]],
) -> None:
    tail = events.Tail(run_dir / events.EVENTS, events.size(run_dir / events.EVENTS))
    outcome: events.Line = {"event": "nothing"}

    def follow() -> None:
        nonlocal outcome
        for line in tail.new_lines():
            if outcome["event"] != "failed":  # what comes after the first failure follows from it
                outcome = line
            on_event(line)

    signs = _SignsOfLife(run_dir)
    with _children(module, job_file, environments) as (processes, last_output):
        while None in (codes := [process.poll() for process in processes]):
            follow()
            if hang_seconds and signs.seconds_since_last() > hang_seconds:
                _kill(processes)
                raise TrainingFailed(
                    f"{module} has shown no sign of life for {hang_seconds} s: killed", "hang"
                )
            if any(codes):  # the others wait for it
                codes = _end(processes, run_dir)
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
    if (free := shutil.disk_usage(run_dir).free) < _ROOM_TO_SPEAK:
        raise TrainingFailed(
            f"{module} ended, and the disk of {run_dir} has {free} bytes left: free some, or move "
            "the cache (--cache-dir)"
        )
    said = "\n".join([" Its last output:", *last_output]) if last_output else ""
    raise TrainingFailed(
        f"{ended} and said nothing of why; killed, or out of memory?{said}",
        "killed",
    )


def _end(processes: Sequence[subprocess.Popen[Any]], run_dir: Path) -> list[int | None]:
    """Kill what does not end by itself now that a rank has failed; exit codes from before that.

    A failure of all is told by one after the other, and a checkpoint that is being written is what
    the next start goes on from.
    """
    began = time.monotonic()
    while None in (codes := [process.poll() for process in processes]):
        writing = any((run_dir / CHECKPOINTS).glob(".step-*.partial"))
        if time.monotonic() - began > (_STOP_SECONDS if writing else _GRACE_SECONDS):
            break
        time.sleep(_POLL_SECONDS)
    _kill(processes)
    return codes


class _SignsOfLife:
    """Watches for changes of the file that training touches, by this process's own clock.

    Times of files are compared with each other only: a clock that is set changes nothing.
    """

    def __init__(self, run_dir: Path) -> None:
        self._file, self._seen, self._since = run_dir / events.ALIVE, 0, time.monotonic()

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
