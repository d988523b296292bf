"""The batches of a workload, made from the rows of a shard set."""

from typing import Any

import numpy as np
import numpy.typing as npt

from zeroflow.data.batches import Batches, MicroBatch, to_micro_batch
from zeroflow.data.order import Order, Segment
from zeroflow.data.rows import Rows
from zeroflow.training import zero
from zeroflow.training.config import TrainingConfig
from zeroflow.training.workload import Workload


def batches(rows: Rows, config: TrainingConfig, order: Order | None = None) -> Batches:
    """Return the training batches of this rank.

    Args:
        order: order of the rows; None for a run that was not extended and skips no data.
    """
    whole = [Segment(batch=0, rows=len(rows))]
    return Batches(
        rows,
        config.workload.batch_shape,
        order or Order(whole, batch_rows=config.workload.batch_rows, seed=config.seed),
        rank=zero.rank(),
        document_mask=config.workload.document_mask,
        pin=config.workload.device == "cuda",
    )


def micro_batch(tokens: npt.NDArray[np.integer[Any]], rows: Rows, workload: Workload) -> MicroBatch:
    """Return the micro-batch of `tokens` (n, row_tokens), a selection of `rows`."""
    return to_micro_batch(
        tokens, end_of_text=rows.end_of_text, document_mask=workload.document_mask
    )
