"""AdamW, the default."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from zeroflow.config import FiniteNonNegative, FinitePositive
from zeroflow.model.llama import ModelConfig
from zeroflow.training import zero
from zeroflow.training.optimizers.base import OptimizerConfig, by_decay


class AdamW(OptimizerConfig):
    """AdamW with fp32 moments, fused: https://arxiv.org/abs/1711.05101"""

    # Not written to files: AdamW was once the only optimiser, so a file without a name means AdamW
    name: Literal["adamw"] = Field("adamw", exclude_if=lambda name: True)
    """Selects AdamW, the default."""

    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay rate of the first moment."""

    beta2: float = Field(0.95, ge=0, lt=1)
    """Decay rate of the second moment."""

    epsilon: FinitePositive = 1e-8
    """Added to the square root of the second moment."""

    weight_decay: FiniteNonNegative = 0.1
    """Weight decay; not applied to norms and embeddings."""

    def state_bytes(self, model: ModelConfig) -> int:
        return 2 * 4 * model.parameters

    def build(self, model: nn.Module, learning_rate: float) -> Optimizer:
        decayed, plain = by_decay(model)
        optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": self.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=learning_rate,
            betas=(self.beta1, self.beta2),
            eps=self.epsilon,
            fused=True,  # one pass over memory, also on a CPU
        )
        for parameter in (*decayed, *plain):
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        return optimizer

    def step(self, optimizer: Optimizer, *, skip: Tensor) -> None:
        # The fused kernels read these attributes, with which PyTorch's GradScaler skips steps
        fused: Any = optimizer
        fused.grad_scale, fused.found_inf = None, skip.float()
        optimizer.step()

    def last_updates(self, optimizer: Optimizer) -> Iterator[tuple[nn.Parameter, Tensor]]:
        group = optimizer.param_groups[0]
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            # Bias corrections are applied to the norm, not the matrices, to save passes over memory
            root = (1 - self.beta2 ** state["step"]).sqrt()
            update = zero.local_shard(state["exp_avg_sq"]).sqrt().add_(self.epsilon * root)
            torch.div(zero.local_shard(state["exp_avg"]), update, out=update)
            scale = group["lr"] * root / (1 - self.beta1 ** state["step"])
            yield parameter, scale * update.norm()
