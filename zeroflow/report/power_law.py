"""A power law of losses over compute, with a floor, and the interval of its predictions.

    L = E + A · C^-b

E is the loss that no compute removes: https://arxiv.org/abs/2203.15556. Fitting three parameters
needs at least four sizes; with fewer, the law has no floor: https://arxiv.org/abs/2001.08361. The
fit minimises the squares of the relative errors of the losses.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from zeroflow.records import Record
from zeroflow.report.intervals import student

_FEWEST_WITH_FLOOR = 4
"""Minimum number of sizes for a law with a floor."""

_HELD = 0.95
"""Fraction of runs that a prediction interval should contain."""

_FLOORS = 400
"""Number of floors that are tried, between 0 and the lowest loss."""

_WIDEST = 3.0
"""Largest distance from the predicted loss to an edge of its interval, as the log of their
ratio."""

_HALVINGS = 25
"""Steps of the search for an edge."""

Array = npt.NDArray[np.float64]


class Interval(NamedTuple):
    low: float
    high: float


class PowerLaw(Record):
    """L = E + A · C^-b, fitted to losses L at compute C."""

    floor: float
    """E in the unit of the losses; 0 if it was not fitted."""

    log_a: float
    b: float
    flops: tuple[float, ...]
    losses: tuple[float, ...]

    @classmethod
    def fitted(cls, flops: Sequence[float], losses: Sequence[float]) -> Self | None:
        """Fit the law; None for fewer than two different amounts of compute."""
        if len(set(flops)) < 2:
            return None
        x, y = np.log(np.array(flops)), np.array(losses)
        floors = _floors(y) if len(set(flops)) >= _FEWEST_WITH_FLOOR else np.zeros(1)
        error, log_a, slope = _fits(x, y, floors)
        best = int(error.argmin())
        return cls(
            floor=float(floors[best]),
            log_a=float(log_a[best]),
            b=-float(slope[best]),
            flops=tuple(flops),
            losses=tuple(losses),
        )

    @property
    def points(self) -> int:
        return len(self.flops)

    @property
    def has_floor(self) -> bool:
        """True if there were enough sizes to fit a floor."""
        return len(set(self.flops)) >= _FEWEST_WITH_FLOOR

    @property
    def freedom(self) -> int:
        """Degrees of freedom: number of sizes minus number of parameters."""
        return self.points - (3 if self.has_floor else 2)

    def loss(self, flops: float) -> float:
        return self.floor + math.exp(self.log_a - self.b * math.log(flops))

    def interval(self, flops: float) -> Interval | None:
        """Return the 95 % prediction interval at `flops`; None without degrees of freedom.

        It contains every loss that fits the law together with its own points as well as Student's t
        allows. For a law without a floor, this is the usual prediction interval.
        """
        if self.freedom < 1:
            return None
        x, known = np.log(np.array([*self.flops, flops])), np.array(self.losses)
        floors = _floors(known) if self.has_floor else np.zeros(1)
        before = _fits(x[:-1], known, floors)[0].min()
        # The last term allows for rounding if the law fits its points exactly
        limit = before * (1 + student(_HELD, self.freedom) ** 2 / self.freedom) + 1e-12

        def edge(side: int) -> float:
            inside, outside = 0.0, side * _WIDEST
            for _ in range(_HALVINGS):
                middle = (inside + outside) / 2
                tried = np.append(known, self.loss(flops) * math.exp(middle))
                if _fits(x, tried, floors)[0].min() <= limit:
                    inside = middle
                else:
                    outside = middle
            return self.loss(flops) * math.exp(inside)

        return Interval(edge(-1), edge(1))


def _floors(losses: Array) -> Array:
    """Return the floors to try: from 0 to just below the lowest loss."""
    return losses.min() * np.linspace(0, 0.999, _FLOORS)


def _fits(x: Array, losses: Array, floors: Array) -> tuple[Array, Array, Array]:
    """Fit a line to log(L - E) over `x`, for each floor E.

    The weight of a point is the square of (L - E) / L, which makes its error relative to L.

    Returns:
        Sum of squared errors, log A and slope, for each floor.
    """
    above = losses - floors[:, None]  # (floors, points)
    possible = np.all(above > 0, axis=-1)
    above = np.where(possible[:, np.newaxis], above, losses)
    weights, z = (above / losses) ** 2, np.log(above)
    weights /= weights.sum(-1, keepdims=True)
    mean_x, mean_z = ((weights * v).sum(-1, keepdims=True) for v in (x, z))
    slope = (weights * (x - mean_x) * (z - mean_z)).sum(-1)
    slope /= (weights * (x - mean_x) ** 2).sum(-1)
    line = mean_z + slope[:, None] * (x - mean_x)
    error = (((above / losses) * (z - line)) ** 2).sum(-1)
    return np.where(possible, error, np.inf), mean_z[:, 0] - slope * mean_x[:, 0], slope
