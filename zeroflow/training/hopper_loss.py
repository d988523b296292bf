"""Kernels of quack for `loss.cross_entropy_sum`, with fewer passes over the logits."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zeroflow.data.batches import IGNORED

_TOKENS = 128
"""The number of tokens of a chunk must be a multiple of this."""

_CHUNK = 16_256
"""Maximum number of tokens of a chunk: one kernel indexes the logits of a chunk with 32 bits."""

_MAX_LOGITS = 2**31 - 1
"""Largest number that fits in 32 bits."""


def to_losses_and_gradients(logits: Tensor, targets: Tensor, losses: Tensor) -> None:
    """Write the losses to `losses` (n,), and the gradients of their sum over `logits` (n, V).

    A group of processors keeps each row in its shared memory, so logits are read once.
    """
    from quack.cross_entropy import cross_entropy_fwd_out

    rows = _MAX_LOGITS // logits.shape[1]
    for x, of, out in zip(*(t.split(rows) for t in (logits, targets, losses)), strict=True):
        cross_entropy_fwd_out(x, of, None, out, None, x, None, IGNORED)


class ScaledExpCrossEntropySum(torch.autograd.Function):
    """Computes `cross_entropy_sum` of flattened inputs, without z-loss.

    The first matrix product writes the exponentials of the logits, scaled per row and tile, and
    their sums. The other two products rescale them while they read them, so no separate pass over
    the logits is needed. The gradient of the matrix is accumulated over the chunks in fp32.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, held: int) -> Tensor:
        from quack.linear_cross_entropy import scaled_exp_linear_cross_entropy_fwd

        matrix = weight.to(hidden.dtype)
        largest = min(held, _MAX_LOGITS) // len(matrix)
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
