"""Comparison of two stages over bandwidths: a line through their differences.

The time for which the bytes of a step need the link is proportional to 1/bandwidth. So the
difference of two stages is a line over 1/bandwidth: its value at 0 is what one of them computes
longer, and its slope is what it moves more. Two stages are equally fast where the line is 0.

The difference is that of steps of the same round, so that a change of the machine's load cancels.
At each bandwidth, the mean of the middle half of the rounds ignores disturbed steps. Disturbances
come at random, so the variance is proportional to the time of a step, and weights are its inverse.
Intervals come from the same line for rounds that are drawn again, with replacement (bootstrap).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from zeroflow.lab.record import Estimate, StageDifference

FEWEST_ROUNDS = 5
"""Fewer rounds say nothing about their noise."""

_DRAWS = 2000
_INTERVAL = (2.5, 97.5)
"""Percentiles."""

_Floats = NDArray[np.float64]


def difference(
    differences: Sequence[Sequence[float]], gbps: Sequence[float], seconds: Sequence[float]
) -> StageDifference:
    """Return how much slower a stage is than another one.

    Args:
        differences: of the time of a step, in each round, at each bandwidth.
        gbps: the bandwidths, at least two.
        seconds: time of a step at each bandwidth.
    """
    rounds = np.array(differences)
    draws = np.random.default_rng(0).integers(len(rounds), size=(_DRAWS, len(rounds)))
    # The first is of the rounds as they are
    means = np.vstack([_middle(rounds[np.newaxis]), _middle(rounds[draws])])
    x = 1 / np.array(gbps)
    start, slope = _lines(x, means, 1 / np.array(seconds))
    slowest, fastest = (_estimate(start + slope * at) for at in (x.max(), x.min()))
    return StageDifference(
        computed_seconds=_estimate(start),
        moved_bytes=_estimate(slope * 1e9 / 8),
        on_slowest=slowest,
        on_fastest=fastest,
        crossover_gbps=_crossover(start, slope, x) if slowest.sign * fastest.sign < 0 else None,
        points=tuple(map(_estimate, means.T)),
    )


def _crossover(start: _Floats, slope: _Floats, x: _Floats) -> Estimate:
    """Return where the lines are 0, between the bandwidths."""
    found = _estimate(np.clip(-start / slope, x.min(), x.max()))
    return Estimate(value=1 / found.value, low=1 / found.high, high=1 / found.low)


def _middle(rounds: _Floats) -> _Floats:
    """Return the mean of the middle half of the rounds, the last dimension but one."""
    count = rounds.shape[-2]
    left_out = count // 4
    middle: _Floats = np.sort(rounds, axis=-2)[..., left_out : count - left_out, :].mean(axis=-2)
    return middle


def _lines(x: _Floats, y: _Floats, weights: _Floats) -> tuple[_Floats, _Floats]:
    """Return value at 0 and slope of the line through each row of `y`, by least squares."""
    weights = weights / weights.sum()
    centre, mean = weights @ x, y @ weights
    slope = ((y - mean[:, np.newaxis]) @ (weights * (x - centre))) / (weights @ (x - centre) ** 2)
    return mean - slope * centre, slope


def _estimate(values: _Floats) -> Estimate:
    low, high = np.percentile(values[1:], _INTERVAL)
    return Estimate(value=float(values[0]), low=float(low), high=float(high))
