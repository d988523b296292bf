"""The state that training changes."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from zeroflow.model.attention import block_mask
from zeroflow.model.llama import Block, Llama, initialize
from zeroflow.training import zero
from zeroflow.training.config import TrainingConfig


@dataclass
class TrainState:
    """Everything that training changes, and all that a checkpoint contains."""

    model: Llama
    optimizer: Optimizer
    skipped: Tensor
    """(2,) int64 on the device: number of updates skipped because of a non-finite loss or gradient,
    in the current sequence and in total."""

    step: int = 0
    """Number of steps done; also the index of the next step, from 0."""


def new_state(config: TrainingConfig) -> TrainState:
    """Build a model with fresh weights and its optimiser on the device.

    The same seed gives the same weights on any device and any number of ranks. PyTorch's global
    random state, which is part of a checkpoint, is seeded as well.
    """
    work = config.workload
    # A model that will be sharded starts on the CPU, because the whole model may not fit on the
    # device: `zero.shard` moves it block by block
    with torch.device("cpu" if work.is_sharded else work.device):
        model = Llama(work.model, work.dtype)
    initialize(model, config.seed)
    for block in model.model.layers:
        assert isinstance(block, Block)
        block.activation_checkpointing = work.activation_checkpointing
        block.self_attn.linear = block.mlp.linear = work.linear
        block.self_attn.kernel = config.kernels.attention
        if config.kernels.feed_forward == "fused":
            block.mlp.fused = work.fused_feed_forward
        if work.compile:
            # Each block separately: all blocks share one compiled graph, so the compile time does
            # not grow with their number. Training has one shape, but by default PyTorch compiles
            # for symbolic sizes when it sees a second shape, such as that of a validation
            block.compile(dynamic=False)
    if work.compile:
        model.model.norm.compile(dynamic=False)
        if work.device == "cuda":
            model.model.mask_for = block_mask
    if work.is_sharded:
        zero.shard(
            model, work.device, group=work.shards, reshard=work.reshard, offload=work.offload
        )
    optimizer = work.optimizer.build(model, config.schedule.peak)
    torch.manual_seed(config.seed)
    skipped = torch.zeros(2, dtype=torch.int64, device=work.device)
    return TrainState(model, optimizer, skipped)
