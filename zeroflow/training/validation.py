"""Loss on held-out rows."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from zeroflow.data.batches import IGNORED, MicroBatch
from zeroflow.data.rows import Rows
from zeroflow.model.llama import Llama
from zeroflow.training import zero
from zeroflow.training.batching import micro_batch
from zeroflow.training.loop import loss_sum
from zeroflow.training.workload import Workload


@torch.no_grad()
def validation_loss(model: Llama, rows: Rows, count: int, workload: Workload) -> float:
    """Return the mean loss in nats per token over the first `count` rows, or all if fewer.

    The first rows stay the same when a run reads more parts of a shard set, so losses remain
    comparable. All ranks take part.
    """
    size = workload.micro_batch_rows
    chosen = np.arange(min(count, len(rows)))
    device = model.model.embed_tokens.weight.device
    total, valid = torch.zeros((), dtype=torch.float64, device=device), 0
    # All ranks do the same number of forward passes: with a sharded model, each pass needs all
    # ranks
    for start in range(0, len(chosen), size * zero.ranks()):
        mine = start + size * zero.rank()
        batch = micro_batch(rows[chosen[mine : mine + size]], rows, workload)
        valid += batch.valid
        # Always the same shape: a compiled model would be recompiled for the last, smaller one
        total += loss_sum(model, _padded(batch, size))
    return float(zero.mean(total)) * zero.ranks() / zero.total(valid)


def _padded(batch: MicroBatch, rows: int) -> MicroBatch:
    """Return `batch` padded to `rows` rows, with targets that the loss ignores."""
    missing = (0, 0, 0, rows - len(batch.inputs))
    documents = batch.documents
    return batch._replace(
        inputs=F.pad(batch.inputs, missing),
        targets=F.pad(batch.targets, missing, value=IGNORED),
        documents=None if documents is None else F.pad(documents, missing),
    )


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Return the loss in bits per byte of text, which is comparable across tokenizers.

    Source: https://arxiv.org/abs/2101.00027, section 3.1
    """
    return nats_per_token / math.log(2) / bytes_per_token
