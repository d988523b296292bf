"""Loss on the held-out rows."""

import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from zeroflow.data.batches import IGNORED, to_micro_batch
from zeroflow.data.shards import Rows
from zeroflow.model.llama import Llama
from zeroflow.training.loop import ComputeConfig, autocast
from zeroflow.training.loss import cross_entropy_sum


@torch.no_grad()
def validation_loss(
    model: Llama, rows: Rows, count: int, micro_batch_rows: int, compute: ComputeConfig
) -> float:
    """Mean loss in nats per token over the first `count` of `rows`; all if fewer.

    The first, so that runs that read more parts of a shard set are validated on the same rows.
    """
    chosen = np.arange(min(count, len(rows)))
    total, valid = torch.zeros((), dtype=torch.float64, device=compute.device), 0
    for start in range(0, len(chosen), micro_batch_rows):
        ids = chosen[start : start + micro_batch_rows]
        batch = to_micro_batch(rows[ids], end_of_text=rows.end_of_text)
        valid += batch.valid
        # One shape for all, as a compiled model would be compiled again for the last rows
        missing = micro_batch_rows - len(ids)
        inputs = F.pad(batch.inputs, (0, 0, 0, missing)).to(compute.device)
        targets = F.pad(batch.targets, (0, 0, 0, missing), value=IGNORED).to(compute.device)
        with autocast(compute):
            total += model(inputs, partial(cross_entropy_sum, targets=targets))
    return float(total) / valid


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """A loss that does not depend on the tokenizer: bits to store a byte of the text.

    Source: https://arxiv.org/abs/2101.00027, section 3.1
    """
    return nats_per_token / math.log(2) / bytes_per_token
