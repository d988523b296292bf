import pytest

from zeroflow.report.intervals import student


@pytest.mark.parametrize(
    ("share", "freedom", "textbook"),
    [
        (0.95, 1, 12.7062),
        (0.95, 2, 4.3027),
        (0.95, 7, 2.3646),
        (0.9975, 3.9, 6.9283),  # by scipy, as those below
        (0.9975, 30, 3.2999),
        (0.95, 1000, 1.9623),
    ],
)
def test_interval_is_that_of_a_textbook(share, freedom, textbook):
    assert student(share, freedom) == pytest.approx(textbook, rel=1e-4)
