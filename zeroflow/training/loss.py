"""Next-token cross-entropy that never stores the logits of a whole batch."""

import importlib.util
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zeroflow.data.batches import IGNORED
from zeroflow.device import BF16_CAPABILITY

LossKernel = Literal["chunks", "one_read", "scaled_exp", "rounded"]
"""Ways to compute the loss: by this module alone, with one or both of the kernels of
`hopper_loss.py`, and by `rounded_loss.py`."""

_Differentiate = Callable[[Tensor, Tensor, Tensor], None]
"""Replaces logits (n, V) for targets (n,) by the gradients of the losses, which it writes (n,)."""


def cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    z_loss: float = 0.0,
    kernel: LossKernel = "chunks",
) -> Tensor:
    """Return the sum over the valid targets of -log p + z_loss · (log Z)², a scalar in fp32.

    The logits, hidden states times output matrix, are computed for one chunk of tokens at a time
    and overwritten with their gradient. This takes `logits_bytes` of memory instead of three times
    B·T·V·4 bytes. The forward pass also computes the gradients, so the backward pass recomputes
    nothing: https://arxiv.org/abs/2410.10989, section 3.2. The gradient of the output matrix is
    accumulated over the chunks in fp32.

    Args:
        hidden: hidden states, (B, T, D); logits have their dtype.
        weight: output matrix, (V, D).
        targets: ids, (B, T); `IGNORED` targets do not count.
        z_loss: keeps Z, the softmax's denominator, near 1: https://arxiv.org/abs/2204.02311,
            section 5.
        kernel: those of `hopper_loss.py` cannot add a z-loss; they and that of `rounded_loss.py`
            need bf16.
    """
    if kernel == "rounded":
        from zeroflow.training.rounded_loss import RoundedCrossEntropySum

        rounded: Tensor = RoundedCrossEntropySum.apply(
            hidden.flatten(0, 1), weight, targets.flatten(), z_loss, _held_at_once(hidden)
        )
        return rounded
    if kernel == "scaled_exp":
        from zeroflow.training.hopper_loss import ScaledExpCrossEntropySum

        total: Tensor = ScaledExpCrossEntropySum.apply(
            hidden.flatten(0, 1), weight, targets.flatten(), _held_at_once(hidden)
        )
        return total
    differentiate: _Differentiate = partial(_to_losses_and_gradients, z_loss=z_loss)
    if kernel == "one_read":
        from zeroflow.training.hopper_loss import to_losses_and_gradients as differentiate
    loss: Tensor = _CrossEntropySum.apply(
        hidden.flatten(0, 1), weight, targets.flatten(), differentiate
    )
    return loss


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return -log p of each target, (B, T) in fp32; 0 where the target is ignored."""
    h, matrix = hidden.flatten(0, 1), weight.to(hidden.dtype)
    losses = h.new_empty(len(h), dtype=torch.float32)
    differentiate = partial(_to_losses_and_gradients, z_loss=0.0)
    for _ in _chunks(h, matrix, targets.flatten(), losses, differentiate):
        pass
    return losses.view(targets.shape)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, differentiate: _Differentiate
    ) -> Tensor:
        wanted = any(ctx.needs_input_grad)
        matrix = weight.to(hidden.dtype)
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        d_hidden = torch.empty_like(hidden) if wanted else None
        d_weight = torch.empty_like(weight, dtype=torch.float32) if wanted else None
        for part, x in _chunks(hidden, matrix, targets, losses, differentiate):
            if d_hidden is not None and d_weight is not None:
                torch.mm(x, matrix, out=d_hidden[part])
                _put_product(d_weight, x.T, hidden[part], add=part.start > 0)
        ctx.save_for_backward(d_hidden, d_weight)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, Tensor, None, None]:
        # In place, because autograd frees the saved tensors and never runs this backward pass again
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden.mul_(d_loss), d_weight.mul_(d_loss), None, None


def _chunks(
    hidden: Tensor, matrix: Tensor, targets: Tensor, losses: Tensor, differentiate: _Differentiate
) -> Iterator[tuple[slice, Tensor]]:
    """Write the losses (n,), and yield each chunk's tokens and gradients w.r.t. its logits."""
    chunk = min(len(hidden), max(1, _held_at_once(hidden) // len(matrix)))
    logits = hidden.new_empty(chunk, len(matrix))
    for begin in range(0, len(hidden), chunk):
        part = slice(begin, begin + chunk)
        h = hidden[part]
        x = torch.mm(h, matrix.T, out=logits[: len(h)])
        differentiate(x, targets[part], losses[part])
        yield part, x


def _to_losses_and_gradients(
    logits: Tensor, targets: Tensor, losses: Tensor, z_loss: float
) -> None:
    """Write the losses to `losses` (n,), and overwrite `logits` (n, V) with their gradients."""
    if logits.is_cuda and has_kernel(logits.device):
        from zeroflow.training import loss_kernel

        loss_kernel.to_losses_and_gradients(logits, targets, losses, z_loss)
        return
    exact = logits.float()  # the same tensor if they are fp32
    valid = targets != IGNORED
    rows, columns = torch.arange(len(targets), device=targets.device), targets.clamp(min=0)
    of_targets, largest = exact[rows, columns], exact.amax(dim=1)
    # In place, with one exponential per logit; logsumexp would need a copy and a second exponential
    sums = exact.sub_(largest[:, None]).exp_().sum(dim=1)
    log_z = largest + sums.log()
    losses.copy_((log_z - of_targets + z_loss * log_z**2) * valid)
    exact.mul_(((1 + 2 * z_loss * log_z) / sums)[:, None])
    exact[rows, columns] -= 1
    exact[~valid] = 0
    if exact is not logits:
        logits.copy_(exact)


def _put_product(out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """Set `out` (fp32) to `a @ b`, or add the product to it, without rounding to `a`'s dtype."""
    if a.is_cuda and a.dtype != out.dtype:
        if add:
            torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
        else:
            torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
        return
    a, b = a.to(out.dtype), b.to(out.dtype)
    if add:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)


def logits_bytes(gpu_memory: int | None) -> int:
    """Return the bytes of logits that the loss keeps in memory at once.

    Large chunks are faster on a GPU, because every chunk reads and writes the whole gradient of the
    output matrix.

    Args:
        gpu_memory: bytes of the GPU; None on a CPU.
    """
    return 2**30 if gpu_memory is None else gpu_memory // 20


def _held_at_once(hidden: Tensor) -> int:
    """Return the number of logits that the loss keeps in memory at once."""
    device = hidden.device
    gpu_memory = (
        torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    )
    return logits_bytes(gpu_memory) // hidden.element_size()


@cache
def has_kernel(device: torch.device) -> bool:
    """Return True if `device` can run our Triton kernel."""
    if importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= BF16_CAPABILITY
