"""What is done about a training that failed, and the ledger that says so.

A failed training is started again with the job that follows from the run's `ledger.jsonl`: an
entry for every failure that something could be done about. A retry, the same command in a shell
and a retry by Prefect all read the same ledger, so that all go on in the same way.
"""

import logging
import secrets
import time
from collections.abc import Callable

from pydantic import NonNegativeInt, PositiveInt

from zeroflow import records
from zeroflow.config import Config
from zeroflow.data.batches import Skip
from zeroflow.run_folder import RunFolder
from zeroflow.training import checkpoint, launch
from zeroflow.training.job import FailureReason, TrainingFailed, TrainingJob, TrainResult
from zeroflow.units import decimal

log = logging.getLogger(__name__)

MOST_RETRIES = 20
"""Of one command. Each reason has a limit of its own, which is lower."""

_IN_VAIN = 3
_ROLLBACKS = 3
_FIRST_WAIT_SECONDS = 2.0
_PROCESS = secrets.randbits(48)
"""Of this process. Its id would come again: in a container it is the same at every start."""


class Entry(Config):
    """A failure and what was changed for the next start."""

    time: float
    process: int
    """A number of the flow process that saw it; another one has another."""

    reason: FailureReason
    step: NonNegativeInt
    """Of the checkpoint that training goes on from; 0 for none."""

    message: str
    action: str
    micro_batch_rows: PositiveInt | None = None
    activation_checkpointing: bool = False
    skip: Skip | None = None


def read(folder: RunFolder) -> list[Entry]:
    """The ledger of a run, oldest first."""
    return [Entry.model_validate(line) for line in records.read(folder.ledger)]


def applied(planned: TrainingJob, ledger: list[Entry]) -> TrainingJob:
    """The job with all that the ledger has changed about it.

    The rows of every step stay the same: only how they are split into micro-batches changes, and
    which windows of the data are left out.
    """
    workload = planned.training.workload
    for entry in ledger:
        if entry.micro_batch_rows and entry.micro_batch_rows < workload.micro_batch_rows:
            workload = workload.split(entry.micro_batch_rows)
        if entry.activation_checkpointing:
            workload = workload.replace(activation_checkpointing="full")
    skips = tuple(entry.skip for entry in ledger if entry.skip)
    return planned.replace(training=planned.training.replace(workload=workload), skips=skips)


def train(planned: TrainingJob, on_event: Callable[[records.Line], None]) -> TrainResult:
    """Train as the ledger says; a failure that can be helped is noted there, for another call.

    Raises:
        TrainingFailed: `will_retry` says whether another call has a chance.
        TrainingStopped: it was stopped from outside after writing a checkpoint.
    """
    ledger = read(planned.folder)
    now = applied(planned, ledger)
    _back_off(ledger)
    try:
        return launch.train(now, on_event)
    except TrainingFailed as failure:
        entry = remedy(now, failure, ledger)
        if entry is None:
            failure.add_advice(advice(now, failure))
            raise
        log.warning("training failed (%s): %s", entry.reason, entry.message)
        note(planned.folder, entry)
        failure.will_retry = True
        raise


def note(folder: RunFolder, entry: Entry) -> None:
    """Add `entry` to a run's ledger, aloud; from then on it is applied."""
    records.append(folder.ledger, entry.model_dump(mode="json"))
    log.warning("%s", entry.action)


def remedy(now: TrainingJob, failure: TrainingFailed, ledger: list[Entry]) -> Entry | None:
    """What to do about `failure` of the job `now`; None if nothing would help."""
    newest = checkpoint.newest_step(now.folder.checkpoints)
    base = {
        "time": time.time(),
        "process": _PROCESS,
        "reason": failure.reason,
        "step": newest,
        "message": str(failure).split("\n")[0],
    }
    goes_on = f"goes on from step {newest}"
    match failure.reason:
        case "killed" | "hang" if _in_vain(ledger, newest) + 1 < _IN_VAIN:
            # What is left of a training whose parent was killed saves once more
            return Entry(**base, action=f"{goes_on}, or a later one that is being saved")
        case "out of memory":
            workload = now.training.workload
            if workload.micro_batch_rows > 1:
                half = workload.split(workload.micro_batch_rows // 2)
                action = (
                    f"micro-batches of {half.micro_batch_rows} rows instead of "
                    f"{workload.micro_batch_rows}, {half.accumulate} of them a step, the same rows "
                    f"in the same order; {goes_on}"
                )
                return Entry(**base, action=action, micro_batch_rows=half.micro_batch_rows)
            if workload.activation_checkpointing == "none":
                action = f"activations are computed again instead of kept; {goes_on}"
                return Entry(**base, action=action, activation_checkpointing=True)
        case "diverged" if failure.step is not None and _rollbacks(ledger) < _ROLLBACKS:
            skip = Skip(step=newest, batches=max(1, failure.step - newest))
            action = f"leaves out the data of steps {newest + 1} to {failure.step}; {goes_on}"
            return Entry(**base, action=action, skip=skip)
    return None


def advice(now: TrainingJob, failure: TrainingFailed) -> str:
    """What a person may do about `failure`, as nothing else is left; may be empty."""
    match failure.reason:
        case "out of memory":
            state = now.training.workload.optimizer.state_bytes(now.model)
            size = decimal(8 * now.model.parameters + state)
            return (
                "micro-batches of one row with all activations recomputed do not fit. Weights, "
                f"gradients and the optimiser's state alone take {size}: shard them over more GPUs "
                "with --zero-stage 3, or use a smaller size, a lower --seq-len or a device with "
                "more memory"
            )
        case "diverged":
            return (
                f"{_ROLLBACKS} windows of data have been left out in vain: lower --learning-rate "
                "or lengthen --warmup-steps, under another --run-name"
            )
        case "killed" | "hang":
            return f"it was started {_IN_VAIN} times without getting to another checkpoint"
    return ""


def _in_vain(ledger: list[Entry], step: int) -> int:
    """Starts by this process in a row that ended without a newer checkpoint."""
    count = 0
    for entry in reversed(ledger):
        mine = entry.process == _PROCESS and entry.reason in ("killed", "hang")
        if not mine or entry.step != step:
            break
        count += 1
    return count


def _rollbacks(ledger: list[Entry]) -> int:
    return sum(entry.skip is not None for entry in ledger)


def _back_off(ledger: list[Entry]) -> None:
    """Wait where the failure may be of a machine that needs time."""
    if not ledger:
        return
    times = _in_vain(ledger, ledger[-1].step)
    if times:
        seconds = _FIRST_WAIT_SECONDS * 4 ** (times - 1)
        log.info("waiting %.0f s before the next start", seconds)
        time.sleep(seconds)
