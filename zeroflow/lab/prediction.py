"""The model of the links: the time of a step at a bandwidth at which nothing was measured.

It starts from the time of a step on the link as it is, and from single collectives on this link.

- A collective takes its latency, which is the time of a very small one, and the time of its bytes.
  At a lower bandwidth, the latter is what the bytes that a rank sends need at this bandwidth. At a
  higher one it does not change, so nothing is predicted for links that are faster than the measured
  one.
- Collectives do not disturb each other, and neither they nor their memory traffic slow down
  computation any further.
- What a collective takes longer is hidden only behind the computation that was or could have been
  beside it in the recorded step: see `replay`.

No time at a limited bandwidth is used. Where links can be limited, on a CPU, the measured times
show the error of the model.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from zeroflow.device import DeviceKind
from zeroflow.lab import collectives, comparison, network
from zeroflow.lab.collectives import GATHER, SCALARS
from zeroflow.lab.links import LinkMeasurement, SingleCollective, middle_mean
from zeroflow.lab.record import Link, SlowLinks, StageDifference, StageOverLink, StagePair
from zeroflow.lab.replay import prolonged
from zeroflow.lab.timeline import Lane, Span
from zeroflow.training.workload import Workload

_LIMITING = 0.5
"""Largest bandwidth at which stages are compared, relative to that of the link without a limit.
Above, the work of sending, which is done while the link is busy, takes about as long as the link
does, and steps depend less and less on the limit."""


class StageSteps(NamedTuple):
    """Steps of a stage on the link as it is."""

    workload: Workload
    seconds: Sequence[float]
    """Time of each step."""

    spans: Sequence[Span]
    """Timeline of a step."""


class LinkModel:
    """Times of collectives at any bandwidth, from those of single ones."""

    def __init__(self, singles: Sequence[SingleCollective], ranks: int, device: DeviceKind) -> None:
        self._seconds = {(one.name, one.bytes): one.seconds for one in singles}
        # The smallest of each kind
        self._latency = {
            one.name: one.seconds for one in sorted(singles, key=lambda one: -one.bytes)
        }
        self._ranks, self._device = ranks, device

    @property
    def own_gbps(self) -> float:
        """Bandwidth of the link as it is, in the collective that sends the most."""
        name, size = max(self._seconds, key=lambda call: self._bits(*call))
        seconds = self._seconds[name, size] - self._latency[name]
        return self._bits(name, size) / seconds / 1e9 if seconds > 0 else float("inf")

    def call_seconds(self, name: str, size: int, gbps: float) -> float:
        """Return the time of a collective at a bandwidth."""
        measured = self._seconds[name, size]
        of_bytes = self._bits(name, size) / gbps / 1e9
        return max(measured, min(measured, self._latency[name]) + of_bytes)

    def added_seconds(self, work: Workload, gbps: float) -> dict[Lane, float]:
        """Return the additional time of the collectives of a step, by their lane.

        Those of single numbers take no longer: their latency does not depend on the bandwidth.
        """
        added: defaultdict[Lane, float] = defaultdict(float)
        for (name, size), times in collectives.calls(work).items():
            if name != SCALARS:
                lane: Lane = "gather" if name == GATHER else "reduce"
                longer = self.call_seconds(name, size, gbps) - self._seconds[name, size]
                added[lane] += times * longer
        return dict(added)

    def step_seconds(self, steps: StageSteps, gbps: float | None) -> float:
        """Return the predicted time of a step."""
        return middle_mean(steps.seconds) + self.longer(steps, gbps)

    def longer(self, steps: StageSteps, gbps: float | None) -> float:
        """Return the additional time of a step at a bandwidth."""
        if gbps is None:
            return 0.0
        return prolonged(steps.spans, self.added_seconds(steps.workload, gbps))

    def _bits(self, name: str, size: int) -> float:
        """Return the bits that a rank puts on its link."""
        sent = collectives.sent_bytes(name, size, self._ranks, self._device)
        return 8 * sent * (network.HEADERS if self._device == "cpu" else 1)


def slow_links(
    singles: Sequence[SingleCollective],
    stages: Sequence[StageSteps],
    bandwidths: Sequence[float],
    measured: Sequence[LinkMeasurement] = (),
) -> SlowLinks:
    """Return predicted and measured times of a step at each bandwidth, and compare the stages.

    Args:
        singles: collectives on the link as it is.
        measured: steps of `stages` at some bandwidths; empty if the link cannot be limited.
    """
    work = stages[0].workload
    model = LinkModel(singles, work.ranks, work.device)
    own = model.own_gbps
    compared = [gbps for gbps in bandwidths if gbps <= _LIMITING * own]
    at = {one.gbps: one.step_seconds for one in measured}
    return SlowLinks(
        own_gbps=own,
        compared_gbps=tuple(compared),
        links=tuple(_link(model, stages, gbps, at.get(gbps)) for gbps in (None, *bandwidths)),
        pairs=tuple(
            _pair(model, (stages[one], stages[other]), compared, _of(at, one, other))
            for one, other in combinations(range(len(stages)), 2)
            if len(compared) > 1 and _rounds(stages, at) >= comparison.FEWEST_ROUNDS
        ),
    )


def _link(
    model: LinkModel,
    stages: Sequence[StageSteps],
    gbps: float | None,
    measured: Sequence[Sequence[float]] | None,
) -> Link:
    return Link(
        gbps=gbps,
        stages=tuple(
            StageOverLink(
                stage=stage.workload.zero_stage,
                step_seconds=middle_mean(measured[number]) if measured else None,
                predicted_step_seconds=model.step_seconds(stage, gbps),
            )
            for number, stage in enumerate(stages)
        ),
    )


_Steps = Mapping[float | None, tuple[Sequence[float], Sequence[float]]]
"""Times of the steps of two stages, by bandwidth."""


def _of(at: Mapping[float | None, Sequence[Sequence[float]]], one: int, other: int) -> _Steps:
    return {gbps: (seconds[one], seconds[other]) for gbps, seconds in at.items()}


def _rounds(
    stages: Sequence[StageSteps], at: Mapping[float | None, Sequence[Sequence[float]]]
) -> int:
    limited = [len(seconds[0]) for gbps, seconds in at.items() if gbps]
    return min([len(stages[0].seconds), *limited])


def _pair(
    model: LinkModel,
    stages: tuple[StageSteps, StageSteps],
    compared: Sequence[float],
    measured: _Steps,
) -> StagePair:
    one, other = stages
    seconds = [model.step_seconds(one, gbps) for gbps in compared]
    longer = [model.longer(other, gbps) - model.longer(one, gbps) for gbps in compared]
    unlimited = [b - a for a, b in zip(one.seconds, other.seconds, strict=True)]
    found: StageDifference | None = None
    if measured:
        by_bandwidth = [[b - a for a, b in zip(*measured[gbps], strict=True)] for gbps in compared]
        found = comparison.difference([*zip(*by_bandwidth, strict=True)], compared, seconds)
    return StagePair(
        stage=one.workload.zero_stage,
        other=other.workload.zero_stage,
        measured=found,
        predicted=comparison.difference(
            [[here + more for more in longer] for here in unlimited], compared, seconds
        ),
    )
