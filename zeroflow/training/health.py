"""Detection of unusual losses, gradients and updates while all numbers are finite."""

import math
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

_WINDOW = 50
"""Number of earlier logged steps with which a step is compared."""

_ENOUGH = 10
"""Number of earlier logged steps below which nothing is compared."""

_SIGMAS = 6.0
"""Distance from the median, in standard deviations, above which a value is unusual. About one in a
billion normally distributed values exceeds it."""

_NORMAL = 1.4826
"""Standard deviation of a normal distribution, in median absolute deviations."""

_LOSS_RISE = 0.3
"""A loss is unusual only if it exceeds the median by more than this, in nats."""

_NORM_FACTOR = 3.0
"""A gradient norm is unusual only if it exceeds this multiple of the median."""

_UPDATE_RATIO, _RATIO_FACTOR = 0.1, 3.0
"""An update ratio is unusual if it exceeds the first number, and its median times the second."""

_TOO_GOOD = 0.5
"""Loss in nats per token that no model reaches on text that it reads for the first time."""


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
    standard deviations and also by a fixed margin. At the beginning the loss drops so fast that the
    deviation in the window is too large to detect anything. Therefore the update ratio has an
    absolute limit, and also a relative one, because in healthy training with a high learning rate
    small matrices change by a tenth. A loss that is too low in the first epoch means that targets
    leak into the inputs.
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
