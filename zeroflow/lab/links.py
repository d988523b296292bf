"""Measurement of links: single collectives without a limit, and steps at each bandwidth.

On a busy machine, ranks wait for a core that another program uses. Linux counts this time, and it
is subtracted. The rest of the disturbance should affect all times alike, so a time is the mean of
the middle half of the rounds: the shortest times of single collectives would add up to less than
any step takes, in which some collectives are always disturbed.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from zeroflow.data.batches import Batches
from zeroflow.device import DeviceKind, cores
from zeroflow.lab import collectives, network
from zeroflow.lab.collectives import GATHER, SCALARS, SCATTER
from zeroflow.records import Record
from zeroflow.training import zero
from zeroflow.training.config import TrainingConfig
from zeroflow.training.loop import train_step
from zeroflow.training.state import TrainState, new_state

_WARM_UP = 2
"""Rounds before the first timed one."""

_UNLIMITED_STEPS = 3
"""Steps of a round without a limit. They are short, and all predictions start from them."""

Call = tuple[str, int]
"""Name and bytes of a collective."""


class SingleCollective(Record):
    """Time of a collective right after another one, with nothing else to do, without a limit."""

    name: str
    bytes: int
    seconds: float


class LinkMeasurement(Record):
    """Times of steps at one bandwidth."""

    gbps: float | None
    """10⁹ bits per second that a rank can send; None without a limit."""

    step_seconds: tuple[tuple[float, ...], ...]
    """Time of every step, for each workload. Steps of the same number are of the same round."""


class LinkMeasurements(Record):
    collectives: tuple[SingleCollective, ...]
    steps: tuple[LinkMeasurement, ...]
    """The first is without a limit. Empty if no bandwidth was to be measured."""


def measure(
    configs: Sequence[TrainingConfig],
    source: Callable[[TrainingConfig], Batches],
    bandwidths: Sequence[float],
    goes_on: Callable[[int, int], bool],
) -> LinkMeasurements | None:
    """Measure the collectives of all `configs`, and steps without a limit and at each bandwidth.

    Every round has each collective, and steps of each workload at each bandwidth, so that a change
    of the machine's load affects all alike.

    Args:
        goes_on: called with the number of finished rounds and of all; if it returns False, the
            measurement ends without a result.
    """
    works = [config.workload for config in configs]
    calls = sorted({call for work in works for call in with_small(collectives.calls(work))})
    limits = (None, *bandwidths) if bandwidths else ()
    runs = [(new_state(config), source(config), config) for config in configs if limits]
    single: defaultdict[Call, list[float]] = defaultdict(list)
    steps: defaultdict[tuple[float | None, int], list[float]] = defaultdict(list)
    rounds = _WARM_UP + configs[0].steps
    for turn in range(rounds):
        if not goes_on(turn, rounds):
            return None
        if turn == _WARM_UP:
            single.clear()
            steps.clear()
        for call in calls:
            single[call].append(_single(*call, works[0].device))
        for gbps in limits:
            network.limit(gbps)
            for number, seconds in _round(runs, turn, 1 if gbps else _UNLIMITED_STEPS):
                steps[gbps, number].append(seconds)
        if limits:
            network.limit(None)
    return LinkMeasurements(
        collectives=tuple(
            SingleCollective(name=name, bytes=size, seconds=middle_mean(seconds))
            for (name, size), seconds in single.items()
        ),
        steps=tuple(
            LinkMeasurement(
                gbps=gbps, step_seconds=tuple(tuple(steps[gbps, n]) for n in range(len(runs)))
            )
            for gbps in limits
        ),
    )


def with_small(calls: Sequence[Call] | dict[Call, int]) -> set[Call]:
    """Return `calls`, and a small one of each kind, whose time is the latency."""
    sizes: dict[str, int] = {}
    for name, size in calls:
        sizes[name] = min(size, sizes.get(name, size))
    small = {(name, min(size, 4 * zero.ranks())) for name, size in sizes.items() if name != SCALARS}
    return {*calls, *small}


def middle_mean(seconds: Sequence[float]) -> float:
    """Return the mean of the middle half."""
    left_out = len(seconds) // 4
    return statistics.fmean(sorted(seconds)[left_out : len(seconds) - left_out])


def _round(
    runs: Sequence[tuple[TrainState, Batches, TrainingConfig]], turn: int, repeats: int
) -> list[tuple[int, float]]:
    """Return the times of steps of each workload, by its number."""
    found = []
    # Workloads take turns in being the first after a change of the limit
    order = sorted(enumerate(runs), key=lambda run: run[0] if turn % 2 else -run[0])
    for _ in range(repeats):
        for number, (state, batches, config) in order:
            micro_batches = batches.micro_batches(turn % config.steps)
            step = partial(train_step, state, micro_batches, config)
            found.append((number, _seconds(step)))
    return found


def _single(name: str, size: int, device: DeviceKind) -> float:
    """Return the time of a collective, which ranks enter together, as they leave another one."""
    on_gpu = device == "cuda" and name != SCALARS  # ranks exchange numbers in host memory
    call = _collective(name, size, "cuda" if on_gpu else "cpu")
    if not on_gpu:
        return _seconds(call, first=call)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


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
    if zero.ranks() > cores() or not counted.exists():
        return 0
    return int(counted.read_text(encoding="ascii").split()[1])


def _collective(name: str, size: int, device: DeviceKind) -> Callable[[], object]:
    """Return a call of a collective of `size` bytes over all ranks."""
    part = torch.zeros(max(1, size // 4 // zero.ranks()), device=device)
    whole = part.repeat(zero.ranks())
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
