"""Predicted and measured figures of earlier runs."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, NamedTuple

from zeroflow.config import Config
from zeroflow.device import DeviceKind
from zeroflow.estimate.speed import Rate
from zeroflow.model.llama import ModelConfig
from zeroflow.records import JsonLines, Record, omitted
from zeroflow.run_folder import Cache
from zeroflow.training.workload import Workload
from zeroflow.units import parameter_count

NEWEST = 5
"""Number of earlier runs to average. Older runs are ignored, because code and drivers change."""

_NEAR = 3.0
"""Two models are assumed to reach the same FLOP/s if the ratio of their FLOPs per token is at most
this. On an H100, tiny reached 18 % of the peak, and small, with 13 times the FLOPs, 42 %."""

SAME_MARGINS: dict[DeviceKind, tuple[float, float]] = {"cuda": (0.9, 1.1), "cpu": (0.6, 1.5)}
"""Range of the speed relative to that of earlier runs of the same workload. The cores of a CPU may
have been busy with other programs."""

_OTHER_MARGINS: dict[DeviceKind, tuple[float, float]] = {"cuda": (0.6, 1.6), "cpu": (0.3, 3.0)}
"""Range of the speed relative to that of runs of another model, at equal FLOP/s."""


class Figures(Config):
    """Predicted or measured figures of a run; None if unknown."""

    tokens_per_second: float | None
    seconds: float | None
    """Seconds of all steps: data wait, forward/backward, optimiser, communication, logging."""

    memory_bytes: int | None
    """Peak tensor memory on a GPU; resident set size of the process on a CPU."""

    shard_bytes: int | None
    checkpoint_bytes: int | None
    checkpoint_seconds: float | None = omitted()
    """Time to copy and write a checkpoint, while training continues."""


class Past(Record):
    """Figures of a run that reached its last step."""

    FORMAT: ClassVar[int] = 2

    run: str
    steps: int
    workload: Workload
    predicted: Figures
    measured: Figures

    @property
    def rate(self) -> float:
        """Measured tokens per second."""
        rate = self.measured.tokens_per_second
        assert rate is not None, "runs without a rate are left out"
        return rate


PLANS: JsonLines[Past] = JsonLines(Past)
"""plans.jsonl."""


class Experience(NamedTuple):
    """Expected figures of a workload, from earlier runs."""

    rate: Rate
    memory_bytes: int | None
    """None if only other models or batches have been run."""

    source: str
    runs: int
    """Number of runs from which the rate was computed."""


def append(cache: Path, past: Past) -> None:
    """Add a run to the history, unless it is there already with the same number of steps."""
    if any((other.run, other.steps) == (past.run, past.steps) for other in read(cache)):
        return
    PLANS.append(Cache(cache).plans, past)


def read(cache: Path) -> list[Past]:
    """All runs, oldest first, without records of incompatible versions."""
    return PLANS.readable(Cache(cache).plans)


def known(
    history: Iterable[Past], workload: Workload, *, planned: tuple[str | None, int] = (None, 0)
) -> Experience | None:
    """Return figures of earlier runs of the same workload, or of the most similar other model.

    For another model, only the FLOP/s are used. Return None if there was no similar run here.

    Args:
        planned: name and steps of the planned run. It is not used for its own prediction,
            unless it is being extended.
    """
    name, steps = planned
    runs = [
        past
        for past in history
        if (past.run != name or past.steps < steps) and past.measured.tokens_per_second
    ]
    if same := [past for past in runs if past.workload.costs_as_much_as(workload)][-NEWEST:]:
        memory = [past.measured.memory_bytes for past in same if past.measured.memory_bytes]
        return Experience(
            Rate.around([past.rate for past in same], SAME_MARGINS[workload.device]),
            max(memory, default=None),
            f"from {_count(same)} here",
            len(same),
        )

    def distance(past: Past) -> float:
        """Distance in size: the logarithm of the ratio of FLOPs per token."""
        return abs(math.log(past.workload.flops_per_token / workload.flops_per_token))

    alike = [past for past in runs if past.workload.is_computed_like(workload)]
    alike = [past for past in alike if distance(past) <= math.log(_NEAR)]
    if not alike:
        return None
    nearest = min(alike, key=distance).workload
    near = [
        past for past in alike if (past.workload.model, past.workload.seq_len) == _shape(nearest)
    ][-NEWEST:]
    reached = [past.rate * past.workload.flops_per_token for past in near]
    flops = Rate.around(reached, _OTHER_MARGINS[workload.device])
    size = f"{parameter_count(nearest.model.parameters)} parameters"
    return Experience(
        flops.times(1 / workload.flops_per_token),
        None,
        f"{flops.expected / 1e12:.3g} TFLOP/s, as in {_count(near)} here of a model with {size}",
        len(near),
    )


def _shape(workload: Workload) -> tuple[ModelConfig, int]:
    return workload.model, workload.seq_len


def _count(runs: list[Past]) -> str:
    return f"{len(runs)} earlier run{'s' if len(runs) > 1 else ''}"
