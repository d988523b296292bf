"""Loss on held-out rows."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from zeroflow.data import arrays
from zeroflow.data.arrays import Float64Array, Int64Array
from zeroflow.data.batches import IGNORED, MicroBatch
from zeroflow.data.rows import Rows
from zeroflow.model.llama import Llama
from zeroflow.training import zero
from zeroflow.training.batching import micro_batch
from zeroflow.training.loop import forward
from zeroflow.training.loss import token_losses
from zeroflow.training.workload import Workload


class ValidationLoss(NamedTuple):
    mean: float
    """Mean over all valid targets, in nats per token."""

    standard_error: float | None
    """Standard error of the mean; None for a single sampled unit."""

    nats: Float64Array
    """Sum over the targets of each sampled unit."""


@torch.no_grad()
def validation_loss(
    model: Llama,
    rows: Rows,
    chosen: Int64Array,
    workload: Workload,
    documents: Int64Array | None = None,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> ValidationLoss:
    """Return the loss over the `chosen` rows. All ranks take part.

    Args:
        documents: (rows, T), number of the document of each target. Documents are the sampled
            units of the standard error, because the losses of their tokens are correlated. By
            default, rows are.
        on_batch: called after each batch with the number of finished rows and of all rows.
    """
    size = workload.micro_batch_rows
    device = zero.device_of(model)
    found = torch.zeros(len(chosen), rows.row_tokens - 1, 2, dtype=torch.float64, device=device)
    # Every rank does the same number of forward passes, because a pass of a sharded model gathers
    # weights from all ranks
    for start in range(0, len(chosen), size * zero.ranks()):
        mine = start + size * zero.rank()
        batch = micro_batch(rows[chosen[mine : mine + size]], rows, workload)
        # The last batch is padded to the same shape: a compiled model would be recompiled for it
        padded = _padded(batch, size)
        losses = forward(model, padded, token_losses).double()
        valid = (padded.targets != IGNORED).to(device)
        of_rows = found[mine : mine + size]
        of_rows += torch.stack((losses, valid), dim=2)[: len(of_rows)]
        on_batch(min(start + size * zero.ranks(), len(chosen)), len(chosen))
    losses, valid = (zero.mean(found) * zero.ranks()).cpu().numpy().transpose(2, 0, 1)
    if documents is None:
        documents = np.broadcast_to(np.arange(len(chosen))[:, None], valid.shape)
    scored = valid > 0
    nats = arrays.sums(documents[scored], losses[scored])
    mean, error = estimate(nats, arrays.sums(documents[scored], valid[scored]))
    return ValidationLoss(mean, error, nats)


def estimate(losses: Float64Array, sizes: Float64Array) -> tuple[float, float | None]:
    """Estimate a mean loss and its standard error from sampled units: a ratio of two sums.

    Empty units do not count. A single unit has no standard error.

    Args:
        losses: sum over each unit, in nats.
        sizes: size of each unit: its targets, or another quantity by which the loss is divided.

    Source: Cochran 1977, Sampling Techniques, section 6.4
    """
    size, number = sizes.sum(), np.count_nonzero((losses != 0) | (sizes != 0))
    mean = float(losses.sum() / size)
    if number < 2:
        return mean, None
    spread = ((losses - mean * sizes) ** 2).sum() * number / (number - 1)
    return mean, math.sqrt(spread) / float(size)


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
