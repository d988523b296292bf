"""What every process that `job.launch` starts has in common: its job, its end and its last word."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from zeroflow import artifacts
from zeroflow.config import Config
from zeroflow.training import events
from zeroflow.training.job import LOGGED, WATCH_PARENT

_SAME_REQUEST_SECONDS = 1.0
_TAKE_OVER_SECONDS = 60.0

Job = TypeVar("Job", bound=Config)


class StopRequest:
    """Set by SIGTERM, SIGINT or the end of the parent; a later second signal ends at once."""

    def __init__(self, *, watch_parent: bool) -> None:
        self._since: float | None = None
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        if watch_parent:
            threading.Thread(target=self._wait_for_parent, daemon=True).start()

    def __bool__(self) -> bool:
        return self._since is not None

    def _on_signal(self, number: int, frame: object) -> None:
        # torchrun passes on a signal that a scheduler has sent to all processes: one request
        if self._since and time.monotonic() - self._since > _SAME_REQUEST_SECONDS:
            os._exit(128 + number)
        self._since = self._since or time.monotonic()

    def _wait_for_parent(self) -> None:
        while os.read(0, 4096):  # not sys.stdin, whose lock would be held at exit
            pass
        self._since = self._since or time.monotonic()


def main(job_type: type[Job], work: Callable[[Job, StopRequest], None]) -> None:
    """Do `work` on the job in the file that the command line names, alone in its directory.

    A failure is told to the parent through events.jsonl, as no exit code could.
    """
    logging.basicConfig(level=logging.INFO, format=f"{LOGGED}%(message)s", stream=sys.stderr)
    job_file = Path(sys.argv[1])
    job = job_type.model_validate_json(job_file.read_text(encoding="utf-8"))
    stop = StopRequest(watch_parent=WATCH_PARENT in sys.argv[2:])
    run_dir = job_file.parent
    try:
        with artifacts.exclusive(
            run_dir / "worker",
            waiting_for=f"another process works in {run_dir}",
            timeout_seconds=_TAKE_OVER_SECONDS,
        ):
            work(job, stop)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        events.append(run_dir / events.EVENTS, {"event": "failed", "message": message})
        raise
