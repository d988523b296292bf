"""Learning rate as a function of the step.

To add a schedule, add its name to `ScheduleName` and its decay to `_DECAYS`.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, Self

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from zeroflow.config import Config
from zeroflow.records import omitted
from zeroflow.units import count

ScheduleName = Literal["cosine", "wsd"]


class Schedule(Config):
    """Linear warm-up to `peak`, then a decay to 0 at `steps`.

    A run that was extended warms up a second time: from its last learning rate to that of the new
    decay.
    """

    name: ScheduleName
    """Shape of the decay."""

    peak: PositiveFloat
    warmup_steps: NonNegativeInt
    steps: PositiveInt
    before: "Earlier | None" = omitted()
    """Schedule before the run was extended; None if it was not."""

    @model_validator(mode="after")
    def _warmup_ends(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"--warmup-steps {self.warmup_steps} leaves none of {count(self.steps, 'step')}: "
                "lower it or raise --max-steps"
            )
        return self

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of step `step`, counted from 0; positive for every step."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        decayed = _DECAYS[self.name].learning_rate(self, self.steps - step)
        before = self.before
        if before is None or before.steps < self.warmup_steps:
            return decayed
        if step < before.steps:
            return before.schedule.learning_rate(step)
        if (warm := step - before.steps + 1) >= self.warmup_steps:
            return decayed
        # Re-warming: https://arxiv.org/abs/2403.08763
        last = before.schedule.learning_rate(before.steps - 1)
        return last + (decayed - last) * warm / self.warmup_steps


class Earlier(Config):
    """Schedule of the first steps of a run that was extended."""

    schedule: Schedule
    steps: PositiveInt
    """Number of steps that were trained with it."""


Schedule.model_rebuild()


class _Decay(NamedTuple):
    learning_rate: Callable[[Schedule, int], float]
    """Learning rate after the warm-up as a function of the steps left; falls from `peak` to 0."""

    description: str
    """Short description of the decay, for help texts."""


def _cosine(schedule: Schedule, left: int) -> float:
    """Source: https://arxiv.org/abs/1608.03983"""
    decaying = schedule.steps - schedule.warmup_steps
    return schedule.peak * 0.5 * (1 - math.cos(math.pi * left / decaying))


def _warmup_stable_decay(schedule: Schedule, left: int) -> float:
    """Source: https://arxiv.org/abs/2405.18392"""
    after_warmup = schedule.steps - schedule.warmup_steps
    decaying = max(1, min(round(0.2 * schedule.steps), after_warmup))
    return schedule.peak * min(1.0, left / decaying)


_DECAYS: dict[ScheduleName, _Decay] = {
    "cosine": _Decay(_cosine, "half a cosine"),
    "wsd": _Decay(_warmup_stable_decay, "constant, then linear in the last 20 % of the steps"),
}


def decays() -> str:
    """Return the help text of a setting that chooses a schedule."""
    choices = "; ".join(f"{name}: {decay.description}" for name, decay in _DECAYS.items())
    return f"Decay to 0 after the warm-up. {choices}."
