"""Learning rate as a function of the step."""

import math
from typing import Literal, Self

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from zeroflow.config import Config

ScheduleName = Literal["cosine", "wsd"]

_DECAY_SHARE = 0.2


class Schedule(Config):
    """Linear warm-up to `peak`, then a decay to 0 at `steps`."""

    name: ScheduleName
    peak: PositiveFloat
    warmup_steps: NonNegativeInt
    steps: PositiveInt

    @model_validator(mode="after")
    def _warmup_ends(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"{self.warmup_steps} warm-up steps leave nothing of {self.steps} steps: "
                "lower warmup_steps or raise max_steps"
            )
        return self

    def learning_rate(self, step: int) -> float:
        """Learning rate of the update that `step` (from 0) makes; above 0 for every step.

        cosine: https://arxiv.org/abs/1608.03983. wsd, warmup-stable-decay: the last 20 % of the
        steps go down linearly, https://arxiv.org/abs/2405.18392.
        """
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        left = self.steps - step
        if self.name == "cosine":
            decaying = self.steps - self.warmup_steps
            return self.peak * 0.5 * (1 - math.cos(math.pi * left / decaying))
        decaying = max(1, min(round(_DECAY_SHARE * self.steps), self.steps - self.warmup_steps))
        return self.peak * min(1.0, left / decaying)
