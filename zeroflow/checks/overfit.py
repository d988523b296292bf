"""Check after training: fresh weights must be able to overfit one fixed batch.

It uses the run's own model, optimiser, precision and compile settings, and the same `train` loop. A
partly frozen model can still overfit a batch, so gradients must also have changed every parameter.
The limit is relative to the lowest possible loss, which is above 0 if different tokens follow equal
contexts: no model can predict which one comes. The check is a job of the ranks.
"""

import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import nn

from zeroflow import artifacts, reuse
from zeroflow.checks.check import Check, named
from zeroflow.config import Config, WholePositive
from zeroflow.data.batches import IGNORED, MicroBatch
from zeroflow.data.rows import Rows
from zeroflow.data.shards import ShardSet
from zeroflow.reuse import CheckResult, Identity
from zeroflow.training import zero
from zeroflow.training.batching import micro_batch
from zeroflow.training.config import TrainingConfig
from zeroflow.training.events import EVENTS, Done, Event, Stopped
from zeroflow.training.job import RankJob
from zeroflow.training.launch import launch
from zeroflow.training.loop import BatchSource, train
from zeroflow.training.pulse import Pulse, PulseWriter
from zeroflow.training.rank_program import RankProgram, make_deterministic
from zeroflow.training.schedule import Schedule
from zeroflow.training.state import TrainState, new_state
from zeroflow.training.stopping import Stop
from zeroflow.training.workload import Workload
from zeroflow.units import count

log = logging.getLogger("zeroflow.checks.overfit")

_ROWS = 4
"""Rows of the batch."""

_CANDIDATES = 64
"""Training rows from which the rows of the batch are chosen."""

_CONTEXT = 64
"""Maximum context: with 4 rows, even tiny memorises the batch in about 30 steps."""

_WARMUP_STEPS = 5
"""Steps of linear warm-up to the peak learning rate."""


_MORE = 1.5
"""Maximum number of steps, relative to `overfit_steps`, if the loss is still falling then. The
learning rate is constant for more steps than that."""

_RECENT = 20
"""Number of steps in which a loss that is falling becomes a fifth lower."""


class OverfitConfig(Config):
    """Check after training that the model can overfit one fixed batch."""

    overfit_steps: WholePositive = 150
    """Maximum number of steps, and half as many more if the loss is still falling then."""

    overfit_loss: float = Field(0.1, gt=0, allow_inf_nan=False)
    """Loss that the check must reach, in nats per token above the lowest possible loss."""


class OverfitJob(RankJob):
    """Job of the ranks of an overfit check, with the training settings of the run."""

    shards: ShardSet
    limits: OverfitConfig
    compile_cache: Path | None = None
    """Folder for compiled code; None for PyTorch's default."""


class OverfitResult(CheckResult):
    """Contents of overfit.json."""

    loss: float
    """Lowest loss of the curve."""

    steps: int
    reason: str
    curve: list[float]
    """Loss of every step."""

    least_loss: float = 0.0
    """Lowest loss that a model can reach on the batch."""


class OverfitFailed(RuntimeError):
    """The model could not overfit one batch, or a parameter did not learn."""

    def __init__(self, result: OverfitResult) -> None:
        super().__init__(f"overfit check: {result.reason}\nloss by step: {_curve(result)}")
        self.result = result


class FixedBatch(NamedTuple):
    """A batch source with the same micro-batch at every step."""

    batch: MicroBatch

    def micro_batches(self, step: int) -> list[MicroBatch]:
        return [self.batch]


def check(
    job: OverfitJob, on_event: Callable[[Event | Pulse], None] = lambda event: None
) -> OverfitResult:
    """Run the check in its own ranks, unless the same check has passed before.

    Raises:
        TrainingFailed: a rank ended with an error.
    """
    before = OverfitResult.read_if_exists(job.folder.overfit)
    if before and before.passed and before.job == _fingerprint(job):
        return before.replace(reused=True, why=reuse.PASSED)
    why = reuse.since(_identity(job), before, named)
    log.info("running the overfit check: %s", why)
    job.write(job.folder.overfit_job)
    launch(
        "zeroflow.checks.overfit",
        job.folder.overfit_job,
        on_event,
        ranks=job.training.workload.ranks,
        compile_cache=job.compile_cache,
    )
    return OverfitResult.read(job.folder.overfit).replace(why=why)


def overfit(
    state: TrainState,
    batches: BatchSource,
    config: TrainingConfig,
    limits: OverfitConfig,
    stop: Callable[[], bool] = lambda: False,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    *,
    least: float = 0.0,
) -> OverfitResult | None:
    """Train `state` until its loss is below the limit, and return the result.

    Args:
        on_step: called after each step with its number and its loss.
        least: lowest loss that a model can reach on the batches.

    Returns:
        None if `stop` returned True after a step.
    """
    limit = limits.overfit_loss + least
    before = {name: parameter.detach().clone() for name, parameter in _parameters(state)}
    curve: list[float] = []
    for metrics in islice(train(state, batches, config), int(_MORE * limits.overfit_steps)):
        if stop():
            return None
        curve.append(metrics.loss.item())
        on_step(len(curve), curve[-1])
        if curve[-1] < limit or (len(curve) >= limits.overfit_steps and not _is_falling(curve)):
            break
    optimizer = config.workload.optimizer
    idle = [
        name
        for name, parameter in _parameters(state)
        if not optimizer.has_moved(state.optimizer, parameter, before[name])
    ]
    reached = min(curve) < limit
    if not reached:
        reason = _not_reached(curve, limits, least)
    elif idle:
        reason = (
            f"gradients did not change {count(len(idle), 'parameter')}, for example {idle[0]}: "
            "frozen, or detached from the loss"
        )
    else:
        reason = f"loss {curve[-1]:.4f} after {count(len(curve), 'step')}{beyond(least)}"
    return OverfitResult(
        passed=reached and not idle,
        loss=min(curve),
        steps=len(curve),
        reason=reason,
        curve=curve,
        least_loss=least,
    )


def _not_reached(curve: list[float], limits: OverfitConfig, least: float) -> str:
    """Return the reason for a loss that stays above the limit."""
    limit = limits.overfit_loss + least
    of_which = f" (the lowest possible is {least:.4f})" if least else ""
    why = (
        f"it was still falling: raise --overfit-steps, now {limits.overfit_steps}"
        if _is_falling(curve)
        else "it was hardly falling any more: gradients, optimiser or labels are broken, or "
        f"the model is too small for {limits.overfit_steps} steps (--overfit-steps)"
    )
    return (
        f"the loss of one fixed batch went from {curve[0]:.4f} to {min(curve):.4f} in "
        f"{count(len(curve), 'step')}, not below {limit:.4g}{of_which}; {why}"
    )


def _is_falling(curve: list[float]) -> bool:
    number = max(1, min(_RECENT, len(curve) // 2))
    before, recent = curve[:-number], curve[-number:]
    return not before or min(recent) < 0.8 * min(before)


def beyond(least: float | None) -> str:
    """Return the end of a sentence about a loss: the lowest possible loss, unless that is 0."""
    return f", the lowest possible is {least:.4f}" if least else ""


def least_loss(batch: MicroBatch) -> float:
    """Return the lowest mean loss that our models can reach on `batch`, in nats per token.

    This is the entropy of the targets that follow equal contexts. A context is the part of a row
    that a position attends to: the tokens so far, or those of its own document. A context that
    repeats one token counts as that token alone, for any number of repetitions, because attention
    over equal values returns that value.
    """
    following: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    documents = batch.documents if batch.documents is not None else batch.inputs * 0
    rows = zip(batch.inputs.tolist(), batch.targets.tolist(), documents.tolist(), strict=True)
    for tokens, targets, numbers in rows:
        for place, target in enumerate(targets):
            if target != IGNORED:
                context = tokens[numbers.index(numbers[place]) : place + 1]
                different = context if len(set(context)) > 1 else context[:1]
                following[tuple(different)][target] += 1
    nats = sum(
        count * math.log(counts.total() / count)
        for counts in following.values()
        for count in counts.values()
    )
    return nats / max(1, batch.valid)


def batch_check(rows: Rows, training: TrainingConfig) -> Check:
    """Pre-flight check that the batch of the overfit check has something to learn."""
    workload = settings(training, OverfitConfig()).workload
    [batch] = fixed_batch(rows, workload).micro_batches(0)
    least = least_loss(batch)
    sentence = (
        "This is the lowest loss that a model can reach on the overfit check's "
        f"{count(batch.valid, 'target')}; fresh weights begin at about "
        f"{math.log(workload.model.vocab_size):.1f}"
    )
    if not batch.valid:
        sentence = (
            f"The first {_CANDIDATES} rows begin with padding only, so the overfit check has "
            "nothing to learn: look at `zeroflow data`"
        )
    return Check(
        name="overfit batch", passed=batch.valid > 0, figure=f"{least:.4f} nats", sentence=sentence
    )


def settings(training: TrainingConfig, limits: OverfitConfig) -> TrainingConfig:
    """Return the run's training settings with one small batch and a constant learning rate.

    The learning rate of the run is chosen for batches of up to millions of tokens, so the check has
    its own. It decreases with the width, within usual limits: https://arxiv.org/abs/2203.03466
    """
    # The check runs only the first half of these steps, so it ends before the decay
    steps = 2 * limits.overfit_steps + _WARMUP_STEPS
    peak = min(1e-2, max(3e-4, 0.32 / training.workload.model.hidden_size))
    schedule = Schedule(name="wsd", peak=peak, warmup_steps=_WARMUP_STEPS, steps=steps)
    context = min(_CONTEXT, training.workload.seq_len)
    small = training.workload.replace(micro_batch_rows=_ROWS, accumulate=1, seq_len=context)
    return training.replace(workload=small, schedule=schedule)


def fixed_batch(rows: Rows, workload: Workload) -> FixedBatch:
    """Return a batch of the beginnings of those training rows that have the least padding.

    Only the first rows of the split are considered.
    """
    first = rows[np.arange(min(_CANDIDATES, len(rows)))][:, : workload.seq_len + 1]
    targets = (micro_batch(first, rows, workload).targets != IGNORED).sum(dim=1).numpy()
    fullest = np.argsort(-targets, kind="stable")[: workload.micro_batch_rows]
    return FixedBatch(micro_batch(first[fullest], rows, workload))


def _parameters(state: TrainState) -> Iterator[tuple[str, nn.Parameter]]:
    return zero.named_parameters(state.model)


def _fingerprint(job: OverfitJob) -> str:
    return artifacts.fingerprint(list(_identity(job).values()))


def _identity(job: OverfitJob) -> Identity:
    """Return everything that affects the result. The number of steps of the run does not."""
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
    make_deterministic()
    if config.workload.compile:  # PyTorch limits the number of shapes, and training had others
        torch.compiler.reset()
    state = new_state(config)
    batches = fixed_batch(Rows(job.shards, "train"), config.workload)
    least = least_loss(batches.batch)
    pulses = PulseWriter(job.folder.alive)

    def show(step: int, loss: float) -> None:
        if zero.rank() == 0:
            total = max(step, job.limits.overfit_steps)
            pulses(Pulse("overfit check", step, total, f"loss {loss:.4f}"))

    result = overfit(state, batches, config, job.limits, stop, show, least=least)
    if zero.rank() > 0:
        return
    if result is None:
        message = "the overfit check was stopped; the same command repeats it"
        EVENTS.append(job.folder.events, Stopped(time=time.time(), message=message))
        return
    result = result.replace(job=_fingerprint(job), identity=_identity(job))
    result.write(job.folder.overfit)
    if result.passed:  # else the error has the reason
        log.info("overfit check passed: %s", result.reason)
    EVENTS.append(job.folder.events, Done(time=time.time()))


PROGRAM = RankProgram(OverfitJob, work)
