"""Progress of a training for its user: log lines, a live bar in a terminal, and the loss curve."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from zeroflow.report import band, pictures
from zeroflow.report.pages import never_fatal
from zeroflow.training.events import Event, Metrics, Started
from zeroflow.training.job import TrainingJob
from zeroflow.training.metrics import METRICS, StepRecord
from zeroflow.units import duration, speed

log = logging.getLogger(__name__)

_LOG_SECONDS = 15.0

_PICTURE_SECONDS = 60.0

Show = Callable[[float, str], None]
"""Receives the fraction done, from 0 to 1, and a line of text."""

console = Console(highlight=False, soft_wrap=True)


class TrainingProgress:
    """Shows the events of a training as an occasional log line, and as a bar in a terminal.

    The time left is estimated from the speed of this process, including all pauses.
    """

    def __init__(self, show: Show = lambda share, text: None) -> None:
        """
        Args:
            show: called for every logged step.
        """
        self._show_elsewhere = show
        self._steps, self._logged = 0, 0.0
        self._first: StepRecord | None = None
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def __call__(self, event: Event) -> None:
        match event:
            case Started():
                self._steps = event.steps
                self._bar.update(self._task, total=self._steps, completed=event.step)
            case Metrics(record=StepRecord() as record):
                self._show(record)

    def _show(self, record: StepRecord) -> None:
        # Without the first step, which is the slowest, because it compiles and warms up
        self._first = self._first or record
        step, now = record.step, time.monotonic()
        done = step - self._first.step
        pace = (record.time - self._first.time) / done if done else None
        left = f"  ETA {duration(pace * (self._steps - step))}" if pace else ""
        rate = f"  {speed(record.tokens_per_second)}" if record.tokens_per_second else ""
        text = f"step {step}/{self._steps}  loss {record.loss:.4f}{rate}{left}"
        self._bar.update(self._task, completed=step, description=text)
        self._show_elsewhere(step / self._steps, text)
        if now - self._logged > _LOG_SECONDS or step == self._steps:
            log.info("%s", text)
            self._logged = now


class LossWatch:
    """Draws the loss of a training over that of earlier runs, once a minute.

    When the run first leaves the band of those runs, it logs a warning.
    """

    def __init__(self, job: TrainingJob, show: Callable[[Path], None]) -> None:
        """
        Args:
            show: called with every new picture.
        """
        self._job, self._show = job, show
        self._expected = band.find(job)
        if self._expected:
            log.info("comparing the loss with earlier runs: %s", ", ".join(self._expected.runs))
        self._next = time.monotonic() + _PICTURE_SECONDS
        self._warned = False

    def __call__(self, event: Event) -> None:
        if not isinstance(event, Metrics) or time.monotonic() < self._next:
            return
        records = METRICS.read(self._job.folder.metrics)
        if self._expected and not self._warned:
            verdict = self._expected.verdict(records)
            if verdict.since is not None:
                log.warning("loss is %s", verdict)
                self._warned = True
        with never_fatal("picture of the loss"):
            self._show(pictures.loss_curve(self._job, records, self._expected))
        self._next = time.monotonic() + _PICTURE_SECONDS
