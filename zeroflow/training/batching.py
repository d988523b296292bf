"""The batches of a workload, made from the rows of a shard set."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from zeroflow.data.batches import Batches, MicroBatch, Skip, to_micro_batch
from zeroflow.data.rows import Rows
from zeroflow.training import zero
from zeroflow.training.config import TrainingConfig
from zeroflow.training.workload import Workload


def batches(rows: Rows, config: TrainingConfig, skips: Sequence[Skip] = ()) -> Batches:
    """Return the training batches of this rank.

    Args:
        skips: windows of the data to skip.
    """
    return Batches(
        rows,
        config.workload.batch_shape,
        seed=config.seed,
        rank=zero.rank(),
        skips=skips,
        document_mask=config.workload.document_mask,
        pin=config.workload.device == "cuda",
    )


def micro_batch(tokens: npt.NDArray[np.integer[Any]], rows: Rows, workload: Workload) -> MicroBatch:
    """Return the micro-batch of `tokens` (n, row_tokens), a selection of `rows`."""
    return to_micro_batch(
        tokens, end_of_text=rows.end_of_text, document_mask=workload.document_mask
    )
