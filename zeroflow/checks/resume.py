"""Proof that resume is exact: a training that is killed ends with the bits of an undisturbed one.

The same job is trained twice, in two directories: once undisturbed, and once with a rank killed by
SIGKILL at random moments, after each of which it resumes from the newest checkpoint. Every logged
number and every tensor of the last checkpoint must be the same.
"""

import hashlib
import itertools
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Literal, NamedTuple, get_args

import psutil
from pydantic import NonNegativeInt, PositiveInt

from zeroflow.config import Config
from zeroflow.records import Record, Tail
from zeroflow.training import checkpoint
from zeroflow.training.events import EVENTS, Event, Metrics, Saved, Started
from zeroflow.training.failures import TrainingFailed
from zeroflow.training.job import TrainingJob
from zeroflow.training.metrics import METRICS, ValidationRecord
from zeroflow.training.ownership import exclusive
from zeroflow.training.tracked import train

log = logging.getLogger(__name__)

UNDISTURBED, KILLED = "undisturbed", "killed"
"""Names of the two trainings, and of their directories in that of the run."""

Target = Literal["start-up", "training", "saving", "validation"]
TARGETS: tuple[Target, ...] = get_args(Target)

_QUANTITIES = ("loss", "grad_norm", "val_loss")
_POLL_SECONDS = 0.001


class ProofConfig(Config):
    """How often and when the training is killed."""

    kills: PositiveInt = 5
    """How often the training is killed with SIGKILL."""

    kill_seed: NonNegativeInt = 0
    """Seed of the moments at which it is killed."""


class Kill(Config):
    """A SIGKILL that hit the training."""

    aimed_at: Target
    moment: str
    """Where in the training it was, from the files that it left."""

    step: NonNegativeInt
    """The last step that had been logged."""

    resumed_at: NonNegativeInt
    """Step of the checkpoint that the training resumed from; 0 for the beginning."""


class Mismatch(Config):
    """The first difference, with its value in both trainings; "" where it is missing."""

    step: int
    quantity: str
    """Name of a logged number or of a tensor of the last checkpoint."""

    undisturbed: str
    killed: str


class Proof(Record):
    """The result of a proof."""

    passed: bool
    reason: str
    difference: Mismatch | None
    kills: tuple[Kill, ...]
    kills_asked: int
    steps: int
    numbers: int
    """Losses, gradient norms and validation losses that were compared, to the bit."""

    tensors: int
    """Tensors of weights, optimiser and random state whose sha256 were compared."""

    sha256: dict[str, str]
    """sha256 over the sha256 of all tensors, for both trainings."""


class ResumeInexact(RuntimeError):
    """The killed training did not end with the bits of the undisturbed one."""


class _Interval(NamedTuple):
    """The time between two events."""

    phase: Target
    step: int
    after: str
    """Kind of the milestone that it begins with."""

    seconds: float


def prove(
    job: TrainingJob,
    config: ProofConfig,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Proof:
    """Train `job` undisturbed and killed, in directories below its own, and compare.

    The trainings of an earlier proof are removed.

    Args:
        on_event: called with every new event of both trainings.

    Raises:
        ValueError: losses are not logged at every step, or there are too few steps.
        TrainingFailed: a training failed without being killed.
        RunIsBusy: another proof is at work there.
    """
    if job.cadence.log != 1:
        raise ValueError(
            f"a proof compares every step, and losses are logged every {job.cadence.log}: use "
            "--log-interval 1"
        )
    if config.kills >= job.training.steps:
        raise ValueError(
            f"{config.kills} kills need more than {job.training.steps} steps: raise --max-steps "
            "or lower --kills"
        )
    undisturbed, killed = _side(job, UNDISTURBED), _side(job, KILLED)
    with exclusive(job.folder.proof_lock, f"another proof is at work on {job.folder.name}"):
        for side in (undisturbed, killed):
            shutil.rmtree(side.run_dir, ignore_errors=True)
            side.run_dir.mkdir(parents=True)
        log.info("training undisturbed: %s", undisturbed.run_dir)
        start_up = _train_undisturbed(undisturbed, on_event)
        events = EVENTS.read(undisturbed.folder.events)
        moments = _moments(_intervals(events, start_up), config, last=job.training.steps)
        kills = _train_killed(killed, moments, Random(config.kill_seed), on_event)
        return compare(undisturbed, killed, kills, config.kills)


def _side(job: TrainingJob, name: str) -> TrainingJob:
    tracking = job.tracking.replace(run_name=f"{job.tracking.run_name}-{name}")
    return job.replace(run_dir=job.folder.inner(name).path, tracking=tracking)


def _train_undisturbed(job: TrainingJob, on_event: Callable[[Event], None]) -> float:
    """Train, and return the seconds that the start-up took."""
    start_up = 0.0

    def follow(event: Event) -> None:
        nonlocal start_up
        if isinstance(event, Started) and (ranks := _ranks(job)):
            start_up = event.time - ranks[0].create_time()
        on_event(event)

    train(job, follow)
    return start_up


def _train_killed(
    job: TrainingJob,
    moments: list[_Interval],
    random: Random,
    on_event: Callable[[Event], None],
) -> list[Kill]:
    """Train to the end, killed at a random point of each of `moments`.

    Each time, another rank is killed.

    Returns:
        the kills that came before the end of the training

    Raises:
        TrainingFailed: a training failed before it was killed.
    """
    kills: list[Kill] = []
    for moment in moments:
        tail, seconds = _tail(job), random.uniform(0, moment.seconds)
        with _killer(job, moment, seconds, turn=len(kills)) as struck:
            try:
                train(job, on_event)
                break  # the training ended before the moment came
            except TrainingFailed:
                if not struck.is_set():
                    raise
        newest = checkpoint.latest(job.folder.checkpoints)
        kill = Kill(
            aimed_at=moment.phase,
            moment=_seen(job, tail.new_records()),
            step=max((step for step, _ in _numbers(job)), default=0),
            resumed_at=checkpoint.step_of(newest) if newest else 0,
        )
        log.info("kill %d of %d: %s", len(kills) + 1, len(moments), kill.moment)
        kills.append(kill)
    else:
        train(job, on_event)
    return kills


@contextmanager
def _killer(
    job: TrainingJob, moment: _Interval, seconds: float, *, turn: int
) -> Iterator[threading.Event]:
    """Kill a rank of `job` some `seconds` after `moment` has begun.

    A start-up that takes less time than the undisturbed one is killed at its end.

    Yields:
        an event that is set once a rank was killed
    """
    struck, over = threading.Event(), threading.Event()
    tail = _tail(job)

    def begun() -> bool:
        if moment.phase == "start-up":
            return len(_ranks(job)) == job.training.workload.ranks
        return any(_reaches(event, moment) for event in tail.new_records())

    def outrun() -> bool:
        """True if this start-up is over although the undisturbed one took longer."""
        return moment.phase == "start-up" and bool(tail.new_records())

    def kill() -> None:
        while not begun():
            if over.wait(_POLL_SECONDS):
                return
        due = time.monotonic() + seconds
        while time.monotonic() < due and not outrun():
            if over.wait(_POLL_SECONDS):
                return
        if ranks := _ranks(job):
            ranks[turn % len(ranks)].kill()
            struck.set()

    thread = threading.Thread(target=kill, name="killer", daemon=True)
    thread.start()
    try:
        yield struck
    finally:
        over.set()
        thread.join()


def _tail(job: TrainingJob) -> Tail[Event]:
    """The events from now on."""
    return EVENTS.follow(job.folder.events, from_end=True)


def _ranks(job: TrainingJob) -> list[psutil.Process]:
    """The processes that train `job`."""
    file = str(job.folder.job)
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if file in process.cmdline():
                found.append((process.create_time(), process))
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return [process for _, process in sorted(found, key=lambda one: one[0])]


class _Milestone(NamedTuple):
    """An event that begins or ends an interval."""

    kind: str
    step: int
    time: float


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


def _reaches(event: Event, moment: _Interval) -> bool:
    """True if the moment begins with `event`, or before the checkpoint that was resumed from."""
    milestone = _milestone(event)
    if milestone is None or milestone.step < moment.step:
        return False
    return milestone.step > moment.step or milestone.kind in (moment.after, "started")


def _intervals(events: list[Event], start_up_seconds: float) -> list[_Interval]:
    """The intervals of an undisturbed training."""
    intervals = [_Interval("start-up", 0, "", start_up_seconds)]
    milestones = _milestones(events)
    phases: dict[str, Target] = {"loss": "training", "val_loss": "validation", "saved": "saving"}
    for number, milestone in enumerate(milestones):
        phase = phases.get(milestone.kind)
        if phase is None:
            continue
        before = milestones[number - 1]
        if phase == "saving":  # in the background, while other steps are done
            before = next(m for m in reversed(milestones[:number]) if m.step == milestone.step)
        seconds = max(0.0, milestone.time - before.time)
        intervals.append(_Interval(phase, before.step, before.kind, seconds))
    return intervals


def _moments(intervals: list[_Interval], config: ProofConfig, *, last: int) -> list[_Interval]:
    """One moment for each kill: all phases in turn, spread over the steps before the `last`.

    The training is cut into as many stretches as there are kills, and each moment lies in a stretch
    of its own or soon after: a resumed training does not repeat most of what came before.
    """
    random = Random(config.kill_seed)
    turns = (phase for _ in itertools.count() for phase in random.sample(TARGETS, len(TARGETS)))
    chosen = []
    for number, phase in enumerate(itertools.islice(turns, config.kills)):
        if phase == "start-up":
            chosen.append(intervals[0])
            continue
        begin, end = ((last - 1) * n / config.kills for n in (number, number + 1))
        ahead = [i for i in intervals[1:] if begin <= i.step < last]
        here = [i for i in ahead if i.step < end]
        of_phase = [i for i in here if i.phase == phase]
        # A stretch may lack the phase: then its next interval
        chosen.append(
            random.choice(of_phase)
            if of_phase
            else next((i for i in ahead if i.phase == phase), random.choice(here or ahead))
        )
    return chosen


def _seen(job: TrainingJob, events: list[Event]) -> str:
    """Where in the training a process was killed, from the events and files that it left."""
    milestones = _milestones(events)
    if not milestones:
        return "while starting up"
    if steps := checkpoint.unfinished(job.folder.checkpoints):
        return f"with the checkpoint of step {steps[0]} half written"
    done = {
        "started": "having started at step {}",
        "loss": "after step {}",
        "val_loss": "after the validation of step {}",
        "saved": "after the checkpoint of step {}",
    }
    return done[milestones[-1].kind].format(milestones[-1].step)


_Found = dict[tuple[int, str], str]
"""Value of every quantity, by step and name."""


def compare(undisturbed: TrainingJob, killed: TrainingJob, kills: list[Kill], asked: int) -> Proof:
    """Compare two finished trainings of one job.

    Args:
        kills: kills that hit the second training.
        asked: number of kills that were asked for.
    """
    numbers, numbers_killed = _numbers(undisturbed), _numbers(killed)
    tensors, tensors_killed = _tensors(undisturbed), _tensors(killed)
    difference = _first_difference(numbers, numbers_killed) or _first_difference(
        tensors, tensors_killed
    )
    if difference:
        reason = _explanation(difference, kills)
    elif not kills:
        reason = "the training ended before it could be killed: raise --max-steps"
    else:
        reason = f"killed {len(kills)} times, the training ended with the same bits"
    return Proof(
        passed=not difference and bool(kills),
        reason=reason,
        difference=difference,
        kills=tuple(kills),
        kills_asked=asked,
        steps=undisturbed.training.steps,
        numbers=len(numbers),
        tensors=len(tensors),
        sha256={UNDISTURBED: _sha256(tensors), KILLED: _sha256(tensors_killed)},
    )


def _numbers(job: TrainingJob) -> _Found:
    """Every logged number, to the bit."""
    found: _Found = {}
    for record in METRICS.read(job.folder.metrics):
        for quantity in _QUANTITIES:
            if (number := getattr(record, quantity, None)) is not None:
                key, value = (record.step, quantity), float(number).hex()
                # A record that comes twice is a difference
                found[key] = f"{found[key]} and {value}" if key in found else value
    return found


def _tensors(job: TrainingJob) -> _Found:
    """The sha256 of every tensor of the last checkpoint."""
    newest = checkpoint.latest(job.folder.checkpoints)
    assert newest is not None, "the last step is always saved"
    step = checkpoint.step_of(newest)
    return {(step, name): digest for name, digest in checkpoint.digests(newest).items()}


def _first_difference(undisturbed: _Found, killed: _Found) -> Mismatch | None:
    for key in sorted({**undisturbed, **killed}, key=lambda key: key[0]):
        ours, theirs = undisturbed.get(key, ""), killed.get(key, "")
        if ours != theirs:
            return Mismatch(step=key[0], quantity=key[1], undisturbed=ours, killed=theirs)
    return None


def _explanation(difference: Mismatch, kills: list[Kill]) -> str:
    ours, theirs = (value or "missing" for value in (difference.undisturbed, difference.killed))
    found = (
        f"step {difference.step} is the first that differs: {difference.quantity} {ours} "
        f"undisturbed, {theirs} killed"
    )
    resumed = [kill.resumed_at for kill in kills if kill.resumed_at]
    if difference.step <= min(resumed, default=difference.step):
        return (
            f"{found}. No checkpoint was resumed before it: on this device the same steps give "
            "other results each time, even undisturbed"
        )
    return (
        f"{found}. Something that training changes is not in the checkpoint, such as the state of "
        "a random-number generator"
    )


def _sha256(found: _Found) -> str:
    return hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()
