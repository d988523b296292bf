"""Batches of rows. Batch t is a pure function of (seed, t), so there is no loader state to save.

`order` determines the rows of the global batch of a step. Ranks and micro-batches only split them.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from zeroflow.data.arrays import Int64Array, RowArray
from zeroflow.data.order import Order
from zeroflow.data.rows import Rows

IGNORED = -100
"""Targets with this value are excluded from the loss and from its mean."""


class MicroBatch(NamedTuple):
    inputs: Tensor
    """(rows, T) int64"""

    targets: Tensor
    """(rows, T) int64: the token after each input; `IGNORED` if that token is padding."""

    valid: int
    """Targets that are not ignored."""

    documents: Tensor | None = None
    """(rows, T) int32: index of each input's document within its row; None if attention crosses
    documents."""


class BatchShape(NamedTuple):
    """Division of the rows of a global batch."""

    accumulate: int
    """Number of micro-batches of each rank."""

    ranks: int
    micro_batch_rows: int


class Batches:
    """The training batches of one rank."""

    def __init__(
        self,
        rows: Rows,
        shape: BatchShape,
        order: Order,
        *,
        rank: int = 0,
        document_mask: bool = False,
        pin: bool = False,
    ) -> None:
        """
        Args:
            order: order of the rows, for global batches of this shape.
            document_mask: number the documents of each row, so that attention can stay within them.
            pin: put the tensors into pinned memory, from which a GPU copies while it computes.
        """
        self._rows, self._shape, self._order, self._rank = rows, shape, order, rank
        self._document_mask, self._pin = document_mask, pin

    def row_ids(self, step: int) -> Int64Array:
        """Rows of the global batch of `step`, shape (accumulate, ranks, micro_batch_rows)."""
        return self._order.rows(np.array([step])).reshape(self._shape)

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """This rank's share of the global batch of `step`, one entry for each micro-batch."""
        mine = self.row_ids(step)[:, self._rank]
        return [
            to_micro_batch(
                self._rows[ids],
                end_of_text=self._rows.end_of_text,
                document_mask=self._document_mask,
                pin=self._pin,
            )
            for ids in mine
        ]


class Prefetcher:
    """Makes the micro-batches of the next step in a thread while the current step is trained."""

    def __init__(self, make: Callable[[int], list[MicroBatch]]) -> None:
        self._make = make
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: tuple[int, Future[list[MicroBatch]]] | None = None

    def micro_batches(self, step: int) -> list[MicroBatch]:
        made = self._next[1] if self._next and self._next[0] == step else self._begin(step)
        batches = made.result()
        self._next = (step + 1, self._begin(step + 1))
        return batches

    def _begin(self, step: int) -> "Future[list[MicroBatch]]":
        return self._thread.submit(self._make, step)


def to_micro_batch(
    rows: RowArray,
    *,
    end_of_text: int,
    document_mask: bool = False,
    pin: bool = False,
) -> MicroBatch:
    """Inputs and targets from `rows` (n, row_tokens).

    Args:
        document_mask: number the documents of each row, so that attention can stay within them.
        pin: put the tensors into pinned memory, from which a GPU copies while it computes.
    """
    ends = rows == end_of_text
    padding = ends[:, :-1] & ends[:, 1:]
    inputs, targets = rows[:, :-1].astype(np.int64), rows[:, 1:].astype(np.int64)
    targets[padding] = IGNORED
    arrays = [inputs, targets]
    if document_mask:  # an end-of-text token belongs to the document that it ends
        arrays.append(ends[:, :-1].cumsum(axis=1, dtype=np.int32) - ends[:, :-1])
    tensors = [torch.from_numpy(array) for array in arrays]
    if pin:
        tensors = [tensor.pin_memory() for tensor in tensors]
    return MicroBatch(tensors[0], tensors[1], padding.size - int(padding.sum()), *tensors[2:])


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` up to `limit`, such as the rows of equal micro-batches."""
    return next(d for d in range(min(number, limit), 0, -1) if number % d == 0)
