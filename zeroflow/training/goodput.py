"""Where the wall time of a run's training goes: every moment of it is in one phase.

A process books the seconds of its phases in `goodput.jsonl` at every logged step and checkpoint, so
that one that is killed has lost at most the last few steps from the books. Those add up over all
the processes of a run, with the time between them, to the wall time of its training.
"""

import time
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Literal, Protocol, Self, get_args

import torch

from zeroflow import records
from zeroflow.run_folder import RunFolder
from zeroflow.units import duration

_SHOWN = 5

Phase = Literal[
    "start",
    "compile",
    "first_step",
    "data",
    "forward_backward",
    "optimizer",
    "communication",
    "validation",
    "checkpoint",
    "logging",
    "restarts",
]
"""start: from the launch of a process until it is ready, its checkpoint loaded.
first_step: of a process, in which kernels are loaded and chosen and memory is taken.
data, checkpoint: only while training waits for them.
communication: between the ends of the backward passes of all ranks; what they pass on within them
is a part of it.
restarts: from the death of a process to the launch of the next, and what it did in vain."""

PHASES: tuple[Phase, ...] = get_args(Phase)
GOOD: tuple[Phase, ...] = ("forward_backward", "optimizer")
"""What trains. The rest is what it costs to have it run."""

TRAINING: tuple[Phase, ...] = ("data", *GOOD, "communication", "logging")
"""The seconds that tokens per second are over: of all steps but the first of a process."""


class Clock:
    """Which phase the process is in, by one clock.

    What is asked of a GPU is done later. There, a phase ends when the device has come to its end:
    a mark goes into the stream of work at every change, which waits for nothing, and `settle` reads
    the marks. So data that are made while the device computes cost nothing, and the time in which
    the loop waits for the device is that of the phase which the device is in.
    """

    def __init__(self, began: float, *, device: Literal["cpu", "cuda"]) -> None:
        """
        Args:
            began: when the process was launched, by time.time.
        """
        self._new_mark = _DeviceMark if device == "cuda" else _HostMark
        self.phase: Phase = "start"
        self._first_step = True
        self._marks: list[tuple[Phase, _Mark]] = [(self.phase, self._new_mark())]
        self._settled = time.perf_counter()
        self.began, self.seconds = began, dict.fromkeys(PHASES, 0.0)
        self.seconds["start"] = max(0.0, time.time() - began)

    def enter(self, phase: Phase) -> None:
        """End the phase that the process is in, and begin `phase`."""
        if phase == "logging":  # of a step that is done
            self._first_step = False
        if self._first_step and phase in TRAINING:
            phase = "first_step"
        self.phase = phase
        self._marks.append((phase, self._new_mark()))

    def settle(self) -> None:
        """Bring `seconds` up to date; waits for the device."""
        self.enter(self.phase)
        self._marks[-1][1].wait()
        now = time.perf_counter()
        spans = [(phase, end.since(begin)) for (phase, begin), (_, end) in pairwise(self._marks)]
        # the device's own clock only says how the seconds are shared out
        scale = (now - self._settled) / (sum(seconds for _, seconds in spans) or 1.0)
        for phase, seconds in spans:
            self.seconds[phase] += scale * seconds
        del self._marks[:-1]
        self._settled = now


class _Mark(Protocol):
    def wait(self) -> None: ...

    def since(self, earlier: Self) -> float: ...


class _HostMark:
    def __init__(self) -> None:
        self._time = time.perf_counter()

    def wait(self) -> None:
        pass

    def since(self, earlier: Self) -> float:
        return self._time - earlier._time


class _DeviceMark:
    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def wait(self) -> None:
        self._event.synchronize()

    def since(self, earlier: Self) -> float:
        return earlier._event.elapsed_time(self._event) / 1000


class Account:
    """The books of a run, added up."""

    def __init__(self, lines: Iterable[records.Line] = ()) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.restarts = 0
        """Processes that went on after one which had not ended in order."""

        self.steps_again = 0
        """Steps trained in vain, as a later process went on from a checkpoint before them."""

        self.steps = 0
        """Steps that count, but for the first one of every process."""

        self._step, self._is_first = 0, True
        self._lines: list[records.Line] = []
        for line in lines:
            self.add(line)

    @property
    def wall(self) -> float:
        return sum(self.seconds.values())

    @property
    def training(self) -> float:
        """Seconds that `steps` took."""
        return sum(self.seconds[phase] for phase in TRAINING)

    @property
    def shares(self) -> dict[Phase, float]:
        """Of the wall time; they add up to 1."""
        wall = self.wall or 1.0
        return {phase: seconds / wall for phase, seconds in self.seconds.items()}

    @property
    def goodput(self) -> float:
        """Share of the wall time that trained the model as it is now."""
        return sum(self.shares[phase] for phase in GOOD)

    def add(self, line: records.Line) -> None:
        """Add a line of goodput.jsonl."""
        if "began" in line and self._lines:
            self._go_on(self._lines[-1], line)
        self._count(line)
        self._lines.append(line)

    def _go_on(self, last: records.Line, first: records.Line) -> None:
        """A process has gone on: with its `first` line, after the `last` of the one before."""
        self.steps_again += max(0, last["step"] - first["step"])
        restarts = self.seconds["restarts"]
        if not last["ended"]:
            self.restarts += 1
            # by the wall clock, which may have been set
            restarts += max(0.0, first["began"] - last["time"])
        while self._lines and self._lines[-1]["step"] > first["step"]:
            restarts += sum(self._lines.pop()["seconds"].values())
        self.seconds = dict.fromkeys(PHASES, 0.0) | {"restarts": restarts}
        self.steps = 0
        for line in self._lines:
            self._count(line)

    def _count(self, line: records.Line) -> None:
        for phase in PHASES:  # older versions had one more: waiting for MLflow at the end
            self.seconds[phase] += line["seconds"].get(phase, 0.0)
        if "began" in line:
            self._step, self._is_first = line["step"], True
        elif done := line["step"] - self._step:
            self.steps += done - self._is_first
            self._step, self._is_first = line["step"], False


class PhaseLedger:
    """The account of a run, and what a process of it adds."""

    def __init__(self, folder: RunFolder, clock: Clock, *, kept: bool = True) -> None:
        """
        Args:
            kept: whether they are written down, as one rank of several does.
        """
        self.clock, self._kept = clock, kept
        self._path, self._booked = folder.goodput, dict.fromkeys(PHASES, 0.0)
        if kept:  # a killed process may have left half a line
            records.keep(self._path, lambda line: True)
        self.account = Account(records.read(self._path))

    def book(self, step: int, *, first: bool = False, ended: bool = False) -> Account:
        """Write what the phases have taken since the last time; waits for the device.

        Args:
            step: steps done.
            first: of this process.
            ended: whether it ends now, in order: the time until it is started again is nobody's.
        """
        self.clock.settle()
        seconds, before = dict(self.clock.seconds), self._booked
        line: records.Line = {
            "step": step,
            "time": self.clock.began + sum(seconds.values()),
            "ended": ended,
            "seconds": {p: seconds[p] - before[p] for p in PHASES if seconds[p] > before[p]},
        }
        if first:
            line["began"] = self.clock.began
        if self._kept:
            records.append(self._path, line)
        self.account.add(line)
        self._booked = seconds
        return self.account


def read(folder: RunFolder) -> Account:
    """What a run's processes have booked until now."""
    return Account(records.read(folder.goodput))


def summary(shares: Mapping[Phase, float], wall_seconds: float) -> str:
    """Where most of the time went, in a line."""
    largest = sorted(shares.items(), key=lambda item: -item[1])[:_SHOWN]
    parts = ", ".join(f"{label(phase)} {share:.1%}" for phase, share in largest)
    return f"{duration(wall_seconds)}: {parts}"


def label(phase: Phase) -> str:
    """The name of a phase for people."""
    names = {"data": "data wait", "forward_backward": "forward/backward", "optimizer": "optimiser"}
    return names.get(phase, phase.replace("_", " "))
