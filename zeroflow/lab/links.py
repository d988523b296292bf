"""Steps over slow links: their time at each bandwidth, and that of single collectives.

On a busy machine, ranks wait for a core that another program uses. Linux counts this time, and it
is subtracted. The rest of the disturbance should affect all times alike, so they are interquartile
means: the shortest times of single collectives would add up to less than any step takes, in which
some collectives are always disturbed.
"""

import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from zeroflow.data.batches import Batches
from zeroflow.lab import collectives, network
from zeroflow.lab.collectives import GATHER, SCATTER
from zeroflow.records import Record
from zeroflow.training import zero
from zeroflow.training.config import TrainingConfig
from zeroflow.training.loop import train_step
from zeroflow.training.state import new_state

_WARM_UP = 2
"""Rounds before the first timed one."""


class SingleCollective(Record):
    """Mean time of a call of a collective right after another call, with nothing else to do."""

    name: str
    bytes: int
    seconds: float


class LinkMeasurement(Record):
    """Figures of one bandwidth."""

    gbps: float | None
    """10⁹ bits per second that a rank can send; None without a limit."""

    step_seconds: tuple[float, ...]
    """Mean time of a step, for each workload."""

    collectives: tuple[SingleCollective, ...]


def measure(
    configs: Sequence[TrainingConfig],
    source: Callable[[TrainingConfig], Batches],
    bandwidths: Sequence[float],
) -> list[LinkMeasurement]:
    """Measure steps of all `configs` and their collectives without a limit and at each bandwidth.

    Every round has one step of each workload at each bandwidth, so that a change of the machine's
    load affects all alike.
    """
    runs = [(new_state(config), source(config), config) for config in configs]
    calls = sorted({call for config in configs for call in collectives.calls(config.workload)})
    limits = (None, *bandwidths)
    steps: defaultdict[tuple[float | None, int], list[float]] = defaultdict(list)
    single: defaultdict[tuple[float | None, str, int], list[float]] = defaultdict(list)
    for turn in range(_WARM_UP + configs[0].steps):
        for gbps in limits:
            network.limit(gbps)
            for name, size in calls:
                call = _collective(name, size)
                # An idle link lets a burst pass without a limit; in a step the link is never idle
                # for long, so a first call uses up the burst
                single[gbps, name, size].append(_seconds(call, first=call))
            for number, (state, batches, config) in enumerate(runs):
                step = partial(
                    train_step, state, batches.micro_batches(turn % config.steps), config
                )
                steps[gbps, number].append(_seconds(step))
    network.limit(None)
    return [
        LinkMeasurement(
            gbps=gbps,
            step_seconds=tuple(
                interquartile_mean(steps[gbps, n][_WARM_UP:]) for n in range(len(runs))
            ),
            collectives=tuple(
                SingleCollective(
                    name=name,
                    bytes=size,
                    seconds=interquartile_mean(single[gbps, name, size][_WARM_UP:]),
                )
                for name, size in calls
            ),
        )
        for gbps in limits
    ]


def interquartile_mean(seconds: Sequence[float]) -> float:
    left_out = len(seconds) // 4
    return statistics.fmean(sorted(seconds)[left_out : len(seconds) - left_out])


def _seconds(function: Callable[[], object], first: Callable[[], object] = lambda: None) -> float:
    """Return the time of `function`, called after `first`, without waits for a core."""
    zero.is_any(False)  # a barrier
    first()
    waited, began = _waited_for_a_core(), time.perf_counter()
    function()
    seconds = time.perf_counter() - began
    # The slowest rank determines the time, and the others wait for it
    lost = zero.max_over_ranks(_waited_for_a_core() - waited)
    return seconds - lost / 1e9


def _waited_for_a_core() -> int:
    """Return the nanoseconds for which this thread was ready to run, but had no core.

    If there are more ranks than cores, ranks wait for each other, which belongs to their step.

    Source: https://docs.kernel.org/scheduler/sched-stats.html
    """
    counted = Path("/proc/thread-self/schedstat")
    if zero.ranks() > (os.cpu_count() or 1) or not counted.exists():
        return 0
    return int(counted.read_text(encoding="ascii").split()[1])


def _collective(name: str, size: int) -> Callable[[], object]:
    """Return a call of a collective of `size` bytes over all ranks."""
    whole = torch.zeros(max(1, size // 4))
    part = whole[: max(1, len(whole) // zero.ranks())].clone()
    # PyTorch 2.13 has renamed the first two
    if name == GATHER:
        return partial(_named("all_gather_single", "all_gather_into_tensor"), whole, part)
    if name == SCATTER:
        return partial(_named("reduce_scatter_single", "reduce_scatter_tensor"), part, whole)
    return partial(dist.all_reduce, whole)


def _named(*names: str) -> Callable[..., object]:
    found: Callable[..., object] = next(
        getattr(dist, name) for name in names if hasattr(dist, name)
    )
    return found
