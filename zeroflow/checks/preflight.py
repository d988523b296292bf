"""Checks before training. They take seconds and can save hours of a broken run.

They use the run's own model, data, device, precision and compile settings, and call the functions
of training. If a check fails, the run ends before its first step. A micro-batch that does not fit
in memory is halved first, as during training. The checks are a job of the ranks.

The checks are in `data_checks`, `model_checks` and `step_checks`; the check of the overfit check's
batch is in `overfit`.
"""

import logging
import shutil
import time
from collections.abc import Iterator

import torch

from zeroflow import artifacts, reuse
from zeroflow.checks import data_checks, model_checks, overfit, step_checks
from zeroflow.checks.check import Check, named, on_every_rank
from zeroflow.data.rows import Rows
from zeroflow.data.shards import ShardSet
from zeroflow.data.tokenizer import Tokenizer
from zeroflow.reuse import CheckResult, Identity
from zeroflow.run_folder import RunFolder
from zeroflow.training import recovery, zero
from zeroflow.training.events import EVENTS, Done, Stopped
from zeroflow.training.failures import RunIsBusy, TrainingFailed
from zeroflow.training.job import RankJob, TrainingJob
from zeroflow.training.launch import launch
from zeroflow.training.rank_program import RankProgram, make_deterministic
from zeroflow.training.state import new_state
from zeroflow.training.stopping import Stop
from zeroflow.units import count

log = logging.getLogger("zeroflow.checks.preflight")


class PreflightJob(RankJob):
    """Job of the ranks of a pre-flight, with micro-batches of the same shape as in training."""

    shards: ShardSet
    tokenizer: Tokenizer
    identity: Identity
    """Everything that affects the result."""


class PreflightResult(CheckResult):
    """Contents of preflight.json."""

    seconds: float
    checks: list[Check]


class PreflightFailed(RuntimeError):
    """A pre-flight check failed."""

    def __init__(self, result: PreflightResult) -> None:
        failed = [check for check in result.checks if not check.passed]
        lines = "\n".join(f"  {check.name}: {check.figure}. {check.sentence}" for check in failed)
        super().__init__(
            f"pre-flight: {len(failed)} of {count(len(result.checks), 'check')} failed, so nothing "
            f"was trained:\n{lines}\n--skip-preflight trains without the checks"
        )
        self.result = result
        self.may_succeed = all(check.may_pass_again for check in failed)
        """True if the same command may succeed when it is repeated."""


def read(folder: RunFolder) -> PreflightResult | None:
    """Return the result of a run's pre-flight; None if there was none."""
    return PreflightResult.read_if_exists(folder.preflight)


def check(job: TrainingJob, *, trained: bool = False) -> PreflightResult | None:
    """Run the checks of `job` in separate ranks, unless they passed before on this kind of device.

    If the ranks run out of memory, a smaller micro-batch is recorded in the run's ledger, as during
    training, and the checks run again. So training starts with a micro-batch that fits.

    Args:
        trained: True if the job is finished. Then the earlier result is returned, even if inputs of
            the checks have changed.

    Returns:
        None if the job is finished and was never checked.

    Raises:
        TrainingFailed: a rank failed for a reason other than running out of memory.
    """
    identity, before = _identity(job), read(job.folder)
    if before and before.passed and before.job == _fingerprint(identity):
        return before.replace(reused=True, why=reuse.PASSED)
    if trained:
        return before and before.replace(reused=True, why=reuse.TRAINED)
    why = reuse.since(identity, before, named)
    log.info("running the pre-flight checks: %s", why)
    return _check(job, identity).replace(why=why)


def _check(job: TrainingJob, identity: Identity) -> PreflightResult:
    while True:
        try:
            return _launched(recovery.current(job), identity)
        except RunIsBusy:
            raise
        except TrainingFailed as failure:
            if failure.reason != "out of memory":
                failure.add_advice("the pre-flight checks failed, so nothing was trained")
                raise
            if (entry := recovery.remedy(job, failure)) is None:
                return _does_not_fit(job, failure, identity)
            recovery.note(job.folder, entry)


def _launched(now: TrainingJob, identity: Identity) -> PreflightResult:
    job = PreflightJob(
        run_dir=now.run_dir,
        training=now.training.on_one_machine,
        shards=now.shards,
        tokenizer=now.tokenizer,
        identity=identity,
    )
    job.write(job.folder.preflight_job)
    try:
        launch(
            "zeroflow.checks.preflight",
            job.folder.preflight_job,
            lambda event: None,
            ranks=job.training.workload.ranks,
            compile_cache=now.compile_cache,
        )
    finally:
        # A rank that was killed has not removed it
        shutil.rmtree(job.folder.preflight_checkpoint, ignore_errors=True)
    result = read(job.folder)
    assert result is not None, "rank 0 writes it before it exits"
    return result


def _does_not_fit(job: TrainingJob, failure: TrainingFailed, identity: Identity) -> PreflightResult:
    sentence = f"{recovery.advice(job, failure)} ({str(failure).splitlines()[0]})"
    check = Check(name="micro-batch", passed=False, figure="1 row does not fit", sentence=sentence)
    result = _result(identity, [check], seconds=0.0)
    result.write(job.folder.preflight)
    return result


def _result(identity: Identity, done: list[Check], *, seconds: float) -> PreflightResult:
    return PreflightResult(
        passed=all(check.passed for check in done),
        seconds=seconds,
        checks=done,
        job=_fingerprint(identity),
        identity=identity,
    )


def _fingerprint(identity: Identity) -> str:
    return artifacts.fingerprint(list(identity.values()))


def _identity(job: TrainingJob) -> Identity:
    """Return everything that affects the result. The number of steps of the run does not."""
    return {
        "model": job.model.model_dump(mode="json"),
        "training": job.training.identity,
        "learning_rate": job.training.schedule.peak,
        "shards": job.shards.path.name,
        "tokenizer": job.tokenizer.fingerprint,
        "device": job.training.workload.device_name,
        "torch": torch.__version__,
    }


def checks(job: PreflightJob) -> Iterator[Check]:
    """Yield each check in turn, with its result over all ranks."""
    data_is_sound = True
    for check in data_checks.checks(job.shards, job.tokenizer, job.model):
        data_is_sound = data_is_sound and check.passed
        yield check
    state = new_state(job.training)
    yield from map(on_every_rank, model_checks.checks(state, job.training))
    rows = Rows(job.shards, "train") if data_is_sound else None
    if rows is not None:
        yield on_every_rank(overfit.batch_check(rows, job.training))
    folder, tokenizer = job.folder.preflight_checkpoint, job.tokenizer.fingerprint
    yield from map(
        on_every_rank, step_checks.checks(state, job.training, rows, folder, tokenizer=tokenizer)
    )


def work(job: PreflightJob, stop: Stop) -> None:
    begin = time.monotonic()
    if job.training.workload.deterministic:
        make_deterministic()
    done: list[Check] = []
    stopped = False
    for check in checks(job):
        if check.passed:
            level = logging.WARNING if check.warning else logging.INFO
            log.log(level, "pre-flight: %s: %s. %s", check.name, check.figure, check.sentence)
        done.append(check)
        if stopped := stop():
            break
    if zero.rank() > 0:
        return
    if stopped:
        message = "the pre-flight was stopped; the same command repeats it"
        EVENTS.append(job.folder.events, Stopped(time=time.time(), message=message))
        return
    result = _result(job.identity, done, seconds=time.monotonic() - begin)
    result.write(job.folder.preflight)
    verdict = "passed" if result.passed else "FAILED"
    found = count(len(done), "check")
    log.info("pre-flight %s: %s in %.1f s", verdict, found, result.seconds)
    EVENTS.append(job.folder.events, Done(time=time.time()))


PROGRAM = RankProgram(PreflightJob, work)
