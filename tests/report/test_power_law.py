import math

import numpy as np
import pytest

from zeroflow.report.power_law import PowerLaw


def noisy(
    count: int, *, floor: float, noise: float, random: np.random.Generator
) -> tuple[list[float], list[float]]:
    """Compute and losses of runs over four powers of ten, and of one of 16 times the last."""
    flops = [*(10.0 ** (17 + np.linspace(0, 4, count))), 1.6e22]
    errors = np.exp(noise * random.standard_normal(count + 1))
    exponent, factor = (0.15, 2.0) if floor else (0.06, 4.0)
    losses = [floor + factor * (x / 1e17) ** -exponent for x in flops] * errors
    return flops, losses.tolist()


@pytest.mark.parametrize(
    ("count", "floor", "noise"),
    [(3, 0.0, 0.01), (4, 1.7, 0.002), (4, 0.0, 0.01), (6, 1.7, 0.01)],
)
def test_interval_contains_the_loss_of_the_next_run_as_often_as_promised(count, floor, noise):
    random, inside, trials = np.random.default_rng(count), 0, 200
    for _ in range(trials):
        flops, losses = noisy(count, floor=floor, noise=noise, random=random)
        law = PowerLaw.fitted(flops[:-1], losses[:-1])
        assert law is not None and law.has_floor == (count >= 4)
        interval = law.interval(flops[-1])
        assert interval is not None
        inside += interval.low <= losses[-1] <= interval.high
    assert 0.92 <= inside / trials <= 0.995


def test_floor_is_recovered_and_distant_predictions_are_not_below_it():
    flops, losses = noisy(6, floor=1.7, noise=0.0, random=np.random.default_rng(0))
    law = PowerLaw.fitted(flops[:-1], losses[:-1])
    assert law is not None and law.freedom == 3
    assert law.floor == pytest.approx(1.7, rel=0.01)
    assert law.b == pytest.approx(0.15, rel=0.02)
    assert law.loss(flops[-1]) == pytest.approx(losses[-1], rel=1e-3)
    without = PowerLaw.fitted(flops[:3], losses[:3])
    assert without is not None and without.floor == 0
    assert without.loss(1e30) < 1.7 < law.loss(1e30)


def test_interval_without_a_floor_is_that_of_a_textbook():
    """Least squares of the logarithms, and Student's t at one degree of freedom."""
    flops, losses = [1e15, 1e16, 1e18], [3.1, 2.7, 2.3]
    law = PowerLaw.fitted(flops, losses)
    assert law is not None and law.freedom == 1
    x, y = np.log(flops), np.log(losses)
    slope, begin = np.polyfit(x, y, 1)
    assert (law.b, law.log_a) == pytest.approx((-slope, begin))
    variance = ((y - begin - slope * x) ** 2).sum()
    leverage = 1 / 3 + (math.log(1e19) - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum()
    width = 12.7062 * math.sqrt(variance * (1 + leverage))
    low, high = law.interval(1e19) or (0, 0)
    assert math.log(high / law.loss(1e19)) == pytest.approx(width, rel=1e-3)
    assert math.log(law.loss(1e19) / low) == pytest.approx(width, rel=1e-3)


def test_two_sizes_have_a_law_without_an_error_and_one_has_none():
    law = PowerLaw.fitted([1e15, 1e16], [3.0, 2.0])
    assert law is not None and law.interval(1e17) is None
    assert PowerLaw.fitted([1e15, 1e15], [3.0, 2.0]) is None
    assert PowerLaw.fitted([], []) is None
