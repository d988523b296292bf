"""Loss on the held-out rows."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from zeroflow.data.batches import IGNORED, MicroBatch, to_micro_batch
from zeroflow.data.rows import Rows
from zeroflow.model.llama import Llama
from zeroflow.training import zero
from zeroflow.training.loop import loss_sum


@torch.no_grad()
def validation_loss(
    model: Llama, rows: Rows, count: int, micro_batch_rows: int, *, document_mask: bool = False
) -> float:
    """Mean loss in nats per token over the first `count` of `rows`; all if fewer.

    The first, so that runs that read more parts of a shard set are validated on the same rows.
    """
    chosen = np.arange(min(count, len(rows)))
    device = model.model.embed_tokens.weight.device
    total, valid = torch.zeros((), dtype=torch.float64, device=device), 0
    # Ranks take turns, and as many each: a model that is shared out is computed by all or by none
    for start in range(0, len(chosen), micro_batch_rows * zero.ranks()):
        mine = start + micro_batch_rows * zero.rank()
        ids = chosen[mine : mine + micro_batch_rows]
        batch = to_micro_batch(rows[ids], end_of_text=rows.end_of_text, document_mask=document_mask)
        valid += batch.valid
        # One shape for all, as a compiled model would be compiled again for the last rows
        total += loss_sum(model, _with_rows(batch, micro_batch_rows))
    return float(zero.mean(total)) * zero.ranks() / zero.total(valid)


def _with_rows(batch: MicroBatch, rows: int) -> MicroBatch:
    """`batch` filled up with rows that do not count."""
    missing = (0, 0, 0, rows - len(batch.inputs))
    documents = batch.documents
    return batch._replace(
        inputs=F.pad(batch.inputs, missing),
        targets=F.pad(batch.targets, missing, value=IGNORED),
        documents=None if documents is None else F.pad(documents, missing),
    )


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """A loss that does not depend on the tokenizer: bits to store a byte of the text.

    Source: https://arxiv.org/abs/2101.00027, section 3.1
    """
    return nats_per_token / math.log(2) / bytes_per_token
