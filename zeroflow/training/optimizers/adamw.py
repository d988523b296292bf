"""AdamW with decoupled weight decay where it belongs, and its state from the start."""

from typing import Any

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn
from torch.optim import AdamW

from zeroflow.config import Config
from zeroflow.training import zero


class OptimizerConfig(Config):
    """AdamW: https://arxiv.org/abs/1711.05101"""

    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""

    beta2: float = Field(0.95, ge=0, lt=1)
    """Decay of the second moment."""

    epsilon: PositiveFloat = 1e-8
    """Added to the root of the second moment."""

    weight_decay: float = Field(0.1, ge=0)
    """Not applied to norms and embeddings."""

    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this global norm."""


def build(model: nn.Module, config: OptimizerConfig, learning_rate: float) -> AdamW:
    """AdamW over all parameters, its moments allocated now rather than in the first step.

    A model that does not fit fails here, before any data is read, and a checkpoint can be loaded
    into the state right away.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        matrix = parameter.dim() >= 2 and "embed_tokens" not in name
        (decayed if matrix else plain).append(parameter)
    optimizer = AdamW(
        [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,  # on the CPU as well: one pass over memory
    )
    for parameter in (*decayed, *plain):
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def set_learning_rate(optimizer: AdamW, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def step_unless(optimizer: AdamW, broken: Tensor) -> None:
    """Update the weights unless `broken` (a bool on the device), without waiting to know.

    PyTorch's fused kernels read both attributes: its GradScaler sets them to skip a step.
    """
    fused: Any = optimizer
    fused.grad_scale, fused.found_inf = None, broken.float()
    optimizer.step()


def update_ratio(optimizer: AdamW) -> Tensor:
    """Largest norm of a matrix's last update over its weights' norm, a scalar on the device.

    About 1e-3 in a healthy training; 0.1 overwrites in a few steps what was learned.
    """
    group = optimizer.param_groups[0]
    (beta1, beta2), epsilon = group["betas"], group["eps"]
    updates, weights = [], []
    for parameter in group["params"]:
        state = optimizer.state[parameter]
        # Bias corrections are scalars beside the matrices, for fewer passes over memory
        root = (1 - beta2 ** state["step"]).sqrt()
        update = zero.local_shard(state["exp_avg_sq"]).sqrt().add_(epsilon * root)
        torch.div(zero.local_shard(state["exp_avg"]), update, out=update)
        scale = group["lr"] * root / (1 - beta1 ** state["step"])
        updates.append(scale * update.norm())
        weights.append(zero.local_shard(parameter.detach()).norm())
    norms = zero.norms_of_full(torch.stack((*updates, *weights)), of=parameter)
    update_norms, weight_norms = norms.chunk(2)
    return (update_norms / weight_norms).max()
