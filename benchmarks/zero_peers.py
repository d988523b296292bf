"""Data parallelism of others around our model: PyTorch's DDP, and DeepSpeed's stages 1 to 3.

The model, its kernels, the rows, the loss and AdamW with its groups are ours. The settings of a
peer are its defaults unless its docstring names them.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zeroflow.data.batches import MicroBatch
from zeroflow.training import zero
from zeroflow.training.config import TrainingConfig
from zeroflow.training.loss import cross_entropy_sum
from zeroflow.training.state import TrainState, new_state
from zeroflow.training.zero import Stage

Step = Callable[[list[MicroBatch]], Tensor]
"""One step of the optimiser over micro-batches; returns the mean loss of all ranks."""


def ddp(config: TrainingConfig, stage: Stage) -> Step:
    """DistributedDataParallel with gradients in its buckets, which saves a copy of them.

    Args:
        stage: 0; every rank keeps everything.
    """
    state = _whole(config)
    model = nn.parallel.DistributedDataParallel(state.model, gradient_as_bucket_view=True)
    optimizer, loss_of = config.workload.optimizer, _mean_loss(model, config)
    skip = torch.zeros((), dtype=torch.bool, device=config.workload.device)

    def step(micro_batches: list[MicroBatch]) -> Tensor:
        losses = []
        for left, batch in zip(reversed(range(len(micro_batches))), micro_batches, strict=True):
            with model.no_sync() if left else nullcontext():
                loss = loss_of(batch) / len(micro_batches)
                loss.backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), optimizer.max_grad_norm)
        optimizer.step(state.optimizer, skip=skip)
        state.optimizer.zero_grad()
        return zero.mean(torch.stack(losses).sum())

    return step


def deepspeed(config: TrainingConfig, stage: Stage) -> Step:
    """DeepSpeed 0.19.8 with its bf16 mode if ours is bf16: weights, gradients and their sums."""
    # Every rank sees only its own GPU
    os.environ |= {"LOCAL_RANK": "0", "DS_ACCELERATOR": config.workload.device}
    import deepspeed as library

    state, work = _whole(config), config.workload
    state.optimizer.state.clear()  # DeepSpeed shards the weights, and allocates moments of shards
    engine, *_ = library.initialize(
        model=state.model,
        optimizer=state.optimizer,
        config={
            "train_micro_batch_size_per_gpu": work.micro_batch_rows,
            "gradient_accumulation_steps": work.accumulate,
            "gradient_clipping": work.optimizer.max_grad_norm,
            "bf16": {"enabled": work.precision == "bf16"},
            "zero_optimization": {"stage": stage},
            "steps_per_print": 10**9,
        },
    )
    loss_of = _mean_loss(engine, config)

    def step(micro_batches: list[MicroBatch]) -> Tensor:
        losses = []
        for batch in micro_batches:
            loss = loss_of(batch)
            engine.backward(loss)  # divides by the number of micro-batches
            engine.step()
            losses.append(loss.detach())
        return zero.mean(torch.stack(losses).mean())

    return step


def _whole(config: TrainingConfig) -> TrainState:
    """Return a state that is not sharded, with the weights that all trainers start from."""
    return new_state(config.replace(workload=config.workload.replace(ranks=1, zero_stage=0)))


def _mean_loss(model: Callable[..., Any], config: TrainingConfig) -> Callable[[MicroBatch], Tensor]:
    on_device = partial(Tensor.to, device=config.workload.device, non_blocking=True)

    def loss(batch: MicroBatch) -> Tensor:
        head = partial(
            cross_entropy_sum, targets=on_device(batch.targets), kernel=config.kernels.loss
        )
        documents = None if batch.documents is None else on_device(batch.documents)
        total: Tensor = model(on_device(batch.inputs), head, documents)
        return total / batch.valid

    return loss


PEERS: dict[str, Callable[[TrainingConfig, Stage], Step]] = {"ddp": ddp, "deepspeed": deepspeed}
