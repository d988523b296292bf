"""Extension of a run to more steps than planned.

The run's job records two facts about the steps before the extension: their schedule, so that the
learning rate rises from its last value instead of jumping, and the rows that they read, so that
rows that were not read come first.
"""

import logging
from collections.abc import Iterator

import numpy as np
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from zeroflow.config import Config
from zeroflow.data.order import Segment
from zeroflow.training import checkpoint, recovery
from zeroflow.training.job import TrainingJob, read_job
from zeroflow.training.schedule import Earlier, Schedule
from zeroflow.units import count

log = logging.getLogger("zeroflow.training")

_JUMP = 1.05
"""Ratio of learning rates above which an extension is said to raise the rate."""


class Extension(Config):
    """An extension of a run to more steps, and the learning rate around it."""

    step: PositiveInt
    """Number of steps that were trained before the extension."""

    planned: PositiveInt
    """Number of steps of the run before the extension."""

    steps: PositiveInt
    """Number of steps of the run after the extension."""

    last: NonNegativeFloat
    """Learning rate of the last step before the extension."""

    next: NonNegativeFloat
    """Learning rate after the second warm-up."""

    warmup_steps: NonNegativeInt
    """Length of the second warm-up."""

    def __str__(self) -> str:
        rate = f"the learning rate stays at {self.next:.3g}"
        if self.next > _JUMP * self.last:
            within = f"rises within {count(self.warmup_steps, 'step')}"
            how = within if self.warmup_steps else "jumps"
            rate = f"the learning rate {how} from {self.last:.3g} to {self.next:.3g}"
        return (
            f"extended at step {self.step:,} from {self.planned:,} to {self.steps:,} steps: {rate}"
        )


def extensions(schedule: Schedule) -> Iterator[Extension]:
    """Yield the extensions of a run, oldest first."""
    if (before := schedule.before) is None:
        return
    yield from extensions(before.schedule)
    warmup = schedule.warmup_steps
    yield Extension(
        step=before.steps,
        planned=before.schedule.steps,
        steps=schedule.steps,
        last=schedule.learning_rate(before.steps - 1),
        next=schedule.learning_rate(min(before.steps + warmup, schedule.steps - 1)),
        warmup_steps=warmup,
    )


def extended(planned: TrainingJob) -> TrainingJob:
    """Return `planned` with the recorded schedule and segments of the steps so far.

    If `planned` has more steps or rows than the recorded job, the run is extended at its newest
    checkpoint, and the consequences are logged.

    Raises:
        ValueError: the recorded job cannot be read.
    """
    step = checkpoint.newest_step(planned.folder.checkpoints)
    if not step or not planned.folder.job.exists():
        return planned  # nothing has been trained yet
    before = read_job(planned.folder)
    segments, schedule = _segments(before, planned, step), planned.training.schedule
    if schedule.steps > before.training.steps:
        schedule = schedule.replace(before=Earlier(schedule=before.training.schedule, steps=step))
        _log(before, planned, schedule)
    else:
        schedule = schedule.replace(before=before.training.schedule.before)
    training = planned.training.replace(schedule=schedule)
    return planned.replace(training=training, segments=segments)


def _segments(before: TrainingJob, planned: TrainingJob, step: int) -> tuple[Segment, ...]:
    whole = Segment(batch=0, rows=before.shards.train.rows)
    recorded, rows = before.segments or (whole,), planned.shards.train.rows
    if rows <= recorded[-1].rows or planned.shards.path.name != before.shards.path.name:
        return before.segments
    # In the order of `before`, skips included: a roll-back shifts the batches of later steps
    batch = int(recovery.current(before).order.batches(np.array([step]))[0])
    earlier = [segment for segment in recorded if segment.batch < batch]
    return (*earlier, Segment(batch=batch, rows=rows))


def _log(before: TrainingJob, planned: TrainingJob, schedule: Schedule) -> None:
    *_, extension = extensions(schedule)
    log.info("the run is %s", extension)
    if extension.next > _JUMP * extension.last:
        log.warning(
            "the learning rate had decayed to %.3g, so the loss may rise before it falls again; "
            "with --schedule wsd the rate stays the same if a run is stopped before its decay, the "
            "last 20 %% of the steps, and then gets more --max-steps",
            extension.last,
        )
    if (rows := planned.shards.train.rows) > before.shards.train.rows:
        log.info(
            "%s training rows instead of %s: rows that this epoch has not read yet come first",
            f"{rows:,}",
            f"{before.shards.train.rows:,}",
        )
    if planned.cadence != before.cadence:
        cadence = planned.cadence
        log.info(
            "intervals from now on: a validation every %s, a checkpoint every %s",
            *(count(steps, "step") for steps in (cadence.validate_, cadence.checkpoint)),
        )
