"""The timeline of a step: when a rank computes and when it communicates, from PyTorch's profiler.

On a GPU the marks are those of the kernels on the device. On a CPU they are those of PyTorch's
operators in the main thread, and of Gloo's collectives in its own threads.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from zeroflow.config import Config
from zeroflow.device import DeviceKind
from zeroflow.training import zero

Lane = Literal["forward", "backward", "optimizer", "compute", "gather", "reduce"]
"""Kinds of work. "compute" is that of a GPU, whose kernels have no phase; "reduce" are sums over
ranks, also of scattered gradients."""

LANES: tuple[Lane, ...] = get_args(Lane)

COMMUNICATION: tuple[Lane, ...] = ("gather", "reduce")


_STEP = "zeroflow: step"
"""Name of the mark around a step."""


class Span(Config):
    """An interval of a step in which a rank does one kind of work, in seconds from its start."""

    lane: Lane
    begin: float
    end: float


def recorded(step: Callable[[], object], device: DeviceKind) -> list[Span]:
    """Run `step`, and return its spans in the order of their beginnings."""
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        zero.is_any(False)  # a barrier, so that no rank waits in the step for a slower start
        with record_function(_STEP):
            step()
    events = profiler.events() or []
    found = list(_of_gpu(events) if device == "cuda" else _of_cpu(events))
    start = min((begin for _, begin, _ in found), default=0.0)
    spans = [
        Span(lane=lane, begin=(begin - start) / 1e6, end=(end - start) / 1e6)
        for lane, begin, end in found
    ]
    return sorted(spans, key=lambda span: span.begin)


_Found = Iterator[tuple[Lane, float, float]]
"""Lane, beginning and end in microseconds."""


def _of_gpu(events: Iterable[Any]) -> _Found:
    for event in events:
        if event.device_type != DeviceType.CUDA or event.is_user_annotation:
            continue
        name, lane = event.name.lower(), "compute"
        if name.startswith(("memcpy htod", "memcpy dtoh")):
            continue  # a copy, as of offloaded state, during which the GPU may compute nothing
        if "nccl" in name:
            lane = "gather" if "allgather" in name else "reduce"
        yield lane, event.time_range.start, event.time_range.end  # type: ignore[misc]


def _of_cpu(events: Sequence[Any]) -> _Found:
    """Return operators that no other contains, and collectives of Gloo."""
    whole = next(event for event in events if event.name == _STEP)
    main, began = whole.thread, whole.time_range.start
    inside = [event for event in events if event.time_range.start >= began]
    listed = sorted(inside, key=lambda event: (event.time_range.start, -event.time_range.end))
    backward_until = optimizer_from = covered_until = 0.0
    for event in listed:
        name, begin, end = event.name, event.time_range.start, event.time_range.end
        if name.startswith("gloo:"):
            yield "gather" if "all_gather" in name else "reduce", begin, end
        elif event.thread != main:
            continue
        elif name.startswith("autograd::engine::evaluate_function"):
            backward_until = max(backward_until, end)
        elif name.startswith("Optimizer.step"):
            optimizer_from = begin
        elif name.startswith("aten::") and begin >= covered_until:
            covered_until = end
            if optimizer_from:
                yield "optimizer", begin, end
            else:
                yield "backward" if begin < backward_until else "forward", begin, end
        elif name.startswith(("c10d::", "_c10d_functional::")):
            covered_until = max(covered_until, end)  # it waits; the work is in Gloo's threads


def communication(spans: Iterable[Span]) -> float:
    """Return the seconds in which a collective is in progress."""
    return _length(_union(span for span in spans if span.lane in COMMUNICATION))


def exposed(spans: Iterable[Span]) -> float:
    """Return the seconds in which a collective is in progress and nothing is computed."""
    return _length(waits(spans))


Interval = tuple[float, float]


def waits(spans: Iterable[Span]) -> list[Interval]:
    """Return the intervals in which a collective is in progress and nothing is computed."""
    everything = list(spans)
    computed = _union(span for span in everything if span.lane not in COMMUNICATION)
    found = []
    for begin, end in _union(span for span in everything if span.lane in COMMUNICATION):
        for start, stop in computed:
            if begin < stop and start < end:
                if begin < start:
                    found.append((begin, start))
                begin = max(begin, stop)
        if begin < end:
            found.append((begin, end))
    return found


def _union(spans: Iterable[Span]) -> list[Interval]:
    merged: list[Interval] = []
    for begin, end in sorted((span.begin, span.end) for span in spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((begin, end))
    return merged


def _length(intervals: Iterable[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)
