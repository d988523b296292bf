"""What a person sees while a run goes on: log lines, a live bar in a terminal, and the loss."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from zeroflow import records
from zeroflow.records import Line
from zeroflow.report import band, pictures
from zeroflow.training.job import TrainingJob
from zeroflow.units import duration, speed

log = logging.getLogger(__name__)


_LOG_SECONDS = 15.0


_PICTURE_SECONDS = 60.0


Show = Callable[[float, str], None]
"""Is told the share that is done, from 0 to 1, and a line about it."""


console = Console(highlight=False, soft_wrap=True)


class TrainingProgress:
    """Follows the events of a training: one log line now and then, a bar where there is a terminal.

    The time left is reckoned from the speed of this process, all pauses included.

    Args:
        show: is told of every logged step.
    """

    def __init__(self, show: Show = lambda share, text: None) -> None:
        self._show_elsewhere = show
        self._steps, self._logged = 0, 0.0
        self._first: Line | None = None
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

    def __call__(self, event: Line) -> None:
        if event["event"] == "started":
            self._steps = event["steps"]
            self._bar.update(self._task, total=self._steps, completed=event["step"])
        if event["event"] == "metrics" and "loss" in event:
            self._show(event)

    def _show(self, event: Line) -> None:
        # The first step is slower than all others: it compiles and warms up
        self._first = self._first or event
        step, now = event["step"], time.monotonic()
        done = step - self._first["step"]
        pace = (event["time"] - self._first["time"]) / done if done else None
        left = f"  ETA {duration(pace * (self._steps - step))}" if pace else ""
        rate = f"  {speed(event['tokens_per_second'])}" if event["tokens_per_second"] else ""
        text = f"step {step}/{self._steps}  loss {event['loss']:.4f}{rate}{left}"
        self._bar.update(self._task, completed=step, description=text)
        self._show_elsewhere(step / self._steps, text)
        if now - self._logged > _LOG_SECONDS or step == self._steps:
            log.info("%s", text)
            self._logged = now


class LossWatch:
    """Follows the events of a training: draws its loss over that of earlier runs once a minute.

    When the run leaves the band of the earlier ones it is said, once.

    Args:
        show: is told of every new picture.
    """

    def __init__(self, job: TrainingJob, show: Callable[[Path], None]) -> None:
        self._job, self._show = job, show
        self._expected = band.find(job)
        if self._expected:
            log.info("loss is compared with that of %s", ", ".join(self._expected.runs))
        self._next = time.monotonic() + _PICTURE_SECONDS
        self._said = False

    def __call__(self, event: Line) -> None:
        if event["event"] != "metrics" or time.monotonic() < self._next:
            return
        lines = records.read(self._job.folder.metrics)
        if self._expected and not self._said:
            verdict = self._expected.verdict(lines)
            if verdict.since is not None:
                log.warning("loss is %s", verdict)
                self._said = True
        try:
            self._show(pictures.loss_curve(self._job, lines, self._expected))
        except OSError as error:  # training needs no picture
            log.warning("the loss could not be drawn: %s", error)
        self._next = time.monotonic() + _PICTURE_SECONDS
