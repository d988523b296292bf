"""Batch t as a pure function of (seed, t): no loader state, nothing to save or restore.

Training visits the rows in the order of a keyed permutation, a new one every epoch. A batch may
span two epochs, so every row is used exactly once per epoch, whatever the batch size. Ranks and
micro-batches only split the global batch of a step.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from zeroflow.config import Config
from zeroflow.data.arrays import Int64Array, RowArray
from zeroflow.data.rows import Rows

IGNORED = -100
"""Targets with this value are excluded from the loss and from its mean."""

_ROUNDS = 6
"""Rounds of the Feistel network. With a random round function, four rounds cannot be distinguished
from a random permutation: Luby & Rackoff 1988, https://doi.org/10.1137/0217022"""

_U64 = np.uint64


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
    """Split of the rows of a global batch."""

    accumulate: int
    """Micro-batches of each rank."""

    ranks: int
    micro_batch_rows: int


class Skip(Config):
    """A window of data that a run skips."""

    step: NonNegativeInt
    """First step, counted from 0, that reads the data after the window."""

    batches: PositiveInt
    """Length of the window, in global batches."""


class Batches:
    """The training batches of one rank."""

    def __init__(
        self,
        rows: Rows,
        shape: BatchShape,
        *,
        seed: int,
        rank: int = 0,
        skips: Sequence[Skip] = (),
        document_mask: bool = False,
        pin: bool = False,
    ) -> None:
        self._rows, self._shape, self._seed, self._rank = rows, shape, seed, rank
        self._skips, self._document_mask, self._pin = skips, document_mask, pin

    def row_ids(self, step: int) -> Int64Array:
        """Rows of the global batch of `step`, shape (accumulate, ranks, micro_batch_rows)."""
        size = int(np.prod(self._shape))
        batch = step + sum(skip.batches for skip in self._skips if skip.step <= step)
        ids = row_ids(np.arange(batch * size, (batch + 1) * size), len(self._rows), self._seed)
        return ids.reshape(self._shape)

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
    if document_mask:  # an end of text belongs to the document that it ends
        arrays.append(ends[:, :-1].cumsum(axis=1, dtype=np.int32) - ends[:, :-1])
    tensors = [torch.from_numpy(array) for array in arrays]
    if pin:
        tensors = [tensor.pin_memory() for tensor in tensors]
    return MicroBatch(tensors[0], tensors[1], padding.size - int(padding.sum()), *tensors[2:])


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` up to `limit`, such as the rows of equal micro-batches."""
    return next(d for d in range(min(number, limit), 0, -1) if number % d == 0)


def row_ids(positions: Int64Array, rows: int, seed: int) -> Int64Array:
    """The rows at `positions` of the endless sequence of shuffled epochs over `rows` rows."""
    epochs, places = np.divmod(positions, rows)
    ids = np.empty_like(positions)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        ids[chosen] = permute(places[chosen], rows, key=_mix(_mix(seed) + int(epoch)))
    return ids


def permute(places: Int64Array, size: int, key: int) -> Int64Array:
    """The images of `places` under a keyed permutation of range(size).

    Each place costs O(1) time and memory: no list is shuffled. A Feistel network permutes the
    smallest even number of bits that holds `size`, and is applied again until its result is below
    `size`: Black & Rogaway 2002, https://doi.org/10.1007/3-540-45760-7_9
    """
    half = _U64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (_U64(1) << half) - _U64(1)
    keys = [_U64(_mix(key + round_)) for round_ in range(_ROUNDS)]
    ids = places.astype(_U64)
    outside = np.ones(len(ids), dtype=bool)
    while outside.any():
        left, right = ids[outside] >> half, ids[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix_array(right ^ round_key) & mask)
        ids[outside] = (left << half) | right
        outside = ids >= _U64(size)
    return ids.astype(np.int64)


def _mix_array(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64, used as round function: https://doi.org/10.1145/2714064.2660195"""
    x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
    return x ^ (x >> _U64(31))


def _mix(x: int) -> int:
    spread = (x * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64
    return int(_mix_array(np.array([spread], dtype=_U64))[0])
