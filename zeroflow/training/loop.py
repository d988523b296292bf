"""One step, and the loop that yields after each; whoever runs it logs, saves and stops."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from zeroflow.data.batches import MicroBatch
from zeroflow.model.llama import Llama
from zeroflow.training import zero
from zeroflow.training.config import TrainingConfig
from zeroflow.training.goodput import Phase
from zeroflow.training.loss import cross_entropy_sum
from zeroflow.training.state import TrainState


class StepMetrics(NamedTuple):
    loss: Tensor
    """Mean over the valid targets of the step, on the device."""

    grad_norm: Tensor
    """Global norm before clipping, on the device."""

    learning_rate: float


class BatchSource(Protocol):
    def micro_batches(self, step: int) -> list[MicroBatch]: ...


def loss_sum(model: Llama, batch: MicroBatch, z_loss: float = 0.0) -> Tensor:
    """Sum of the loss over the valid targets of `batch`, on the model's device."""
    device = model.model.embed_tokens.weight.device
    there = partial(Tensor.to, device=device, non_blocking=True)
    loss = partial(cross_entropy_sum, targets=there(batch.targets), z_loss=z_loss)
    documents = None if batch.documents is None else there(batch.documents)
    total: Tensor = model(there(batch.inputs), loss, documents)
    return total


def _unobserved(phase: Phase) -> None:
    pass


def train_step(
    state: TrainState,
    micro_batches: list[MicroBatch],
    config: TrainingConfig,
    enter: Callable[[Phase], None] = _unobserved,
) -> StepMetrics:
    """Advance `state` by one optimiser step over the mean loss of all valid targets.

    A loss or gradient that is no finite number leaves weights and moments as they are; that is
    decided on the device, which nobody waits for, and counted in `state.skipped`.

    Args:
        enter: called as each phase begins.
    """
    enter("forward_backward")
    learning_rate = config.schedule.learning_rate(state.step)
    config.optimizer.set_learning_rate(state.optimizer, learning_rate)
    # Ranks have more or fewer valid targets. Losses and gradients are means over ranks
    share = zero.total(sum(batch.valid for batch in micro_batches)) / zero.ranks()
    losses = []
    for left, batch in zip(reversed(range(len(micro_batches))), micro_batches, strict=True):
        loss = loss_sum(state.model, batch, config.z_loss) / share
        zero.before_backward(state.model, config.workload.zero_stage, last=left == 0)
        loss.backward()
        losses.append(loss.detach())  # no .item(): it would wait for the GPU

    if config.workload.ranks > 1:
        enter("communication")
    loss = zero.mean(torch.stack(losses).sum())
    enter("optimizer")
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.optimizer.max_grad_norm)
    grad_norm = zero.full_tensor(norm)
    broken = ~torch.isfinite(loss + grad_norm)
    config.optimizer.step(state.optimizer, skip=broken)
    state.optimizer.zero_grad()
    state.skipped += broken
    state.skipped[0] *= broken
    state.step += 1
    return StepMetrics(loss, grad_norm, learning_rate)


def train(
    state: TrainState,
    batches: BatchSource,
    config: TrainingConfig,
    enter: Callable[[Phase], None] = _unobserved,
) -> Iterator[StepMetrics]:
    """Train from `state.step` to the last step, yielding after each.

    Args:
        enter: called as each phase begins.
    """
    while state.step < config.steps:
        enter("data")
        micro_batches = batches.micro_batches(state.step)
        yield train_step(state, micro_batches, config, enter)
