"""AdamW with decoupled weight decay where it belongs, and its state from the start."""

import torch
from pydantic import Field, PositiveFloat
from torch import nn
from torch.optim import AdamW

from zeroflow.config import Config


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
