"""One step, and the loop that yields after each; whoever runs it logs, saves and stops."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, Protocol

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.optim import AdamW

from zeroflow import planning
from zeroflow.config import Config
from zeroflow.data.batches import MicroBatch
from zeroflow.model import fp8
from zeroflow.model.attention import block_mask
from zeroflow.model.llama import Block, Llama, ModelConfig, Recompute, initialize
from zeroflow.planning import Precision, Stage
from zeroflow.training import optimizer as optimizers
from zeroflow.training import zero
from zeroflow.training.goodput import Phase
from zeroflow.training.loss import cross_entropy_sum
from zeroflow.training.optimizer import OptimizerConfig, set_learning_rate
from zeroflow.training.schedule import Schedule


class ComputeConfig(Config):
    """How the network is computed, alike in training and in the checks around it."""

    device: Literal["cpu", "cuda"]

    precision: Precision
    """bf16: matrices are multiplied and activations kept in bf16, weights and moments stay fp32."""

    fp8: bool = False
    """Multiply the matrices of the decoder blocks in 8 bits. The head, whose product is the loss's,
    stays in `precision`."""

    compile: bool
    """Compile the decoder blocks and the last norm with torch.compile."""

    deterministic: bool = False
    """Only kernels whose results are the same from run to run."""

    activation_checkpointing: Recompute = "none"
    """What is computed again in the backward pass: the activations within the feed-forward
    networks (selective), or all within a block (full)."""

    @property
    def dtype(self) -> torch.dtype:
        """Of activations and products."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def arithmetic(self) -> str:
        """For people."""
        return planning.arithmetic(self.precision, fp8=self.fp8)


class TrainingConfig(Config):
    """What a training process needs to know about the mathematics of a run."""

    seed: NonNegativeInt
    micro_batch_rows: PositiveInt
    accumulate: PositiveInt
    """Micro-batches in a step, on every rank."""

    ranks: PositiveInt = 1
    """Processes that train together, each on a device of its own."""

    zero_stage: Stage = 0
    """What they share out."""

    document_mask: bool = False
    """Tokens see those of their own document only, and positions begin anew with it."""

    z_loss: NonNegativeFloat = 0.0
    """Weight of (log Z)² in the loss."""

    schedule: Schedule
    optimizer: OptimizerConfig
    compute: ComputeConfig

    @property
    def steps(self) -> int:
        return self.schedule.steps

    @property
    def batch_rows(self) -> int:
        """Rows in a step, of all ranks."""
        return self.micro_batch_rows * self.accumulate * self.ranks


@dataclass
class TrainState:
    """All that training changes; a checkpoint is this and nothing else."""

    model: Llama
    optimizer: AdamW
    skipped: Tensor
    """(2,) int64 on the device: updates skipped in a row until now, and in all, as their loss or
    gradient was no finite number."""

    step: int = 0
    """Steps done, which is also the number of the next one."""


class StepMetrics(NamedTuple):
    loss: Tensor
    """Mean over the valid targets of the step, on the device."""

    grad_norm: Tensor
    """Global norm before clipping, on the device."""

    learning_rate: float


class BatchSource(Protocol):
    def micro_batches(self, step: int) -> list[MicroBatch]: ...


def new_state(model: ModelConfig, config: TrainingConfig) -> TrainState:
    """A freshly initialised model and optimiser on the device; the same for the same seed.

    PyTorch's random numbers, which a checkpoint holds as well, begin anew from the seed.
    """
    device = config.compute.device
    # What is shared out goes to the device part by part: as a whole it may not fit
    with torch.device(device if config.ranks == 1 else "cpu"):
        network = Llama(model, config.compute.dtype)
    initialize(network, config.seed)
    for block in network.model.layers:
        assert isinstance(block, Block)
        block.recompute = config.compute.activation_checkpointing
        if config.compute.fp8:
            block.self_attn.linear = block.mlp.linear = fp8.linear
        if config.compute.compile:
            block.compile(dynamic=False)
    if config.compute.compile:
        network.model.norm.compile(dynamic=False)
        if device == "cuda":
            network.model.document_mask = block_mask
    if config.ranks > 1:
        zero.shard(network, config.zero_stage, device)
    optimizer = optimizers.build(network, config.optimizer, config.schedule.peak)
    torch.manual_seed(config.seed)
    return TrainState(network, optimizer, torch.zeros(2, dtype=torch.int64, device=device))


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
    set_learning_rate(state.optimizer, learning_rate)
    # Ranks have more or fewer valid targets. Losses and gradients are means over ranks
    share = zero.total(sum(batch.valid for batch in micro_batches)) / zero.ranks()
    losses = []
    for left, batch in zip(reversed(range(len(micro_batches))), micro_batches, strict=True):
        loss = loss_sum(state.model, batch, config.z_loss) / share
        zero.before_backward(state.model, config.zero_stage, last=left == 0)
        loss.backward()
        losses.append(loss.detach())  # no .item(): it would wait for the GPU

    if config.ranks > 1:
        enter("communication")
    loss = zero.mean(torch.stack(losses).sum())
    enter("optimizer")
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.optimizer.max_grad_norm)
    grad_norm = zero.whole(norm)
    broken = ~torch.isfinite(loss + grad_norm)
    optimizers.step_unless(state.optimizer, broken)
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
