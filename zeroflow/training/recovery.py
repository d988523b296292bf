"""Recovery from failures of training: remedies, and the ledger that records them.

After a failure, training starts again with the changes in the run's `ledger.jsonl`, which has an
entry for every failure with a remedy. An automatic retry, the same command in a shell and a retry
by Prefect all read this ledger, so all of them resume in the same way.
"""

import logging
import secrets
import time
from collections.abc import Callable

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from zeroflow.data.order import Skip
from zeroflow.records import JsonLines, Record
from zeroflow.run_folder import RunFolder
from zeroflow.training import checkpoint, hosts, tracked
from zeroflow.training.events import Event
from zeroflow.training.failures import FailureReason, TrainingFailed
from zeroflow.training.job import TrainingJob, TrainResult
from zeroflow.training.pulse import Pulse
from zeroflow.units import count, decimal

log = logging.getLogger(__name__)

MOST_RETRIES = 20
"""Maximum retries of one command. Each failure reason has its own lower limit."""

_MOST_STARTS = 3
"""Maximum number of consecutive starts that are killed or hang without a newer checkpoint."""

_ROLLBACKS = 3
"""Maximum number of roll-backs of a run."""

_FIRST_WAIT_SECONDS = 2.0
"""Wait before the first start after a kill or hang; each further wait is four times as long."""

PROCESS = secrets.randbits(48)
"""Identifies this process. A pid does not: in a container it may be the same at every start."""


class Entry(Record):
    """A failure and the change for the next start."""

    time: float
    """Seconds since the epoch."""

    process: int
    """Random number of the flow process that saw the failure."""

    reason: FailureReason
    step: NonNegativeInt
    """Step of the checkpoint that training resumes from; 0 for none."""

    message: str
    """The error, in one line."""

    action: str
    """The change, in words."""

    micro_batch_rows: PositiveInt | None = None
    """Rows of a micro-batch from now on; None if unchanged."""

    activation_checkpointing: bool = False
    """True if all activations are recomputed from now on."""

    skip: Skip | None = None
    """Window of the data to skip from now on."""


LEDGER: JsonLines[Entry] = JsonLines(Entry)
"""ledger.jsonl."""


def read(folder: RunFolder) -> list[Entry]:
    """Return the ledger of a run, oldest entry first."""
    return LEDGER.read(folder.ledger)


def current(planned: TrainingJob) -> TrainingJob:
    """Return the job with all changes of its run's ledger.

    The rows of a batch stay the same, except for skipped windows. The split into micro-batches and
    the activation recomputation may change.
    """
    ledger, workload = read(planned.folder), planned.training.workload
    for entry in ledger:
        if entry.micro_batch_rows and entry.micro_batch_rows < workload.micro_batch_rows:
            workload = workload.split(entry.micro_batch_rows)
        if entry.activation_checkpointing:
            workload = workload.replace(activation_checkpointing="full")
    skips = tuple(entry.skip for entry in ledger if entry.skip)
    return planned.replace(training=planned.training.replace(workload=workload), skips=skips)


def train(
    planned: TrainingJob,
    on_event: Callable[[Event | Pulse], None],
    launcher: hosts.Launcher = hosts.by_hand,
) -> TrainResult:
    """Train with the changes of the ledger, and add an entry for a failure that has a remedy.

    Args:
        launcher: brings the machines, if there are several. Restarts of their ranks are also added.

    Raises:
        TrainingFailed: `will_retry` is True if another call may succeed.
        TrainingStopped: training was stopped from outside after writing a checkpoint.
    """
    _back_off(read(planned.folder))

    def note_restart(failure: TrainingFailed) -> None:
        entry = remedy(planned, failure)
        if entry is None:
            raise failure
        _note_failure(planned.folder, entry)

    try:
        return tracked.train(current(planned), on_event, launcher=launcher, on_restart=note_restart)
    except TrainingFailed as failure:
        entry = remedy(planned, failure)
        if entry is None:
            failure.add_advice(advice(planned, failure))
            raise
        _note_failure(planned.folder, entry)
        failure.will_retry = True
        raise


def _note_failure(folder: RunFolder, entry: Entry) -> None:
    log.warning("training failed (%s): %s", entry.reason, entry.message)
    note(folder, entry)


def note(folder: RunFolder, entry: Entry) -> None:
    """Add `entry` to a run's ledger, so that it applies from now on, and log its action."""
    LEDGER.append(folder.ledger, entry)
    log.warning("%s", entry.action)


def remedy(planned: TrainingJob, failure: TrainingFailed) -> Entry | None:
    """Return an entry that may remedy `failure` of a job; None if no remedy is left."""
    ledger = read(planned.folder)
    newest = checkpoint.newest_step(planned.folder.checkpoints)
    entry = Entry(
        time=time.time(),
        process=PROCESS,
        reason=failure.reason,
        step=newest,
        message=str(failure).split("\n")[0],
        action="",
    )
    resumes = f"resumes from step {newest}"
    match failure.reason:
        case "killed" | "hang" if _starts_without_progress(ledger, newest) + 1 < _MOST_STARTS:
            # Ranks whose parent was killed may still be writing a checkpoint
            return entry.replace(action=f"{resumes}, or a later one that is being saved")
        case "out of memory":
            workload = current(planned).training.workload
            if workload.micro_batch_rows > 1:
                half = workload.split(workload.micro_batch_rows // 2)
                action = (
                    f"micro-batches of {count(half.micro_batch_rows, 'row')} instead of "
                    f"{workload.micro_batch_rows}, {half.accumulate} per step, with the same rows "
                    f"in the same order; {resumes}"
                )
                return entry.replace(action=action, micro_batch_rows=half.micro_batch_rows)
            if workload.activation_checkpointing != "full":
                action = f"recomputes all activations instead of keeping them; {resumes}"
                return entry.replace(action=action, activation_checkpointing=True)
        case "diverged" if failure.step is not None and _rollbacks(ledger) < _ROLLBACKS:
            skip = Skip(step=newest, batches=max(1, failure.step - newest))
            action = f"skips {_window(planned, skip)}; {resumes}"
            return entry.replace(action=action, skip=skip)
    return None


def _window(planned: TrainingJob, skip: Skip) -> str:
    """Describe the data of a window. After an earlier roll-back, the same steps read other data."""
    ends = np.array([skip.step, skip.step + skip.batches - 1])
    (first, last), steps = current(planned).order.batches(ends) + 1, ends + 1
    if first == last:
        return f"batch {first:,} of the data, which step {steps[0]:,} read"
    return (
        f"batches {first:,} to {last:,} of the data, which steps {steps[0]:,} to {steps[1]:,} read"
    )


def advice(planned: TrainingJob, failure: TrainingFailed) -> str:
    """Return advice for the user if no remedy is left for `failure`; may be empty."""
    match failure.reason:
        case "out of memory":
            state = planned.training.workload.optimizer.state_bytes(planned.model)
            size = decimal(8 * planned.model.parameters + state)
            return (
                "Micro-batches of one row with all activations recomputed do not fit. Weights, "
                f"gradients and the optimiser's state alone take {size}: shard them over more GPUs "
                "with --zero-stage 3, or use a device with more memory, or, under another "
                "--run-name, a smaller --size or a lower --seq-len"
            )
        case "diverged":
            return (
                f"{_ROLLBACKS} windows of data were skipped without success: lower "
                "--learning-rate or lengthen --warmup-steps, under another --run-name"
            )
        case "killed" | "hang":
            return f"Training was started {_MOST_STARTS} times without reaching a newer checkpoint"
    return ""


def _starts_without_progress(ledger: list[Entry], step: int) -> int:
    """Count this process's latest consecutive failed starts without a newer checkpoint."""
    count = 0
    for entry in reversed(ledger):
        mine = entry.process == PROCESS and entry.reason in ("killed", "hang")
        if not mine or entry.step != step:
            break
        count += 1
    return count


def _rollbacks(ledger: list[Entry]) -> int:
    return sum(entry.skip is not None for entry in ledger)


def _back_off(ledger: list[Entry]) -> None:
    """Wait before the next start if the machine may need time to recover."""
    if not ledger:
        return
    times = _starts_without_progress(ledger, ledger[-1].step)
    if times:
        seconds = _FIRST_WAIT_SECONDS * 4 ** (times - 1)
        log.info("waiting %.0f s before the next start", seconds)
        time.sleep(seconds)
