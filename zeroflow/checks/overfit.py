"""Proof that optimiser and gradients work: fresh weights learn one fixed batch by heart.

The same model class, optimiser, precision and compile settings as the run's, through the same
`train` loop. A model can learn a batch with a part of it frozen, so a gradient must have moved
every parameter as well. Runs in a process of its own: `-m zeroflow.checks.overfit JOB.json`.
"""

import logging
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field, PositiveInt
from torch import nn

from zeroflow import artifacts, records, reuse
from zeroflow.config import Config
from zeroflow.data.batches import MicroBatch
from zeroflow.data.rows import Rows
from zeroflow.data.shards import ShardSet
from zeroflow.reuse import CheckResult
from zeroflow.run_folder import RunFolder
from zeroflow.training import worker, zero
from zeroflow.training.batching import micro_batch
from zeroflow.training.config import TrainingConfig
from zeroflow.training.job import RankJob
from zeroflow.training.launch import launch
from zeroflow.training.loop import BatchSource, train
from zeroflow.training.schedule import Schedule
from zeroflow.training.state import TrainState, new_state
from zeroflow.training.worker import Stop
from zeroflow.training.workload import Workload

log = logging.getLogger("zeroflow.checks.overfit")

_ROWS = 4
_CONTEXT = 64
_WARMUP_STEPS = 5


class OverfitConfig(Config):
    """The check after training that one fixed batch can be learned by heart."""

    overfit_steps: PositiveInt = 150
    """Steps it may take at most."""

    overfit_loss: float = Field(0.1, gt=0, allow_inf_nan=False)
    """Loss it has to reach, in nats per token."""


class OverfitJob(RankJob):
    """Its training is the run's own; the check changes its batch and schedule."""

    shards: ShardSet
    limits: OverfitConfig
    compile_cache: Path | None = None
    """As of the run."""


class OverfitResult(CheckResult):
    """What the check leaves in overfit.json."""

    loss: float
    """Lowest of the curve."""

    steps: int
    reason: str
    curve: list[float]
    """Loss of every step."""


class OverfitFailed(RuntimeError):
    """The model could not learn one batch by heart."""

    def __init__(self, result: OverfitResult) -> None:
        super().__init__(f"overfit check: {result.reason}\nloss by step: {_curve(result)}")
        self.result = result


class FixedBatch(NamedTuple):
    """The same micro-batch at every step."""

    batch: MicroBatch

    def micro_batches(self, step: int) -> list[MicroBatch]:
        return [self.batch]


def check(job: OverfitJob) -> OverfitResult:
    """Run the check in a process of its own, unless the same one has been passed before.

    Raises:
        TrainingFailed: the process ended by an error.
    """
    before = _before(job.folder)
    if before and before.passed and before.job == _fingerprint(job):
        return before.replace(reused=True, why=reuse.PASSED)
    why = reuse.since(_identity(job), before)
    log.info("overfit check has to run: %s", why)
    artifacts.write_json(job.folder.overfit_job, job.model_dump(mode="json"))
    launch(
        "zeroflow.checks.overfit",
        job.folder.overfit_job,
        lambda event: None,
        ranks=job.training.workload.ranks,
        compile_cache=job.compile_cache,
    )
    result = OverfitResult.model_validate(artifacts.read_json(job.folder.overfit))
    return result.replace(why=why)


def overfit(
    state: TrainState,
    batches: BatchSource,
    config: TrainingConfig,
    limits: OverfitConfig,
    stop: Callable[[], bool] = lambda: False,
) -> OverfitResult | None:
    """Train `state` until its loss is below the limit, and judge what happened.

    Returns:
        None if `stop` said so between two steps.
    """
    before = {name: parameter.detach().clone() for name, parameter in _parameters(state)}
    curve: list[float] = []
    for metrics in islice(train(state, batches, config), limits.overfit_steps):
        if stop():
            return None
        curve.append(metrics.loss.item())
        if curve[-1] < limits.overfit_loss:
            break
    optimizer = config.workload.optimizer
    idle = [
        name
        for name, parameter in _parameters(state)
        if not optimizer.has_moved(state.optimizer, parameter, before[name])
    ]
    reached = min(curve) < limits.overfit_loss
    if not reached:
        reason = (
            f"the loss of one fixed batch went from {curve[0]:.4f} to {min(curve):.4f} in "
            f"{len(curve)} steps, not below {limits.overfit_loss}: gradients, optimiser or labels "
            "are broken, or --overfit-steps is too low for this model"
        )
    elif idle:
        reason = (
            f"{len(idle)} parameters learned nothing, such as {idle[0]}: they are frozen or "
            "cut off from the loss"
        )
    else:
        reason = f"loss {curve[-1]:.4f} after {len(curve)} steps"
    return OverfitResult(
        passed=reached and not idle,
        loss=min(curve),
        steps=len(curve),
        reason=reason,
        curve=curve,
    )


def settings(training: TrainingConfig, limits: OverfitConfig) -> TrainingConfig:
    """The run's training settings, for one small batch at a steady learning rate.

    The rate falls with the width, within what is usual: https://arxiv.org/abs/2203.03466. It is not
    the run's, which suits millions of tokens rather than a few hundred.
    """
    # Twice the steps, of which the check does the first half: no decay within it
    steps = 2 * limits.overfit_steps + _WARMUP_STEPS
    peak = min(1e-2, max(3e-4, 0.32 / training.workload.model.hidden_size))
    schedule = Schedule(name="wsd", peak=peak, warmup_steps=_WARMUP_STEPS, steps=steps)
    context = min(_CONTEXT, training.workload.seq_len)
    small = training.workload.replace(micro_batch_rows=_ROWS, accumulate=1, seq_len=context)
    return training.replace(workload=small, schedule=schedule)


def fixed_batch(rows: Rows, workload: Workload) -> FixedBatch:
    """The beginnings of the first training rows."""
    first = rows[np.arange(min(workload.micro_batch_rows, len(rows)))]
    return FixedBatch(micro_batch(first[:, : workload.seq_len + 1], rows, workload))


def _parameters(state: TrainState) -> Iterator[tuple[str, nn.Parameter]]:
    return zero.named_parameters(state.model)


def _before(folder: RunFolder) -> OverfitResult | None:
    path = folder.overfit
    return OverfitResult.model_validate(artifacts.read_json(path)) if path.exists() else None


def _fingerprint(job: OverfitJob) -> str:
    return artifacts.fingerprint(list(_identity(job).values()))


def _identity(job: OverfitJob) -> dict[str, Any]:
    """All that decides how the check ends; not the length of the run's own training."""
    config = settings(job.training, job.limits)
    return {
        "model": job.model.model_dump(mode="json"),
        "training": {**config.identity, "schedule": config.schedule.model_dump(mode="json")},
        "limits": job.limits.model_dump(mode="json"),
        "shards": job.shards.path.name,
    }


def _curve(result: OverfitResult) -> str:
    every = max(1, len(result.curve) // 20)
    shown = [*result.curve[:-1:every], result.curve[-1]]
    return " ".join(f"{loss:.3f}" for loss in shown)


def work(job: OverfitJob, stop: Stop) -> None:
    config = settings(job.training, job.limits)
    worker.make_deterministic()
    state = new_state(config)
    batch = fixed_batch(Rows(job.shards, "train"), config.workload)
    history = job.folder.events
    result = overfit(state, batch, config, job.limits, stop)
    if zero.rank() > 0:
        return
    if result is None:
        message = "the overfit check was stopped; the same command repeats it"
        records.append(history, {"event": "stopped", "message": message})
        return
    result = result.replace(job=_fingerprint(job), identity=_identity(job))
    artifacts.write_json(job.folder.overfit, result.model_dump(mode="json"))
    log.info("overfit check %s: %s", "passed" if result.passed else "FAILED", result.reason)
    records.append(history, {"event": "done"})


if __name__ == "__main__":
    worker.main(OverfitJob, work)
