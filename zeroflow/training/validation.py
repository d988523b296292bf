"""Loss on the held-out rows."""

import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from zeroflow.data.batches import to_micro_batch
from zeroflow.data.shards import Rows
from zeroflow.model.llama import Llama
from zeroflow.training.loop import ComputeConfig, autocast
from zeroflow.training.loss import IGNORED, cross_entropy_sum


@torch.no_grad()
def validation_loss(
    model: Llama, rows: Rows, count: int, micro_batch_rows: int, compute: ComputeConfig
) -> float:
    """Mean loss in nats per token over `count` of `rows`, evenly spread; all if fewer."""
    chosen = np.linspace(0, len(rows), min(count, len(rows)), endpoint=False, dtype=np.int64)
    total = torch.zeros((), dtype=torch.float64, device=compute.device)
    for start in range(0, len(chosen), micro_batch_rows):
        ids = chosen[start : start + micro_batch_rows]
        inputs, targets = to_micro_batch(rows[ids])
        # One shape for all, as a compiled model would be compiled again for the last rows
        missing = micro_batch_rows - len(ids)
        inputs = F.pad(inputs, (0, 0, 0, missing)).to(compute.device)
        targets = F.pad(targets, (0, 0, 0, missing), value=IGNORED).to(compute.device)
        with autocast(compute):
            total += model(inputs, partial(cross_entropy_sum, targets=targets))
    return float(total) / (len(chosen) * inputs.shape[1])


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """A loss that does not depend on the tokenizer: bits to store a byte of the text.

    Source: https://arxiv.org/abs/2101.00027, section 3.1
    """
    return nats_per_token / math.log(2) / bytes_per_token
