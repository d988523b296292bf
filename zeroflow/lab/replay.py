"""Replay of a recorded step, with collectives that take longer than they did.

The recorded timeline shows when a rank computed, when it had collectives in progress, and when it
computed nothing because it waited for one. In the replay

- computation takes as long as it did, and a collective starts when as much has been computed as in
  the recording, after the one before it has ended: the link carries one at a time;
- computation waits for a collective at the point at which it did. If it did not wait, it would at
  the beginning of the next collective of the same kind, because FSDP2 gathers, and reduces, at most
  one group of parameters ahead.

So a collective that takes longer is hidden only behind the computation in between.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from zeroflow.lab.timeline import COMMUNICATION, Lane, Span, waits


class _Collective(NamedTuple):
    lane: Lane
    seconds: float

    after: float
    """Seconds of computation before it starts."""

    until: float
    """Seconds of computation after which it must have ended."""


def prolonged(spans: Sequence[Span], added: Mapping[Lane, float]) -> float:
    """Return the seconds by which a recorded step takes longer if its collectives do.

    Args:
        spans: timeline of the step.
        added: additional seconds of all collectives of a lane together. Each gets a share in
            proportion to its time. Nothing hides those of a lane that the step does not have.
    """
    step = list(_collectives(spans))
    computed = _Computed(spans).total
    totals = {lane: sum(one.seconds for one in step if one.lane == lane) for lane in added}
    longer = [
        one._replace(seconds=one.seconds * (1 + added.get(one.lane, 0.0) / totals[one.lane]))
        if totals.get(one.lane)
        else one
        for one in step
    ]
    elsewhere = sum(seconds for lane, seconds in added.items() if not totals[lane])
    return _replayed(longer, computed) - _replayed(step, computed) + elsewhere


class _Computed:
    """Seconds until a moment of a step in which the rank does not wait for a collective."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self._waits = waits(spans)
        self.total = self(max((span.end for span in spans), default=0.0))

    def __call__(self, until: float) -> float:
        waited = (min(end, until) - begin for begin, end in self._waits if begin < until)
        return until - sum(waited)


def _collectives(spans: Sequence[Span]) -> Iterator[_Collective]:
    computed = _Computed(spans)
    found = sorted(
        (span for span in spans if span.lane in COMMUNICATION), key=lambda span: span.begin
    )
    following = {
        id(span): after.begin
        for lane in COMMUNICATION
        for span, after in pairwise(one for one in found if one.lane == lane)
    }
    for span in found:
        seconds, until = span.end - span.begin, computed(span.end)
        # The marks of its end and of the computation that waits for it may differ a little
        tenth = seconds / 10
        is_awaited = until - computed(span.end - tenth) < tenth / 2
        if not is_awaited:
            until = max(until, computed(following.get(id(span), span.end)))
        yield _Collective(span.lane, seconds, computed(span.begin), until)


def _replayed(step: Sequence[_Collective], computed: float) -> float:
    """Return the time of a step with `computed` seconds of computation."""
    ends: list[tuple[float, float]] = []  # of collectives: the computation that waits, the time
    free = 0.0

    def reached(seconds: float) -> float:
        """Return the time at which `seconds` have been computed."""
        return max([seconds, *(end + seconds - until for until, end in ends if until <= seconds)])

    for one in step:
        free = max(reached(one.after), free) + one.seconds
        ends.append((one.until, free))
    return max(reached(computed), free)
