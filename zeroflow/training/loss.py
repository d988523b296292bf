"""Next-token cross-entropy that never holds the logits of a whole batch."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zeroflow.data.batches import IGNORED

_CHUNK_LOGITS = 2**28


def cross_entropy_sum(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over the valid targets of -log p, a scalar in fp32.

    The logits of hidden states (B, T, D) times the output matrix (V, D) are made a chunk of
    tokens at a time, and made again in the backward pass: 1 GiB instead of B·T·V·4 bytes.
    """
    hidden, targets = hidden.flatten(0, 1), targets.flatten()
    chunk = max(1, _CHUNK_LOGITS // weight.shape[0])
    if len(targets) <= chunk:
        return _sum(hidden, weight, targets)
    parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    losses = [checkpoint(_sum, h, weight, t, use_reentrant=False) for h, t in parts]
    return torch.stack(losses).sum()


def _sum(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
