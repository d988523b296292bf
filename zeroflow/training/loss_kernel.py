"""Cross-entropy and its gradient in one Triton kernel, which reads every logit twice.

Imported only for GPUs: Triton comes with PyTorch's GPU builds.
"""

import triton
import triton.language as tl
from torch import Tensor

from zeroflow.data.batches import IGNORED

_BLOCK = 32_768
"""Maximum number of logits that one Triton program has in registers at once."""


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
        # Online softmax, maximum and sum in one pass: https://arxiv.org/abs/1805.02867
        largest = -float("inf")
        total = 0.0
        for begin in range(0, vocabulary, block):
            inside = begin + columns < vocabulary
            x = tl.load(
                logits + begin + columns,
                mask=inside,
                other=-float("inf"),
                eviction_policy="evict_last",  # read again below
            ).to(tl.float32)
            higher = tl.maximum(largest, tl.max(x, 0))
            total = total * tl.exp(largest - higher) + tl.sum(tl.exp(x - higher), 0)
            largest = higher
        log_z = largest + tl.log(total)
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
        num_warps=max(4, min(32, block // 1024)),
    )
