"""The training step, and a loop that yields after each step, so that its caller can log and
save."""

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
from zeroflow.training.loss import LossKernel, cross_entropy_sum
from zeroflow.training.state import TrainState


class StepMetrics(NamedTuple):
    loss: Tensor
    """Mean over the valid targets of the step, on the device."""

    grad_norm: Tensor
    """Global norm before clipping, on the device, or on the CPU if gradients are offloaded."""

    learning_rate: float


class BatchSource(Protocol):
    """Provides the micro-batches of a step; `Batches` is one."""

    def micro_batches(self, step: int) -> list[MicroBatch]: ...


def loss_sum(
    model: Llama, batch: MicroBatch, z_loss: float = 0.0, kernel: LossKernel = "chunks"
) -> Tensor:
    """Return the loss summed over the valid targets of `batch`, a scalar on the model's device."""
    return forward(model, batch, partial(cross_entropy_sum, z_loss=z_loss, kernel=kernel))


def forward(model: Llama, batch: MicroBatch, loss_of: Callable[..., Tensor]) -> Tensor:
    """Run the model on `batch`, and return `loss_of(hidden states, output matrix, targets)`."""
    device = zero.device_of(model)
    on_device = partial(Tensor.to, device=device, non_blocking=True)
    head = partial(loss_of, targets=on_device(batch.targets))
    documents = None if batch.documents is None else on_device(batch.documents)
    loss: Tensor = model(on_device(batch.inputs), head, documents)
    return loss


def _unobserved(phase: Phase) -> None:
    pass


def train_step(
    state: TrainState,
    micro_batches: list[MicroBatch],
    config: TrainingConfig,
    enter: Callable[[Phase], None] = _unobserved,
) -> StepMetrics:
    """Advance `state` by one optimiser step on the mean loss of all valid targets.

    If the loss or a gradient is non-finite, the update is skipped and counted in `state.skipped`.
    The decision is made where the optimiser's state is: on the device, so that the host does not
    wait, or on the host if the state is offloaded.

    Args:
        micro_batches: this rank's share of the global batch.
        enter: called as each phase begins.
    """
    enter("forward_backward")
    work, optimizer = config.workload, config.workload.optimizer
    learning_rate = config.schedule.learning_rate(state.step)
    optimizer.set_learning_rate(state.optimizer, learning_rate)
    # The backward pass averages gradients over ranks, which may have different numbers of valid
    # targets. Dividing by the mean number of targets per rank gives the mean over all targets
    targets = zero.total(sum(batch.valid for batch in micro_batches)) / zero.ranks()
    losses = []
    for left, batch in zip(reversed(range(len(micro_batches))), micro_batches, strict=True):
        loss = loss_sum(state.model, batch, config.z_loss, config.kernels.loss) / targets
        zero.before_backward(state.model, work.zero_stage, last=left == 0)
        loss.backward()
        losses.append(loss.detach())  # no .item(): it would wait for the GPU

    if work.ranks > 1:
        enter("communication")
    loss = zero.mean(torch.stack(losses).sum())
    enter("optimizer")
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), optimizer.max_grad_norm)
    grad_norm = zero.full_tensor(norm)
    # The norm is non-finite if any gradient is. Its device is that of the optimiser's state
    non_finite = ~torch.isfinite(loss.to(grad_norm.device) + grad_norm)
    optimizer.step(state.optimizer, skip=non_finite)
    state.optimizer.zero_grad()
    non_finite = non_finite.to(state.skipped.device)
    state.skipped += non_finite
    state.skipped[0] *= non_finite  # the current sequence ends with a finite step
    state.step += 1
    return StepMetrics(loss, grad_norm, learning_rate)


def train(
    state: TrainState,
    batches: BatchSource,
    config: TrainingConfig,
    enter: Callable[[Phase], None] = _unobserved,
) -> Iterator[StepMetrics]:
    """Train from `state.step` to the last step, yielding after each step.

    Args:
        enter: called as each phase begins.
    """
    while state.step < config.steps:
        enter("data")
        micro_batches = batches.micro_batches(state.step)
        yield train_step(state, micro_batches, config, enter)
