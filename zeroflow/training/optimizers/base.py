"""Interface of an optimiser.

To add one, add a module to this package with a subclass of `OptimizerConfig`. Its settings become
flags, its state is included in plans and checkpoints, and `tests/training/test_optimizers.py`
tests it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from pydantic import PositiveFloat, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from zeroflow.config import Config, flag
from zeroflow.model.llama import ModelConfig
from zeroflow.training import zero


class OptimizerConfig(Config, ABC):
    """The optimiser."""

    # The class has settings and behaviour. The state is in the PyTorch optimiser that `build`
    # returns: `state[parameter]` maps names to tensors, which a checkpoint stores unchanged

    name: str
    """Optimiser that updates the weights. Default: adamw."""

    max_grad_norm: PositiveFloat = 1.0
    """Maximum global norm of the gradients; larger gradients are scaled down."""

    @model_validator(mode="before")
    @classmethod
    def _no_setting_of_another(cls, given: Any) -> Any:
        if isinstance(given, dict) and (foreign := given.keys() - cls.model_fields):
            name = cls.model_fields["name"].default
            raise ValueError(
                f"{flag(min(foreign))} has no effect with --optimizer {name}: drop one of them"
            )
        return given

    @abstractmethod
    def state_bytes(self, model: ModelConfig) -> int:
        """Return the bytes of optimiser state for all parameters of `model`.

        Scalars, such as the number of steps, are not counted.
        """

    @abstractmethod
    def build(self, model: nn.Module, learning_rate: float) -> Optimizer:
        """Return the optimiser of all parameters of `model`, with its state allocated.

        PyTorch's optimisers allocate their state in the first step. Allocating it here lets a model
        that does not fit fail before any data is read, and a checkpoint be loaded into the state.
        """

    @abstractmethod
    def step(self, optimizer: Optimizer, *, skip: Tensor) -> None:
        """Update weights and state from the gradients, unless `skip` is true.

        Args:
            skip: a bool on the device of the state. The host must not read it, because that would
                stall the device. If true, gradients may be non-finite, and no bit of weights or
                state may change.
        """

    @abstractmethod
    def last_updates(self, optimizer: Optimizer) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield each decayed matrix and the norm of its last update, a scalar on the device.

        The norm covers this rank's shard and excludes weight decay.
        """

    def set_learning_rate(self, optimizer: Optimizer, learning_rate: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate

    def update_ratio(self, optimizer: Optimizer) -> Tensor:
        """Return the largest norm of a matrix's last update over the norm of its weights.

        It is about 1e-3 in healthy training; 0.1 destroys the model within a few steps. The result
        is on the device.
        """
        updates, weights = [], []
        for parameter, update in self.last_updates(optimizer):
            updates.append(update)
            weights.append(zero.local_shard(parameter.detach()).norm())
        norms = zero.norms_of_full(torch.stack((*updates, *weights)), of=parameter)
        update_norms, weight_norms = norms.chunk(2)
        return (update_norms / weight_norms).max()

    def has_moved(self, optimizer: Optimizer, parameter: nn.Parameter, before: Tensor) -> bool:
        """Return True if gradients have changed `parameter`, whose earlier value is `before`.

        Weight decay alone also changes a parameter, but leaves its state at zero. An optimiser
        whose state does not start at zero must override this method.
        """
        kept = (value for value in optimizer.state[parameter].values() if value.dim())
        reached = any(zero.full_tensor(value).any() for value in kept)
        now, then = zero.full_tensor(parameter.detach()), zero.full_tensor(before)
        return reached and not torch.equal(now, then)


def by_decay(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the parameters that weight decay applies to, and the others: norms and embeddings."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        matrix = parameter.dim() >= 2 and "embed_tokens" not in name
        (decayed if matrix else plain).append(parameter)
    return decayed, plain
