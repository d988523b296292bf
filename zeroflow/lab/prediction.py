"""Speed over slow links, predicted from steps without a limit and from single collectives."""

from collections.abc import Callable, Sequence
from itertools import combinations, pairwise

from zeroflow.lab import collectives
from zeroflow.lab.links import LinkMeasurement
from zeroflow.lab.record import Crossover, Link, StageOverLink
from zeroflow.training.workload import Workload
from zeroflow.training.zero import Stage

_NOISE = 0.02
"""Smallest difference of two stages, relative to their time, that is not noise."""


def linked(found: Sequence[LinkMeasurement], workloads: Sequence[Workload]) -> tuple[Link, ...]:
    """Return measured and predicted times of a step at each bandwidth.

    Args:
        found: measurements; the first is without a limit.
        workloads: those of the times, in their order.
    """
    return tuple(
        Link(
            gbps=one.gbps,
            stages=tuple(
                StageOverLink(
                    stage=work.zero_stage,
                    step_seconds=measured,
                    predicted_step_seconds=unlimited
                    + communication(work, one)
                    - communication(work, found[0]),
                )
                for work, measured, unlimited in zip(
                    workloads, one.step_seconds, found[0].step_seconds, strict=True
                )
            ),
        )
        for one in found
    )


def communication(work: Workload, found: LinkMeasurement) -> float:
    """Return the seconds of the collectives of a step, one after the other."""
    seconds = {(one.name, one.bytes): one.seconds for one in found.collectives}
    return sum(times * seconds[call] for call, times in collectives.calls(work).items())


def crossovers(links: Sequence[Link]) -> tuple[Crossover, ...]:
    """Return the bandwidths at which one stage becomes faster than another, for each such pair.

    Between two bandwidths, times are interpolated linearly in the time of a bit. Times without a
    limit are left out, because the bandwidth of that link is unknown.
    """
    found = []
    stages = [one.stage for one in links[0].stages] if links else []
    for ours, theirs in combinations(stages, 2):
        measured = _crossing(links, ours, theirs, lambda one: one.step_seconds)
        predicted = _crossing(links, ours, theirs, lambda one: one.predicted_step_seconds)
        if (slow_link := measured or predicted) is None:
            continue
        slower = ours if slow_link[0] == theirs else theirs
        found.append(
            Crossover(
                slow_link=slow_link[0],
                fast_link=slower,
                gbps=measured[1] if measured else None,
                predicted_gbps=predicted[1] if predicted else None,
            )
        )
    return tuple(found)


def _crossing(
    links: Sequence[Link], ours: Stage, theirs: Stage, time: Callable[[StageOverLink], float]
) -> tuple[Stage, float] | None:
    """Return the stage that is faster below a bandwidth, and this bandwidth in Gbit/s."""
    points = []
    for link in links:
        if link.gbps is not None:
            times = {one.stage: time(one) for one in link.stages}
            points.append((1 / link.gbps, times[ours] - times[theirs], times[ours]))
    points.sort()
    crossed = [(one, next_) for one, next_ in pairwise(points) if one[1] * next_[1] < 0]
    if len(crossed) != 1:  # times that cross several times differ by noise only
        return None
    if any(
        abs(difference) < _NOISE * seconds for _, difference, seconds in (points[0], points[-1])
    ):
        return None
    [((x, before, _), (y, after, _))] = crossed
    at = x + (y - x) * before / (before - after)
    return (ours if after < 0 else theirs), 1 / at
