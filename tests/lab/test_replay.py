"""Replayed steps hide what a collective takes longer only behind the computation beside it."""

import pytest

from zeroflow.lab.replay import prolonged
from zeroflow.lab.timeline import Span


def span(lane: str, begin: float, end: float) -> Span:
    return Span.model_validate({"lane": lane, "begin": begin, "end": end})


BLOCKING = [span("gather", 0, 1), span("forward", 1, 3), span("reduce", 3, 5)]


def test_collectives_for_which_computation_waits_add_all_their_time():
    assert prolonged(BLOCKING, {"gather": 2}) == pytest.approx(2)
    assert prolonged(BLOCKING, {"gather": 2, "reduce": 0.5}) == pytest.approx(2.5)
    assert prolonged(BLOCKING, {}) == prolonged(BLOCKING, {"gather": 0.0}) == 0


def test_hidden_collective_is_hidden_until_the_next_of_its_kind_begins():
    spans = [span("forward", 0, 8), span("gather", 0, 1), span("gather", 3, 4)]
    # The first may take until 3, where the second begins, which is needed at 4, where it ended
    assert prolonged(spans, {"gather": 2}) == pytest.approx(1), "0 to 2, and 3 to 5"
    assert prolonged(spans, {"gather": 4}) == pytest.approx(2), "0 to 3, and 3 to 6"
    assert prolonged(spans, {"gather": 6}) == pytest.approx(4), "0 to 4, and 4 to 8"


def test_partly_hidden_collective_is_hidden_by_the_same_computation():
    # Computation from 0 to 2 and 5 to 6; the gather is in progress from 1 to 5
    spans = [span("backward", 0, 2), span("gather", 1, 5), span("backward", 5, 6)]
    assert prolonged(spans, {"gather": 3}) == pytest.approx(3)


def test_link_carries_one_collective_at_a_time():
    spans = [
        span("backward", 0, 10),
        span("gather", 1, 2),
        span("reduce", 2, 3),
        span("reduce", 9, 10),
    ]
    # The gather ends at 2 + 4, where computation waited from 2; the reductions follow at 6 and 13
    assert prolonged(spans, {"gather": 4}) == pytest.approx(4)
    assert prolonged(spans, {"gather": 4, "reduce": 2}) == pytest.approx(5)


def test_lane_that_the_recording_lacks_is_added():
    assert prolonged([span("forward", 0, 1)], {"reduce": 2}) == 2
    assert prolonged([], {"reduce": 2}) == 2


def test_marks_that_differ_a_little_still_show_that_computation_waits():
    spans = [span("gather", 0, 1), span("forward", 0.99, 3), span("gather", 2, 2.5)]
    assert prolonged(spans, {"gather": 1.5}) == pytest.approx(1.5, abs=0.02)
