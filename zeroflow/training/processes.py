"""The processes of the ranks: start them, log their output, stop or kill them."""

import contextvars
import logging
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from zeroflow.training import checkpoint

log = logging.getLogger(__name__)

WATCH_PARENT = "--watch-parent"
"""Argument with which a rank stops when its parent dies."""

LOG_MARK = "\x1e"
"""First character of a line that a rank logs, to distinguish it from other output. It is followed
by a digit for the level, and the text."""

_STOP_SECONDS = 120.0
"""Time for a rank to finish its step and save."""

GRACE_SECONDS = 10.0
"""Time for the other ranks to end after one has failed."""

_POLL_SECONDS = 0.2

_LAST_LINES = 20
"""Number of output lines in an error message."""


class RankProcesses:
    """The processes of the ranks of a job, by rank."""

    def __init__(self) -> None:
        self.last_output: deque[str] = deque(maxlen=_LAST_LINES)
        """Last output lines of all ranks."""

        self._processes: list[subprocess.Popen[str]] = []
        self._readers: list[threading.Thread] = []

    def start(self, command: Sequence[str], environment: dict[str, str]) -> None:
        """Start the next rank."""
        process = subprocess.Popen(
            command,
            # Never written to. The kernel closes it when this process dies, also after SIGKILL, and
            # the rank notices
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches only this process, which stops the ranks
            env=environment,
        )
        self._processes.append(process)
        # In a copy of this context, from which Prefect knows which flow run a log line belongs to
        context = contextvars.copy_context()
        reader = threading.Thread(target=context.run, args=(self._log, process), daemon=True)
        reader.start()
        self._readers.append(reader)

    def exit_codes(self) -> list[int | None]:
        """Return the exit code of every rank; None for running ranks."""
        return [process.poll() for process in self._processes]

    def read_to_end(self) -> None:
        """Wait until all output of the ended ranks is logged."""
        for reader in self._readers:
            reader.join(timeout=5)

    def end_after_failure(self, checkpoints: Path) -> list[int | None]:
        """Kill the ranks that do not exit by themselves after one has failed.

        They get some time first: all may be reporting the same failure, and a checkpoint that is
        being written is the one to resume from.

        Returns:
            The exit code of every rank; None for ranks killed here.
        """
        began = time.monotonic()
        while None in (codes := self.exit_codes()):
            writing = checkpoint.unfinished(checkpoints)
            if time.monotonic() - began > (_STOP_SECONDS if writing else GRACE_SECONDS):
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
                assert process.stdin is not None
                process.stdin.close()
            for process in self._processes:
                process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            log.error("the ranks did not stop within %d s and were killed", _STOP_SECONDS)
        finally:
            self.kill(families)

    def kill(self, known: Sequence[psutil.Process] = ()) -> None:
        """Kill the ranks and all their children.

        Args:
            known: children found earlier, because those of an ended rank cannot be found any more.
        """
        for member in [*known, *self._families()]:
            try:
                member.kill()
            except psutil.NoSuchProcess:
                continue
        for process in self._processes:
            process.wait()

    def _families(self) -> list[psutil.Process]:
        found: list[psutil.Process] = []
        for process in self._processes:
            try:
                parent = psutil.Process(process.pid)
                found += [*parent.children(recursive=True), parent]
            except psutil.NoSuchProcess:
                continue
        return found

    def _log(self, process: subprocess.Popen[str]) -> None:
        """Log the rank's log lines at their level; other output, such as tracebacks, as DEBUG."""
        assert process.stdout is not None
        for line in map(str.rstrip, process.stdout):
            level, text = logging.DEBUG, line
            if line.startswith(LOG_MARK) and line[1:2].isdigit():
                level, text = 10 * int(line[1]), line[2:]
            self.last_output.append(text)
            log.log(level, "%s", text)


@contextmanager
def rank_processes(
    module: str, job_file: Path, environments: Sequence[dict[str, str]]
) -> Iterator[RankProcesses]:
    """Run `python -m module job_file` as a rank for each of `environments` until the block ends.

    No process of a rank remains after the block, even if Ctrl-C or SIGTERM ended it.
    """
    ranks = RankProcesses()
    try:
        for environment in environments:
            command = [sys.executable, "-m", module, str(job_file), WATCH_PARENT]
            ranks.start(command, environment)
        yield ranks
        ranks.read_to_end()
    finally:
        ranks.stop()
