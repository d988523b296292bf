"""Proof that a run that is killed repeatedly ends with the same bits as an undisturbed run.

The same job is trained twice, in separate directories: once undisturbed, and once with kills.
There, a rank is killed by SIGKILL at random moments, and training resumes from the newest
checkpoint each time. Every logged number and every tensor of the last checkpoint must be the same.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from random import Random

from pydantic import NonNegativeInt

from zeroflow.checks import kills
from zeroflow.checks.kills import EventInterval, Target
from zeroflow.config import Config, WholeNonNegative, WholePositive
from zeroflow.records import Record
from zeroflow.training import checkpoint
from zeroflow.training.events import EVENTS, Event, Started
from zeroflow.training.failures import TrainingFailed
from zeroflow.training.job import TrainingJob
from zeroflow.training.metrics import METRICS
from zeroflow.training.ownership import exclusive
from zeroflow.training.processes import new_ranks
from zeroflow.training.pulse import Pulse
from zeroflow.training.tracked import train
from zeroflow.units import count

log = logging.getLogger(__name__)

UNDISTURBED, KILLED = "undisturbed", "killed"
"""Names of the two training runs, and of their directories inside the directory of the proof."""

_QUANTITIES = ("loss", "grad_norm", "val_loss")


class ProofConfig(Config):
    """Settings of the proof that resume is exact."""

    kills: WholePositive = 5
    """Number of times to kill training with SIGKILL."""

    kill_seed: WholeNonNegative = 0
    """Seed of the random moments of the kills."""


class Kill(Config):
    """One kill of the training process."""

    aimed_at: Target
    moment: str
    """Description of the moment, from the events and files of the run."""

    step: NonNegativeInt
    """Last step that was logged before the kill."""

    resumed_at: NonNegativeInt
    """Step from which training resumed; 0 for the beginning."""


class Mismatch(Config):
    """The first value that differs, in both runs; "" if a run does not have it."""

    step: int
    quantity: str
    """Name of a logged number, or of a tensor of the last checkpoint."""

    undisturbed: str
    killed: str


class Proof(Record):
    """Result of a proof, and what was compared: contents of proof.json."""

    passed: bool
    reason: str
    difference: Mismatch | None
    kills: tuple[Kill, ...]
    kills_asked: int
    steps: int
    numbers: int
    """Number of losses, gradient norms and validation losses that were compared bit for bit."""

    tensors: int
    """Number of tensors of weights, optimiser and random state that were compared by sha256."""

    sha256: dict[str, str]
    """For each run, a sha256 over the sha256 of all tensors."""


class ResumeInexact(RuntimeError):
    """The killed and the undisturbed run ended with different bits."""


def prove(
    job: TrainingJob,
    config: ProofConfig,
    on_event: Callable[[Event | Pulse], None] = lambda event: None,
) -> Proof:
    """Train `job` undisturbed and with kills, in subdirectories, and compare the results.

    The directories of an earlier proof are removed.

    Args:
        on_event: called with every new event of both runs.

    Raises:
        ValueError: losses are not logged at every step, or there are too few steps.
        TrainingFailed: training failed for a reason other than a kill, or another proof is running
            in this directory.
    """
    if job.cadence.log != 1:
        raise ValueError(
            f"a proof compares every step, but losses are logged every {job.cadence.log} steps: "
            "use --log-interval 1"
        )
    if config.kills >= job.training.steps:
        raise ValueError(
            f"--kills {config.kills} needs more than {count(job.training.steps, 'step')}: raise "
            "--max-steps or lower --kills"
        )
    undisturbed, killed = _side(job, UNDISTURBED), _side(job, KILLED)
    busy = f"another proof is running in {job.folder.name}"
    # A kept process would not start up again, and has the label of another folder
    with exclusive(job.folder.proof_lock, busy), new_ranks():
        for side in (undisturbed, killed):
            shutil.rmtree(side.run_dir, ignore_errors=True)
            side.run_dir.mkdir(parents=True)
        log.info("training undisturbed: %s", undisturbed.run_dir)
        start_up = _train_undisturbed(undisturbed, on_event)
        events = EVENTS.read(undisturbed.folder.events)
        chosen = kills.choose(
            kills.intervals(events, start_up),
            kills=config.kills,
            seed=config.kill_seed,
            last=job.training.steps,
        )
        done = _train_killed(killed, chosen, Random(config.kill_seed), on_event)
        return compare(undisturbed, killed, done, config.kills)


def _side(job: TrainingJob, name: str) -> TrainingJob:
    tracking = job.tracking.replace(run_name=f"{job.tracking.run_name}-{name}")
    return job.replace(run_dir=job.folder.inner(name).path, tracking=tracking)


def _train_undisturbed(job: TrainingJob, on_event: Callable[[Event | Pulse], None]) -> float:
    """Train to the end; return the start-up time of the ranks in seconds."""
    start_up = 0.0

    def follow(event: Event | Pulse) -> None:
        nonlocal start_up
        if isinstance(event, Started) and (ranks := kills.ranks_of(job)):
            start_up = event.time - ranks[0].create_time()
        on_event(event)

    train(job, follow)
    return start_up


def _train_killed(
    job: TrainingJob,
    chosen: list[EventInterval],
    random: Random,
    on_event: Callable[[Event | Pulse], None],
) -> list[Kill]:
    """Train to the end, killing a rank at a random time in each of the `chosen` intervals.

    Returns:
        The kills; fewer than `chosen` if training ended early.

    Raises:
        TrainingFailed: training failed before a kill.
    """
    done: list[Kill] = []
    for interval in chosen:
        tail, seconds = kills.follow(job), random.uniform(0, interval.seconds)
        with kills.killer(job, interval, seconds, turn=len(done)) as killed:
            try:
                train(job, on_event)
                break  # training ended before the interval began
            except TrainingFailed:
                if not killed.is_set():
                    raise
        newest = checkpoint.latest(job.folder.checkpoints)
        kill = Kill(
            aimed_at=interval.target,
            moment=kills.moment(job, tail.new_records()),
            step=max((step for step, _ in _numbers(job)), default=0),
            resumed_at=checkpoint.step_of(newest) if newest else 0,
        )
        log.info("kill %d of %d: %s", len(done) + 1, len(chosen), kill.moment)
        done.append(kill)
    else:
        train(job, on_event)
    return done


_Found = dict[tuple[int, str], str]
"""The value of every quantity at every step, as text."""


def compare(undisturbed: TrainingJob, killed: TrainingJob, done: list[Kill], asked: int) -> Proof:
    """Compare two finished runs of one job.

    Args:
        done: kills of the second run.
        asked: requested number of kills.
    """
    numbers, numbers_killed = _numbers(undisturbed), _numbers(killed)
    tensors, tensors_killed = _tensors(undisturbed), _tensors(killed)
    difference = _first_difference(numbers, numbers_killed) or _first_difference(
        tensors, tensors_killed
    )
    if difference:
        reason = _explanation(difference, done)
    elif not done:
        reason = "training ended before it could be killed: raise --max-steps"
    else:
        reason = f"training was killed {count(len(done), 'time')} and ended with the same bits"
    return Proof(
        passed=not difference and bool(done),
        reason=reason,
        difference=difference,
        kills=tuple(done),
        kills_asked=asked,
        steps=undisturbed.training.steps,
        numbers=len(numbers),
        tensors=len(tensors),
        sha256={UNDISTURBED: _sha256(tensors), KILLED: _sha256(tensors_killed)},
    )


def _numbers(job: TrainingJob) -> _Found:
    """Return every logged number, without rounding."""
    found: _Found = {}
    for record in METRICS.read(job.folder.metrics):
        for quantity in _QUANTITIES:
            if (number := getattr(record, quantity, None)) is not None:
                key, value = (record.step, quantity), float(number).hex()
                # A step that is logged twice is a difference
                found[key] = f"{found[key]} and {value}" if key in found else value
    return found


def _tensors(job: TrainingJob) -> _Found:
    """Return the sha256 of every tensor of the last checkpoint."""
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


def _explanation(difference: Mismatch, done: list[Kill]) -> str:
    ours, theirs = (value or "missing" for value in (difference.undisturbed, difference.killed))
    found = (
        f"step {difference.step} is the first that differs: {difference.quantity} is {ours} in the "
        f"undisturbed run and {theirs} in the killed run"
    )
    resumed = [kill.resumed_at for kill in done if kill.resumed_at]
    if difference.step <= min(resumed, default=difference.step):
        return (
            f"{found}. Training had not resumed before this step, so on this machine the same "
            "steps give different results each time, even without kills"
        )
    return (
        f"{found}. The checkpoint lacks something that training changes, such as the state of a "
        "random-number generator"
    )


def _sha256(found: _Found) -> str:
    return hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()
