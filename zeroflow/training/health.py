"""Detection of unusual losses, gradients and updates while all numbers are finite."""

import math
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

_WINDOW = 50
_ENOUGH = 10
_SIGMAS = 6.0
_NORMAL = 1.4826
"""Standard deviation of a normal distribution, in median absolute deviations."""

_LOSS_RISE = 0.3
_NORM_FACTOR = 3.0
_UPDATE_RATIO, _RATIO_FACTOR = 0.1, 3.0
_TOO_GOOD = 0.5


class Reading(NamedTuple):
    """The monitored numbers of a logged step."""

    loss: float
    grad_norm: float
    update_ratio: float
    """Largest ratio of the norm of a matrix's update to the norm of its weights."""

    first_epoch: bool
    """True as long as no row has been read twice."""


class Monitor:
    """Compares every logged step with the steps before it.

    Loss and gradient norm raise an alarm if they exceed the median of a window by six robust
    standard deviations and also by a clear absolute margin. While the window contains the fast drop
    at the beginning, its deviation is too large to detect anything, so the update ratio has an
    absolute limit. It also has a relative limit, because small matrices at a high learning rate
    change by a tenth in a healthy training. A loss that is too low in the first epoch means that
    targets leak into the inputs.
    """

    def __init__(self, *, entropy: float | None, earlier: Sequence[Reading] = ()) -> None:
        """
        Args:
            entropy: loss of a model that knows the source of the data, if that is known.
            earlier: readings of the previous steps of a resumed run.
        """
        self._floor = _TOO_GOOD if entropy is None else min(_TOO_GOOD, 0.9 * entropy)
        self._window: deque[Reading] = deque(earlier, maxlen=_WINDOW)

    def alarms(self, reading: Reading) -> list[str]:
        """Return descriptions of everything unusual about the step; empty for a healthy step."""
        found = []
        if len(self._window) >= _ENOUGH:
            usual = [earlier.loss for earlier in self._window]
            limit = max(_limit(usual), median(usual) + _LOSS_RISE)
            if reading.loss > limit:
                found.append(f"loss {reading.loss:.4f}, usually below {limit:.4f}")
            usual = [earlier.grad_norm for earlier in self._window]
            limit = max(_limit(usual), _NORM_FACTOR * median(usual))
            if reading.grad_norm > limit:
                found.append(f"gradient norm {reading.grad_norm:.3g}, usually below {limit:.3g}")
            usual = [earlier.update_ratio for earlier in self._window]
            limit = max(_UPDATE_RATIO, _RATIO_FACTOR * median(usual))
            if reading.update_ratio > limit:
                found.append(f"an update of {reading.update_ratio:.0%} of a matrix's norm")
        if reading.first_epoch and reading.loss < self._floor:
            found.append(
                f"loss {reading.loss:.4f} is implausibly low: do targets leak into the inputs?"
            )
        if math.isfinite(reading.loss):
            self._window.append(reading)
        return found


def _limit(usual: Sequence[float]) -> float:
    middle = median(usual)
    return middle + _SIGMAS * _NORMAL * median(abs(value - middle) for value in usual)
