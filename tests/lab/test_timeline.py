"""Communication is exposed where nothing is computed."""

import pytest

from zeroflow.lab.timeline import Span, communication, exposed


def span(lane: str, begin: float, end: float) -> Span:
    return Span.model_validate({"lane": lane, "begin": begin, "end": end})


def test_collectives_that_overlap_count_once_and_computation_hides_them():
    spans = [
        span("gather", 0, 4),
        span("reduce", 3, 6),
        span("forward", 1, 2),
        span("backward", 5, 9),
    ]
    assert communication(spans) == pytest.approx(6)
    assert exposed(spans) == pytest.approx(4), "0 to 1 and 2 to 5"


def test_without_computation_all_communication_is_exposed():
    assert exposed([span("reduce", 0.1, 0.4)]) == communication([span("reduce", 0.1, 0.4)])
    assert exposed([span("forward", 0, 1)]) == communication([span("forward", 0, 1)]) == 0
