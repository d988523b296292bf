"""`loss.cross_entropy_sum` with the Hopper kernels of quack, which read the logits once less."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zeroflow.data.batches import IGNORED

_TOKENS = 128
"""The kernels need chunks of a multiple of this."""

_CHUNK = 16_256
"""Tokens of a chunk. One kernel counts the logits of a chunk in 32 bits."""


class ScaledExpCrossEntropySum(torch.autograd.Function):
    """Inputs and result of `cross_entropy_sum`, flattened, without z-loss.

    The first product writes the exponentials of the logits, scaled per row and tile, with their
    sums. The other two products rescale them as they read them, so that no pass over the logits
    is left. The gradient of the matrix is accumulated over the chunks in fp32.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, held: int) -> Tensor:
        from quack.linear_cross_entropy import scaled_exp_linear_cross_entropy_fwd

        matrix = weight.to(hidden.dtype)
        largest = min(held, 2**31 - 1) // len(matrix)
        chunk = max(_TOKENS, min(_CHUNK, largest) // _TOKENS * _TOKENS)
        losses, d_hidden, d_weight = scaled_exp_linear_cross_entropy_fwd(
            hidden.contiguous(), matrix, targets, chunk, ignore_index=IGNORED
        )
        ctx.save_for_backward(d_hidden[: len(hidden)], d_weight)
        return losses[: len(hidden)].sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, Tensor, None, None]:
        d_hidden, d_weight = ctx.saved_tensors  # in place: autograd frees them afterwards
        return d_hidden.mul_(d_loss), d_weight.mul_(d_loss), None, None
