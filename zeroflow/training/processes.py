"""The processes of the ranks: start them, give them jobs, log their output, stop or kill them.

A process is `python -m zeroflow.training.serving`, and works on one job after another, so that the
libraries are imported, and the device is opened, only once for the stages of a run. `kept_ranks`
keeps processes between two jobs; a command starts them ahead of the first. A process whose job has
failed ends, and the next job gets a new one.
"""

import atexit
import contextvars
import logging
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

import psutil
from pydantic import Field

from zeroflow.config import Config
from zeroflow.run_folder import Cache
from zeroflow.training import interpreter
from zeroflow.training.environment import Place

log = logging.getLogger(__name__)

LOG_MARK = "\x1e"
"""First character of a line that a rank logs, to distinguish it from other output. It is followed
by a digit for the level, and the text."""

DONE = f"{LOG_MARK}done"
"""Line with which a rank reports that its job has succeeded and that it waits for another one."""

_STOP_SECONDS = 120.0
"""Time for a rank to finish its step and save."""

GRACE_SECONDS = 10.0
"""Time for the other ranks to end after one has failed."""

_POLL_SECONDS = 0.2

_LAST_LINES = 20
"""Number of output lines in an error message."""


_MOST_AHEAD = 16
"""Most ranks that are started before their number is checked. A machine has up to 16 GPUs."""

_RUN_MODULES = (
    "zeroflow.checks.preflight",
    "zeroflow.training",
    "zeroflow.checks.overfit",
    "torch._dynamo",  # PyTorch's optimisers import it
)
"""Modules that the ranks of a run import before their first job."""


class Task(Config):
    """A line on a rank's standard input: import a module, or run it as the program of a job."""

    module: str
    job_file: Path | None = None
    """None to only import the module, ahead of a job."""

    environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the job."""


class RankProcess:
    """The process of one rank, which works on one job after another."""

    def __init__(self, place: Place, label: Path) -> None:
        """
        Args:
            label: folder that the process works for; it is shown by `ps`.
        """
        self.place = place
        self._output: deque[str] = deque(maxlen=_LAST_LINES)
        self._done = False
        # In a copy of this context, from which Prefect knows which flow run a log line belongs to
        self._context = contextvars.copy_context()
        self.process = subprocess.Popen(
            [sys.executable, "-m", interpreter.__name__, "zeroflow.training.serving", str(label)],
            # The kernel closes it when this process dies, also after SIGKILL, and the rank notices
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches only this process, which stops the ranks
            env=place.environment(),
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def prepare(self, module: str) -> None:
        """Import `module` ahead of a job."""
        self._send(Task(module=module))

    def begin(self, task: Task, output: deque[str]) -> None:
        """Begin a job; its last lines of output go to `output`."""
        self._done, self._output = False, output
        self._context = contextvars.copy_context()
        self._send(task)

    def exit_code(self) -> int | None:
        """Return 0 if the job has succeeded, the exit code if the process ended, otherwise None."""
        return 0 if self._done else self.process.poll()

    def ask_to_stop(self) -> None:
        assert self.process.stdin is not None
        with suppress(OSError):  # it died before it read its last task
            self.process.stdin.close()

    def read_to_end(self) -> None:
        """Wait until all output of the job is logged, if the process has ended."""
        if not self._done:
            self._reader.join(timeout=5)

    def family(self) -> list[psutil.Process]:
        """Return the process and its children, if it runs."""
        try:
            parent = psutil.Process(self.process.pid)
            return [*parent.children(recursive=True), parent]
        except psutil.NoSuchProcess:
            return []

    def _send(self, task: Task) -> None:
        assert self.process.stdin is not None
        with suppress(OSError):  # the process has died, as its exit code tells
            self.process.stdin.write(f"{task.model_dump_json()}\n")
            self.process.stdin.flush()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in map(str.rstrip, self.process.stdout):
            if line == DONE:
                self._done = True
            else:
                self._context.run(self._log, line)

    def _log(self, line: str) -> None:
        """Log the rank's log lines at their level; other output, such as tracebacks, as DEBUG."""
        level, text = logging.DEBUG, line
        if line.startswith(LOG_MARK) and line[1:2].isdigit():
            level, text = 10 * int(line[1]), line[2:]
        self._output.append(text)
        log.log(level, "%s", text)


class RankProcesses:
    """The processes of the ranks of a job, by rank."""

    def __init__(self, processes: Sequence[RankProcess]) -> None:
        self._processes = processes
        self.last_output: deque[str] = deque(maxlen=_LAST_LINES)
        """Last output lines of all ranks."""

    def begin(self, task: Task) -> None:
        for process in self._processes:
            process.begin(task, self.last_output)

    def exit_codes(self) -> list[int | None]:
        """Return the exit code of every rank; 0 after success, None for running ranks."""
        return [process.exit_code() for process in self._processes]

    def read_to_end(self) -> None:
        """Wait until all output of the ended ranks is logged."""
        for process in self._processes:
            process.read_to_end()

    def end_after_failure(self, is_writing: Callable[[], bool]) -> list[int | None]:
        """Kill the ranks that do not exit by themselves after one has failed.

        They get some time first: all may be reporting the same failure, and a checkpoint that is
        being written is the one to resume from.

        Args:
            is_writing: returns True while a checkpoint is being written.

        Returns:
            The exit code of every rank; None for ranks killed here.
        """
        began = time.monotonic()
        while None in (codes := self.exit_codes()):
            patience = _STOP_SECONDS if is_writing() else GRACE_SECONDS
            if time.monotonic() - began > patience:
                break
            time.sleep(_POLL_SECONDS)
        self.kill()
        return codes

    def stop(self) -> None:
        """Ask the ranks to save and exit, wait for them, and kill the rest."""
        if None in self.exit_codes():
            log.info("asking the ranks to save a checkpoint and stop")
        families = self._families()
        until = time.monotonic() + _STOP_SECONDS
        try:
            for process in self._processes:
                process.ask_to_stop()
            while None in self.exit_codes():
                if time.monotonic() > until:
                    log.error("the ranks did not stop within %d s and were killed", _STOP_SECONDS)
                    break
                time.sleep(_POLL_SECONDS)
        finally:
            self.kill(families)

    def kill(self, known: Sequence[psutil.Process] = ()) -> None:
        """Kill the ranks and all their children.

        Args:
            known: children found earlier, because those of an ended rank can no longer be found.
        """
        for member in [*known, *self._families()]:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        for process in self._processes:
            process.process.wait()

    def _families(self) -> list[psutil.Process]:
        return [member for process in self._processes for member in process.family()]


class KeptRanks:
    """Processes that wait for a job: started ahead of one, or kept after one."""

    def __init__(self) -> None:
        self._waiting: list[RankProcess] = []

    def start(self, places: Sequence[Place], label: Path, *modules: str) -> None:
        """Start the processes for `places` that do not wait yet, and import `modules` in all."""
        for process in self.take(places, label):
            self._waiting.append(process)
            for module in modules:
                process.prepare(module)

    def start_for_run(self, cache: Cache, run: str | None, ranks: int) -> None:
        """Start the ranks of a run ahead of its first job, with the modules that it needs.

        Args:
            run: its name, if it is known. A run that was trained is probably complete, and then
                nothing is started.
        """
        if ranks > _MOST_AHEAD or (run and cache.run(run).training.exists()):
            return
        places = [Place(rank, ranks, cache.compiled) for rank in range(ranks)]
        self.start(places, cache.path, *_RUN_MODULES)

    def take(self, places: Sequence[Place], label: Path) -> list[RankProcess]:
        """Return a process for each place: one that waits, or a new one.

        Processes that wait at other places are ended.

        Args:
            label: folder of the run, which `ps` shows for new processes.
        """
        fit = {p.place: p for p in self._waiting if p.place in places and p.alive}
        self._waiting = [p for p in self._waiting if p not in fit.values()]
        self.end()
        return [fit.get(place) or RankProcess(place, label) for place in places]

    def keep(self, processes: Sequence[RankProcess]) -> None:
        self._waiting += processes

    def end(self) -> None:
        """End the waiting processes. They are killed, because they have nothing to save."""
        RankProcesses(self._waiting).kill()
        self._waiting = []


_kept: ContextVar[KeptRanks | None] = ContextVar("kept ranks", default=None)


@contextmanager
def kept_ranks() -> Iterator[KeptRanks]:
    """Keep the processes of launches in the block for the next launch, until the block ends.

    A block inside another one uses the same processes, and ends them as well.
    """
    kept = _kept.get() or KeptRanks()
    token = _kept.set(kept)
    try:
        yield kept
    finally:
        _kept.reset(token)
        kept.end()


@contextmanager
def new_ranks() -> Iterator[None]:
    """Start new processes for each launch in the block, and keep none of them."""
    token = _kept.set(None)
    try:
        yield
    finally:
        _kept.reset(token)


def keep_from_now() -> KeptRanks:
    """Keep processes until the end of the next block of `kept_ranks`, or of the program."""
    kept = KeptRanks()
    _kept.set(kept)
    atexit.register(kept.end)
    return kept


@contextmanager
def rank_processes(places: Sequence[Place], label: Path) -> Iterator[RankProcesses]:
    """Yield a process for each of `places` until the block ends.

    A single rank that has succeeded waits for the next job if the block is in `kept_ranks`.
    Otherwise no process remains after the block, even if Ctrl-C or SIGTERM ended it.
    """
    kept = _kept.get()
    processes = (kept or KeptRanks()).take(places, label)
    ranks = RankProcesses(processes)
    succeeded = False
    try:
        yield ranks
        ranks.read_to_end()
        succeeded = set(ranks.exit_codes()) == {0}
    finally:
        # Several ranks would have to form a new process group for each job
        if kept and succeeded and len(processes) == 1:
            kept.keep(processes)
        else:
            ranks.stop()
