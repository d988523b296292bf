"""Writes the progress of training to metrics.jsonl and events.jsonl."""

import logging
import math
import shlex
import time
from collections.abc import Iterable

from zeroflow.training import zero
from zeroflow.training.events import EVENTS, Event, Metrics, Skipped, Spike
from zeroflow.training.goodput import PhaseLedger
from zeroflow.training.health import Monitor, Reading
from zeroflow.training.job import TrainingJob
from zeroflow.training.loop import StepMetrics
from zeroflow.training.metrics import METRICS, Meter, MetricsRecord, StepRecord, ValidationRecord
from zeroflow.training.pulse import Pulse, PulseWriter
from zeroflow.training.state import TrainState
from zeroflow.training.validation import ValidationLoss

log = logging.getLogger("zeroflow.training")


class Recorder:
    """Writes records and events on rank 0, for the launcher to follow.

    All ranks call it, because some numbers combine all ranks.
    """

    def __init__(self, job: TrainingJob, ledger: PhaseLedger, *, step: int) -> None:
        """
        Args:
            step: step that training resumes from; 0 at the beginning.
        """
        self._job, self._ledger = job, ledger
        self.meter = Meter(job, ledger.account)
        self._pulses = PulseWriter(job.folder.alive)
        # A killed process may have logged steps after its last checkpoint. They are trained again,
        # and each step must have one record
        zero.on_rank0(lambda: METRICS.keep(job.folder.metrics, lambda r: 0 < step >= r.step))
        self._monitor = Monitor(entropy=job.shards.entropy, earlier=_readings(self.records()))

    def records(self) -> list[MetricsRecord]:
        """Return all records so far."""
        return METRICS.read(self._job.folder.metrics)

    def lowest_validation_loss(self) -> float:
        """Return the lowest validation loss of trained weights so far, or infinity."""
        losses = (r.val_loss for r in self.records() if isinstance(r, ValidationRecord) and r.step)
        return min(filter(math.isfinite, losses), default=math.inf)

    def event(self, event: Event) -> None:
        if zero.rank() == 0:
            EVENTS.append(self._job.folder.events, event)

    def progress(self, phase: str, done: int, total: int) -> None:
        """Report the progress of `phase` to the launcher."""
        if zero.rank() == 0:
            self._pulses(Pulse(phase, done, total))

    def alive(self) -> None:
        """Signal to the launcher that training makes progress."""
        if zero.rank() == 0:
            self._job.folder.alive.touch()

    def step(self, state: TrainState, metrics: StepMetrics) -> list[str]:
        """Log the step that was just trained. Reading its loss waits for the device.

        Returns:
            Descriptions of everything unusual about the step.
        """
        step, loss, grad_norm = state.step, metrics.loss.item(), metrics.grad_norm.item()
        account = self._ledger.book(step)
        rate = self.meter.rate(account)
        if not math.isfinite(loss + grad_norm):
            if zero.rank() == 0:
                log.warning("step %d: loss %s, gradient norm %s: no update", step, loss, grad_norm)
            self.event(Skipped(time=time.time(), step=step, skipped=int(state.skipped[1])))
            return []
        record = self.meter.step(state, metrics, account, rate)
        self._add(record)
        alarms = zero.on_rank0(lambda: self._monitor.alarms(*_readings([record])))
        if alarms and zero.rank() == 0:
            self._warn(step, alarms)
        return alarms

    def validation(
        self, step: int, loss: ValidationLoss, sample: str, bytes_per_token: float | None
    ) -> None:
        self._add(self.meter.validation(step, loss, sample, bytes_per_token))

    def _warn(self, step: int, alarms: list[str]) -> None:
        for alarm in alarms:
            log.warning("step %d: %s", step, alarm)
        folder = self._job.folder
        log.warning(
            "documents of the step: zeroflow documents --run %s --step %d --cache-dir %s",
            *(folder.name, step, shlex.quote(str(folder.cache.path))),
        )
        self.event(Spike(time=time.time(), step=step, alarms=alarms))

    def _add(self, record: MetricsRecord) -> None:
        if zero.rank() == 0:
            METRICS.append(self._job.folder.metrics, record)
            self.event(Metrics(record=record))


def _readings(records: Iterable[MetricsRecord]) -> list[Reading]:
    return [
        Reading(r.loss, r.grad_norm, r.update_ratio, r.first_epoch)
        for r in records
        if isinstance(r, StepRecord) and r.update_ratio is not None
    ]
