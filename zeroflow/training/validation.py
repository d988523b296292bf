"""Loss on held-out rows."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zeroflow.data.arrays import Int64Array
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
    """Standard error of the mean, with rows as sampled units; None for one row."""


@torch.no_grad()
def validation_loss(
    model: Llama,
    rows: Rows,
    chosen: Int64Array,
    workload: Workload,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> ValidationLoss:
    """Return the loss over the `chosen` rows. All ranks take part.

    Args:
        on_batch: called after each batch with the number of finished rows and of all rows.
    """
    size = workload.micro_batch_rows
    device = zero.device_of(model)
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    # Every rank does the same number of forward passes, because a pass of a sharded model gathers
    # weights from all ranks
    for start in range(0, len(chosen), size * zero.ranks()):
        mine = start + size * zero.rank()
        batch = micro_batch(rows[chosen[mine : mine + size]], rows, workload)
        # The last batch is padded to the same shape: a compiled model would be recompiled for it
        padded = _padded(batch, size)
        losses = forward(model, padded, token_losses).double().sum(dim=1)
        valid = (padded.targets != IGNORED).sum(dim=1).to(device)
        row_sums = (losses, valid, losses**2, losses * valid, valid**2)
        sums += torch.stack([row_sum.sum() for row_sum in row_sums])
        on_batch(min(start + size * zero.ranks(), len(chosen)), len(chosen))
    return estimate(zero.mean(sums) * zero.ranks(), len(chosen))


def estimate(sums: Tensor, rows: int) -> ValidationLoss:
    """Estimate the mean loss per target and its standard error: a ratio of sums over rows.

    The targets may also be other units, such as the bytes of the text.

    Args:
        sums: over rows, of the loss l, the targets n, l², l·n and n².

    Source: Cochran 1977, Sampling Techniques, section 6.4
    """
    loss, valid, squared, product, valid_squared = sums.tolist()
    mean = loss / valid
    if rows < 2:
        return ValidationLoss(mean, None)
    spread = max(0.0, squared - 2 * mean * product + mean**2 * valid_squared)
    return ValidationLoss(mean, math.sqrt(spread * rows / (rows - 1)) / valid)


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
