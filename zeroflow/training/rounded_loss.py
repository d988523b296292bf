"""`loss.cross_entropy_sum` with its matrix products in 8 bits."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zeroflow.data.batches import IGNORED
from zeroflow.model import fp8

# T tokens  D features  V vocabulary  n tokens of a chunk

_HEADROOM = 2
"""Largest gradient w.r.t. a logit that is not clipped. It is below 1 without z-loss."""

_VOCABULARY = 2**14
"""Rows of the output matrix whose gradient is computed at once, if it is added to another."""


class RoundedCrossEntropySum(torch.autograd.Function):
    """Computes `cross_entropy_sum` of flattened inputs.

    Each token has its own scale s, as in `fp8.linear`. A gradient w.r.t. a logit is between -1 and
    1, so its scale is known in advance: the kernel that computes the gradients, times s, also
    rounds them. Each of the two products needs them in its own order in memory.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float, held: int
    ) -> Tensor:
        h8, s = fp8.rounded_tokens(hidden)  # (T, D), (T, 1)
        w8, w_scale = fp8.rounded_matrix(weight)
        w8_columns = fp8.transposed(w8).t()
        scale = fp8.gradient_scale(_HEADROOM * s.amax())
        losses = s.new_empty(len(hidden))
        d_hidden = torch.empty_like(hidden)
        d_weight = None
        # For each logit in bf16, there are two gradients in 8 bits
        chunk = max(1, held // 2 // len(weight) // fp8.MULTIPLE) * fp8.MULTIPLE
        for begin in range(0, len(hidden), chunk):
            part = slice(begin, begin + chunk)
            x8, factors = h8[part], s[part]
            logits = fp8.product(
                x8, w8.t(), fp8.one(hidden), w_scale, hidden.dtype, fast=fp8.FAST_OUTPUT
            )
            g8 = _differentiate(logits, factors, targets[part], losses[part], scale, z_loss)
            del logits
            d_x = fp8.product(g8, w8_columns, scale, w_scale, hidden.dtype, fast=fp8.FAST_GRADIENTS)
            d_hidden[part] = d_x / factors
            d_weight = _with_product(d_weight, fp8.transposed(g8), fp8.transposed(x8).t(), scale)
        ctx.save_for_backward(d_hidden, d_weight)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors  # in place: autograd frees them afterwards
        return d_hidden.mul_(d_loss), d_weight.mul_(d_loss), None, None, None


def _differentiate(
    logits: Tensor, s: Tensor, targets: Tensor, losses: Tensor, scale: Tensor, z_loss: float
) -> Tensor:
    """Write the losses (n,) for logits (n, V) times `s` (n, 1), and return their gradients.

    Returns:
        the gradients times s / `scale` in fp8, (n, V).
    """
    g8 = torch.empty_like(logits, dtype=fp8.GRADIENTS)
    if logits.is_cuda:
        from zeroflow.training import loss_kernel

        loss_kernel.to_losses_and_rounded_gradients(logits, s, targets, losses, scale, g8, z_loss)
        return g8
    exact = logits.float() * s
    rows, valid = torch.arange(len(targets)), targets != IGNORED
    columns = targets.clamp(min=0)
    log_z = exact.logsumexp(dim=1)
    losses.copy_((log_z - exact[rows, columns] + z_loss * log_z**2) * valid)
    gradients = (1 + 2 * z_loss * log_z)[:, None] * (exact - log_z[:, None]).exp()
    gradients[rows, columns] -= 1
    gradients *= (valid[:, None] * s) / scale
    limit = torch.finfo(fp8.GRADIENTS).max
    return g8.copy_(gradients.clamp(-limit, limit))


def _with_product(total: Tensor | None, g8_t: Tensor, x8: Tensor, scale: Tensor) -> Tensor:
    """Return `total` (V, D) plus the product of `g8_t` (V, n) and `x8` (n, D) in fp32."""

    def product(rows: Tensor) -> Tensor:
        one = fp8.one(rows)
        return fp8.product(rows, x8, scale, one, torch.float32, fast=fp8.FAST_GRADIENTS)

    if total is None:
        return product(g8_t)
    for part, rows in zip(total.split(_VOCABULARY), g8_t.split(_VOCABULARY), strict=True):
        part += product(rows)
    return total
