"""Kills of training processes: the choice of the moments, and the thread that kills."""

import itertools
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Literal, NamedTuple, get_args

import psutil

from zeroflow.records import Tail
from zeroflow.training import checkpoint
from zeroflow.training.events import EVENTS, Event, Metrics, Saved, Started
from zeroflow.training.job import TrainingJob
from zeroflow.training.metrics import ValidationRecord

Target = Literal["start-up", "training", "saving", "validation"]
"""Activity of training at the time of a kill."""

TARGETS: tuple[Target, ...] = get_args(Target)

_POLL_SECONDS = 0.001
"""Time between looks at the events: short, because a save may take milliseconds."""


class EventInterval(NamedTuple):
    """The time between two milestones of training."""

    target: Target
    step: int
    after: str
    """Kind of the milestone at which the interval begins; its step is `step`."""

    seconds: float


class _Milestone(NamedTuple):
    """An event that begins or ends an interval."""

    kind: str
    step: int
    time: float


def intervals(events: list[Event], start_up_seconds: float) -> list[EventInterval]:
    """Return the intervals of undisturbed training, in order, with their durations."""
    found = [EventInterval("start-up", 0, "", start_up_seconds)]
    ended_by: dict[str, Target] = {"loss": "training", "val_loss": "validation", "saved": "saving"}
    begins: list[_Milestone] = []
    for milestone in _milestones(events):
        if target := ended_by.get(milestone.kind):
            before = begins[-1]
            if target == "saving":  # runs in the background, while later steps are trained
                before = next(m for m in reversed(begins) if m.step == milestone.step)
            seconds = max(0.0, milestone.time - before.time)
            found.append(EventInterval(target, before.step, before.kind, seconds))
        if target != "saving":
            begins.append(milestone)
    return found


def choose(found: list[EventInterval], *, kills: int, seed: int, last: int) -> list[EventInterval]:
    """Choose an interval for each of `kills` kills: all targets in turn, spread over the steps.

    The steps up to `last` are divided into `kills` equal ranges. There is one kill in each range,
    or in a later one if the range has no interval of the target. So resumes start from different
    checkpoints.
    """
    random = Random(seed)
    turns = (target for _ in itertools.count() for target in random.sample(TARGETS, len(TARGETS)))
    chosen = []
    for number, target in enumerate(itertools.islice(turns, kills)):
        if target == "start-up":
            chosen.append(found[0])
            continue
        begin, end = ((last - 1) * n / kills for n in (number, number + 1))
        ahead = [i for i in found[1:] if begin <= i.step < last]
        here = [i for i in ahead if i.step < end]
        of_target = [i for i in here if i.target == target]
        chosen.append(
            random.choice(of_target)
            if of_target
            else next((i for i in ahead if i.target == target), random.choice(here or ahead))
        )
    return chosen


@contextmanager
def killer(
    job: TrainingJob, interval: EventInterval, seconds: float, *, turn: int
) -> Iterator[threading.Event]:
    """Kill a rank of `job` in a thread, `seconds` after the beginning of `interval`.

    If the start-up is faster than the measured one, the rank is killed when the start-up ends.

    Args:
        turn: number of the kill, which selects the rank, so that each rank is killed in turn.

    Yields:
        An event that is set once the rank is killed.
    """
    killed, over = threading.Event(), threading.Event()
    tail = follow(job)

    def begun() -> bool:
        if interval.target == "start-up":
            return len(ranks_of(job)) == job.training.workload.ranks
        return any(_reaches(event, interval) for event in tail.new_records())

    def started_early() -> bool:
        return interval.target == "start-up" and bool(tail.new_records())

    def kill() -> None:
        while not begun():
            if over.wait(_POLL_SECONDS):
                return
        due = time.monotonic() + seconds
        while time.monotonic() < due and not started_early():
            if over.wait(_POLL_SECONDS):
                return
        if ranks := ranks_of(job):
            ranks[turn % len(ranks)].kill()
            killed.set()

    thread = threading.Thread(target=kill, name="killer", daemon=True)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def follow(job: TrainingJob) -> Tail[Event]:
    """Return the events of `job` from now on."""
    return EVENTS.follow(job.folder.events, from_end=True)


def ranks_of(job: TrainingJob) -> list[psutil.Process]:
    """Return the processes that train `job`, in order of their start."""
    label = str(job.folder.path)  # see `launch`
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if label in process.cmdline():
                found.append((process.create_time(), process))
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return [process for _, process in sorted(found, key=lambda one: one[0])]


def moment(job: TrainingJob, events: list[Event]) -> str:
    """Describe the moment of a kill, from the events and files of the killed process."""
    milestones = _milestones(events)
    if not milestones:
        return "while starting up"
    if steps := checkpoint.unfinished(job.folder.checkpoints):
        return f"with the checkpoint of step {steps[0]} half written"
    done = {
        "started": "just after the start at step {}",
        "loss": "after step {}",
        "val_loss": "after the validation of step {}",
        "saved": "after the checkpoint of step {}",
    }
    return done[milestones[-1].kind].format(milestones[-1].step)


def _milestone(event: Event) -> _Milestone | None:
    match event:
        case Metrics():
            kind = "val_loss" if isinstance(event.record, ValidationRecord) else "loss"
            return _Milestone(kind, event.step, event.time)
        case Started() | Saved():
            return _Milestone(event.event, event.step, event.time)
    return None


def _milestones(events: Iterable[Event]) -> list[_Milestone]:
    return [milestone for milestone in map(_milestone, events) if milestone]


def _reaches(event: Event, interval: EventInterval) -> bool:
    """Return True if `interval` begins with `event`, or began before the resumed checkpoint."""
    milestone = _milestone(event)
    if milestone is None or milestone.step < interval.step:
        return False
    return milestone.step > interval.step or milestone.kind in (interval.after, "started")
