"""Display of the progress of training: log lines, a live bar in a terminal, the loss curve."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from zeroflow.report import band, plots
from zeroflow.report.pages import never_fatal
from zeroflow.training.events import Done, Event, Metrics, Spike, Started
from zeroflow.training.job import TrainingJob
from zeroflow.training.metrics import METRICS, StepRecord
from zeroflow.training.pulse import Pulse
from zeroflow.units import duration, speed

log = logging.getLogger(__name__)

_LOG_SECONDS = 15.0
"""Minimum time between progress lines in the log."""

_PLOT_SECONDS = 60.0
"""Minimum time between two drawings of the loss curve."""

_SPIKE_SECONDS = 3600.0
"""Minimum time between two reports of a spike."""

_ALMOST = 0.999
"""Fraction shown while the last step is validated."""

_BAR_WIDTH = 16
"""Width of the live bar in characters, so that loss, speed and time left fit into 80 columns."""

Show = Callable[[float, str], None]
"""Receives the fraction done, from 0 to 1, and a line of text."""

console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)


class _Display:
    """Shows the progress of a phase: a live bar in a terminal, and occasional lines in the log."""

    def __init__(self, phase: str, show: Show) -> None:
        self._show_elsewhere = show
        self._logged = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(_BAR_WIDTH),
            TextColumn("{task.fields[text]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(f"{phase}: starting", total=None, text="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def move(self, label: str, done: int, total: int, text: str) -> None:
        """Move the bar.

        Args:
            label: text to the left of the bar.
            text: text to the right of the bar.
        """
        self._bar.update(self._task, description=label, completed=done, total=total, text=text)

    def tell(self, share: float, line: str, *, log_it: bool = False) -> None:
        """Show `line` elsewhere. Log it if `log_it`, or if nothing was logged for a while."""
        self._show_elsewhere(share, line)
        now = time.monotonic()
        if now - self._logged > _LOG_SECONDS or log_it:
            log.info("%s", line)
            self._logged = now


class TrainingProgress(_Display):
    """Shows the progress of training from its events.

    The bar moves with every step. Loss, speed and the time left change with every logged step. The
    time left is estimated from the speed of this process, including all pauses.
    """

    def __init__(self, show: Show = lambda share, text: None) -> None:
        """
        Args:
            show: called for every logged step, and during a validation.
        """
        super().__init__("training", show)
        self._step, self._steps = 0, 0
        self._first: StepRecord | None = None
        self._text = self._line = ""

    def __call__(self, event: Event | Pulse) -> None:
        match event:
            case Started():
                self._step, self._steps = event.step, event.steps
                self._move()
            case Pulse(phase="training"):
                self._step = event.done
                self._move()
            case Pulse() if self._steps:
                place = f"{event.done}/{event.total} after step {self._step}"
                self.move(event.phase, event.done, event.total, place)
                share = min(self._step / self._steps, _ALMOST)
                self.tell(share, f"{event.phase}: {place}")
            case Metrics(record=StepRecord() as record):
                self._show(record)
            case Done() if self._line:
                self._show_elsewhere(1.0, self._line)

    def _move(self) -> None:
        self.move(f"step {self._step}/{self._steps}", self._step, self._steps, self._text)

    def _show(self, record: StepRecord) -> None:
        # Without the first step, which is slow because it compiles and warms up
        self._first = self._first or record
        step = record.step
        done = step - self._first.step
        pace = (record.time - self._first.time) / done if done else None
        left = f"  ETA {duration(pace * (self._steps - step))}" if pace else ""
        rate = f"  {speed(record.tokens_per_second)}" if record.tokens_per_second else ""
        self._text = f"loss {record.loss:.4f}{rate}{left}"
        self._step = max(self._step, step)
        self._move()
        self._line = f"step {step}/{self._steps}  {self._text}"
        at_an_end = record is self._first or step == self._steps
        self.tell(step / self._steps, self._line, log_it=at_an_end)


class CheckProgress(_Display):
    """Shows the progress of a check from its pulses."""

    def __init__(self, check: str, show: Show = lambda share, text: None) -> None:
        super().__init__(check, show)
        self._check = check

    def __call__(self, event: Event | Pulse) -> None:
        if isinstance(event, Pulse) and event.phase == self._check:
            step = f"step {event.done}/{event.total}"
            self.move(f"{self._check}: {step}", event.done, event.total, event.text)
            self.tell(event.done / event.total, f"{self._check}: {step}  {event.text}")


class LossWatch:
    """Draws the training loss over that of earlier runs, once a minute.

    It warns when the run first leaves the band of those runs.
    """

    def __init__(
        self,
        job: TrainingJob,
        show: Callable[[Path], None],
        tell: Callable[[str], None] = lambda warning: None,
    ) -> None:
        """
        Args:
            show: called with every new plot.
            tell: called with the warning.
        """
        self._job, self._show, self._tell = job, show, tell
        self._expected = band.find(job)
        if self._expected:
            log.info("comparing the loss with earlier runs: %s", ", ".join(self._expected.runs))
        self._next = time.monotonic() + _PLOT_SECONDS
        self._warned = False

    def __call__(self, event: Event | Pulse) -> None:
        is_due = isinstance(event, Metrics) and time.monotonic() >= self._next
        if not (is_due or isinstance(event, Done)):  # a short run ends before it is due
            return
        records = METRICS.read(self._job.folder.metrics)
        if self._expected and not self._warned:
            verdict = self._expected.verdict(records)
            if verdict.since is not None:
                log.warning("loss is %s", verdict)
                self._tell(f"loss is {verdict}")
                self._warned = True
        if isinstance(event, Done):  # the report draws the last plot
            return
        with never_fatal("plot of the loss"):
            self._show(plots.loss_curve(self._job, records, self._expected))
        self._next = time.monotonic() + _PLOT_SECONDS


class SpikeWatch:
    """Reports steps that are unusual, at most once an hour: of a run that diverges, all are."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        """
        Args:
            tell: called with the description of a step.
        """
        self._tell, self._next = tell, time.monotonic()

    def __call__(self, event: Event | Pulse) -> None:
        if isinstance(event, Spike) and time.monotonic() >= self._next:
            self._tell(f"step {event.step:,}: {'; '.join(event.alarms)}")
            self._next = time.monotonic() + _SPIKE_SECONDS
