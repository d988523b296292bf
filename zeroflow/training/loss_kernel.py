"""Triton kernels of cross-entropy and its gradient, which read every logit twice.

Imported only for GPUs: Triton comes with PyTorch's GPU builds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zeroflow.data.batches import IGNORED
from zeroflow.model.fp8_kernels import bits_of_e5m2

_BLOCK = 32_768
"""Maximum number of logits that one Triton program has in registers at once."""


@triton.jit
def _log_z(logits, factor, vocabulary: tl.constexpr, block: tl.constexpr):
    """Return log Z of a row of logits times `factor`."""
    # Online softmax, maximum and sum in one pass: https://arxiv.org/abs/1805.02867
    columns = tl.arange(0, block)
    largest = -float("inf")
    total = 0.0
    for begin in range(0, vocabulary, block):
        inside = begin + columns < vocabulary
        x = tl.load(
            logits + begin + columns,
            mask=inside,
            other=-float("inf"),
            eviction_policy="evict_last",  # read again for the gradients
        ).to(tl.float32)
        x *= factor
        higher = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - higher) + tl.sum(tl.exp(x - higher), 0)
        largest = higher
    return largest + tl.log(total)


@triton.jit
def _cross_entropy(
    logits,
    stride,
    targets,
    losses,
    z_loss,
    vocabulary: tl.constexpr,
    ignored: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * stride exceeds 32 bits
    logits += row * stride
    target = tl.load(targets + row)
    columns = tl.arange(0, block)
    if target == ignored:
        tl.store(losses + row, 0.0)
        for begin in range(0, vocabulary, block):
            inside = begin + columns < vocabulary
            tl.store(logits + begin + columns, tl.zeros((block,), tl.float32), mask=inside)
    else:
        log_z = _log_z(logits, 1.0, vocabulary, block)
        chosen = tl.load(logits + target).to(tl.float32)
        tl.store(losses + row, log_z - chosen + z_loss * log_z * log_z)
        tl.debug_barrier()  # all threads have read the logits before any overwrites them
        scale = 1 + 2 * z_loss * log_z
        for begin in range(0, vocabulary, block):
            inside = begin + columns < vocabulary
            x = tl.load(
                logits + begin + columns,
                mask=inside,
                other=-float("inf"),
                eviction_policy="evict_first",
            ).to(tl.float32)
            gradient = scale * tl.exp(x - log_z) - tl.where(begin + columns == target, 1.0, 0.0)
            tl.store(logits + begin + columns, gradient, mask=inside, eviction_policy="evict_first")


def to_losses_and_gradients(logits: Tensor, targets: Tensor, losses: Tensor, z_loss: float) -> None:
    """Write the losses to `losses` (n,), and the gradients of their sum over `logits` (n, V)."""
    rows, vocabulary = logits.shape
    block = min(_BLOCK, triton.next_power_of_2(vocabulary))
    _cross_entropy[(rows,)](
        logits,
        logits.stride(0),
        targets,
        losses,
        z_loss,
        vocabulary,
        IGNORED,
        block,
        num_warps=_warps(block),
    )


@triton.jit
def _rounded_cross_entropy(
    logits,
    scales,
    targets,
    losses,
    divisor,
    gradients,
    z_loss,
    vocabulary: tl.constexpr,
    ignored: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    gradients += row * vocabulary
    scale = tl.load(scales + row)
    target = tl.load(targets + row)
    log_z = _log_z(logits, scale, vocabulary, block)
    counts = target != ignored
    chosen = tl.load(logits + target, mask=counts, other=0.0).to(tl.float32) * scale
    tl.store(losses + row, tl.where(counts, log_z - chosen + z_loss * log_z * log_z, 0.0))
    factor = tl.where(counts, scale / tl.load(divisor), 0.0)
    columns = tl.arange(0, block)
    for begin in range(0, vocabulary, block):
        inside = begin + columns < vocabulary
        x = tl.load(
            logits + begin + columns, mask=inside, other=0.0, eviction_policy="evict_first"
        ).to(tl.float32)
        x = (1 + 2 * z_loss * log_z) * tl.exp(x * scale - log_z)
        x -= tl.where(begin + columns == target, 1.0, 0.0)
        tl.store(gradients + begin + columns, bits_of_e5m2(x * factor), mask=inside)


def to_losses_and_rounded_gradients(
    logits: Tensor,
    scales: Tensor,
    targets: Tensor,
    losses: Tensor,
    divisor: Tensor,
    gradients: Tensor,
    z_loss: float,
) -> None:
    """Write the losses for `logits` (n, V) times `scales` (n, 1) to `losses` (n,), and the
    gradients of their sum, times scale / divisor, to `gradients` (n, V) in e5m2.

    Args:
        divisor: a scalar.
    """
    rows, vocabulary = logits.shape
    block = min(_BLOCK, triton.next_power_of_2(vocabulary))
    _rounded_cross_entropy[(rows,)](
        *(logits, scales, targets, losses, divisor, gradients.view(torch.uint8), z_loss),
        *(vocabulary, IGNORED, block),
        num_warps=_warps(block),
    )


def _warps(block: int) -> int:
    return max(4, min(32, block // 1024))
