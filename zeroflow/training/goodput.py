"""Wall time of training, divided into phases; every moment belongs to exactly one phase.

A process adds the seconds of its phases to `goodput.jsonl` at every logged step and checkpoint, so
a killed process loses the record of at most its last few steps. Over all processes of a run and the
time between them, the phases add up to the wall time of training.
"""

import time
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Literal, Protocol, Self, TypeVar, get_args

import torch

from zeroflow.records import JsonLines, Record, omitted
from zeroflow.run_folder import RunFolder
from zeroflow.units import duration

_SHOWN = 5
"""Number of phases in the summary."""

Name = TypeVar("Name", bound=str)

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
"""start: from the launch of a process until its checkpoint is loaded.
first_step: first step of a process, which loads and selects kernels and allocates memory.
data, checkpoint: only the time that training waits for them.
communication: from the end of this rank's backward pass until all ranks have ended theirs;
communication that overlaps a backward pass counts as forward_backward.
restarts: from the death of a process to the launch of the next, plus the lost steps."""

PHASES: tuple[Phase, ...] = get_args(Phase)
GOOD: tuple[Phase, ...] = ("forward_backward", "optimizer")
"""Phases that count as goodput. The others are overhead."""

TRAINING: tuple[Phase, ...] = ("data", *GOOD, "communication", "logging")
"""Phases from which tokens per second are computed, without the first step of each process."""


class Booking(Record):
    """Seconds of each phase since the previous line."""

    step: int
    """Number of steps done."""

    time: float
    """Seconds since the epoch."""

    ended: bool
    """True if the process exited cleanly here; the time until the next process does not count."""

    seconds: dict[str, float]
    """Seconds by phase. Older versions had one more phase, waiting for MLflow."""

    began: float | None = omitted()
    """Launch time of the process, only in its first line."""


BOOKINGS: JsonLines[Booking] = JsonLines(Booking)
"""goodput.jsonl."""


class Clock:
    """The current phase of the process and the seconds of all phases.

    The host queues work ahead of the GPU, so a phase ends when the device reaches its end. Every
    change of phase records an event in the stream, without waiting; `settle` reads the events.
    Therefore data preparation that overlaps with computation counts as no time, and time in which
    the loop waits for the device belongs to the phase that the device executes.
    """

    def __init__(self, began: float, *, device: Literal["cpu", "cuda"]) -> None:
        """
        Args:
            began: launch time of the process, from time.time.
        """
        self._new_mark = _DeviceMark if device == "cuda" else _HostMark
        self.phase: Phase = "start"
        self._first_step = True
        self._marks: list[tuple[Phase, _Mark]] = [(self.phase, self._new_mark())]
        self._settled = time.perf_counter()
        self.began, self.seconds = began, dict.fromkeys(PHASES, 0.0)
        self.seconds["start"] = max(0.0, time.time() - began)

    def enter(self, phase: Phase) -> None:
        """End the current phase and begin `phase`."""
        if phase == "logging":  # the step is done
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
        # Events give only the proportions: their sum may differ from the seconds of the host
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
    """Total seconds of all processes of a run."""

    def __init__(self, bookings: Iterable[Booking] = ()) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.restarts = 0
        """Number of processes that resumed after another had not exited cleanly."""

        self.steps_again = 0
        """Number of steps trained again because a process resumed from an earlier checkpoint."""

        self.steps = 0
        """Number of trained steps, without the first step of each process."""

        self._step, self._is_first = 0, True
        self._bookings: list[Booking] = []
        for booking in bookings:
            self.add(booking)

    @property
    def wall(self) -> float:
        """Seconds of wall time."""
        return sum(self.seconds.values())

    @property
    def training(self) -> float:
        """Seconds that `steps` took."""
        return sum(self.seconds[phase] for phase in TRAINING)

    @property
    def shares(self) -> dict[Phase, float]:
        """Fraction of the wall time of each phase; the fractions add up to 1."""
        wall = self.wall or 1.0
        return {phase: seconds / wall for phase, seconds in self.seconds.items()}

    @property
    def goodput(self) -> float:
        """Fraction of the wall time that contributed to the current weights."""
        return sum(self.shares[phase] for phase in GOOD)

    def add(self, booking: Booking) -> None:
        if booking.began is not None and self._bookings:
            self._resume(self._bookings[-1], booking, began=booking.began)
        self._count(booking)
        self._bookings.append(booking)

    def _resume(self, last: Booking, first: Booking, *, began: float) -> None:
        """Account for a new process, whose `first` booking follows the `last` of another."""
        self.steps_again += max(0, last.step - first.step)
        restarts = self.seconds["restarts"]
        if not last.ended:
            self.restarts += 1
            # 0 if the wall clock was set back
            restarts += max(0.0, began - last.time)
        # The time of steps that are trained again did not contribute to the weights
        while self._bookings and self._bookings[-1].step > first.step:
            restarts += sum(self._bookings.pop().seconds.values())
        self.seconds = dict.fromkeys(PHASES, 0.0) | {"restarts": restarts}
        self.steps = 0
        for booking in self._bookings:
            self._count(booking)

    def _count(self, booking: Booking) -> None:
        for phase in PHASES:
            self.seconds[phase] += booking.seconds.get(phase, 0.0)
        if booking.began is not None:
            self._step, self._is_first = booking.step, True
        elif done := booking.step - self._step:
            self.steps += done - self._is_first
            self._step, self._is_first = booking.step, False


class PhaseLedger:
    """Account of a run, to which this process adds its own seconds."""

    def __init__(self, folder: RunFolder, clock: Clock, *, kept: bool = True) -> None:
        """
        Args:
            kept: write the bookings to the run's folder; True on one rank only.
        """
        self.clock, self._kept = clock, kept
        self._path, self._booked = folder.goodput, dict.fromkeys(PHASES, 0.0)
        if kept:  # a killed process may have left half a line
            BOOKINGS.keep(self._path, lambda booking: True)
        self.account = Account(BOOKINGS.read(self._path))

    def book(self, step: int, *, first: bool = False, ended: bool = False) -> Account:
        """Book the seconds of each phase since the last call; waits for the device.

        Args:
            step: steps done.
            first: the first booking of this process.
            ended: the process exits cleanly now.
        """
        self.clock.settle()
        seconds, before = dict(self.clock.seconds), self._booked
        booking = Booking(
            step=step,
            time=self.clock.began + sum(seconds.values()),
            ended=ended,
            seconds={p: seconds[p] - before[p] for p in PHASES if seconds[p] > before[p]},
            began=self.clock.began if first else None,
        )
        if self._kept:
            BOOKINGS.append(self._path, booking)
        self.account.add(booking)
        self._booked = seconds
        return self.account


def read(folder: RunFolder, *, after: int = 0) -> Account:
    """Return the account of a run so far.

    Args:
        after: number of steps. Processes before the last one that was launched with at most this
            many steps are left out.
    """
    bookings = BOOKINGS.read(folder.goodput)
    if after:
        launches = (n for n, one in enumerate(bookings) if one.began and one.step <= after)
        bookings = bookings[max(launches, default=0) :]
    return Account(bookings)


def summary(shares: Mapping[Name, float], wall_seconds: float) -> str:
    """Return the largest shares of the wall time on one line."""
    largest = sorted(shares.items(), key=lambda item: -item[1])[:_SHOWN]
    parts = ", ".join(f"{label(phase)} {share:.1%}" for phase, share in largest)
    return f"{duration(wall_seconds)}: {parts}"


def label(phase: str) -> str:
    """Return the display name of a phase."""
    names = {"data": "data wait", "forward_backward": "forward/backward", "optimizer": "optimiser"}
    return names.get(phase, phase.replace("_", " "))
