"""TODO docstring."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from zeroflow.model import fp8
from zeroflow.model.attention import block_mask
from zeroflow.model.llama import Block, Llama, ModelConfig, initialize
from zeroflow.training import zero
from zeroflow.training.config import TrainingConfig


@dataclass
class TrainState:
    """All that training changes; a checkpoint is this and nothing else."""

    model: Llama
    optimizer: Optimizer
    skipped: Tensor
    """(2,) int64 on the device: updates skipped in a row until now, and in all, as their loss or
    gradient was no finite number."""

    step: int = 0
    """Steps done, which is also the number of the next one."""


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
    optimizer = config.optimizer.build(network, config.schedule.peak)
    torch.manual_seed(config.seed)
    return TrainState(network, optimizer, torch.zeros(2, dtype=torch.int64, device=device))
