"""The rows of each global batch: a pure function of the seed and the step.

Training reads an endless sequence of global batches. It visits the rows in the order of a keyed
permutation, with a new key for every epoch. A batch may span two epochs, so every row is used
exactly once per epoch, for any batch size.

A run that is extended may read more rows. With the first batch after the extension, a new segment
of the sequence begins: first a permutation of all rows that the current epoch has not read yet, old
and new, then whole epochs of all rows. So no row is read twice before all are read once.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import NonNegativeInt, PositiveInt

from zeroflow.config import Config
from zeroflow.data.arrays import Int64Array

_ROUNDS = 6
"""Rounds of the Feistel network. With a random round function, four rounds cannot be distinguished
from a random permutation: Luby & Rackoff 1988, https://doi.org/10.1137/0217022"""

_U64 = np.uint64  # its arithmetic wraps around, as the hash functions need

_AT_ONCE = 2**22
"""Number of positions whose rows are counted at once."""


class Skip(Config):
    """A window of data that a run skips: the batches that some steps read before a roll-back."""

    step: NonNegativeInt
    """First step that read the window, counted from 0."""

    batches: PositiveInt
    """Length of the window, in global batches."""


class Segment(Config):
    """A section of the sequence of batches in which a run reads the same set of rows."""

    batch: NonNegativeInt
    """First global batch of the section, counted from 0; skipped batches count too."""

    rows: PositiveInt
    """Number of rows: the first ones of the shards."""


class Coverage(NamedTuple):
    """Which fraction of the rows a run has read."""

    epochs: float
    """Rows read, with repetitions, divided by the number of rows."""

    covered: float
    """Fraction of the rows that were read at least once."""

    repeated: float
    """Fraction of the rows that were read more than once."""


class Order:
    """The rows of every step of a run."""

    def __init__(
        self,
        segments: Sequence[Segment],
        *,
        batch_rows: int,
        seed: int,
        skips: Sequence[Skip] = (),
    ) -> None:
        """
        Args:
            segments: segments by ascending batch; the first begins at batch 0.
            batch_rows: number of rows of a global batch.
            skips: windows to skip, in the order in which they were recorded.
        """
        self._size, self._key = batch_rows, _mix(seed)
        self._windows: list[tuple[int, int]] = []
        for skip in skips:
            self._skip(skip)
        self._stretches: list[_Stretch] = []
        for segment in segments:
            self._stretches.append(self._stretch(segment))
        self._begins = np.array([stretch.begin for stretch in self._stretches])

    def batches(self, steps: Int64Array) -> Int64Array:
        """Return the numbers of the global batches that `steps`, counted from 0, read."""
        batches = steps.copy()
        # In ascending order: each window moves the later batches behind it
        for begin, end in self._windows:
            batches[batches >= begin] += end - begin
        return batches

    def rows(self, steps: Int64Array) -> Int64Array:
        """Rows of the global batches of `steps`, shape (len(steps), batch_rows)."""
        positions = self.batches(steps)[:, None] * self._size + np.arange(self._size)
        return self._rows(positions.ravel()).reshape(positions.shape)

    def coverage(self, steps: int) -> Coverage:
        """Count the rows that the first `steps` steps read."""
        rows = self._stretches[-1].rows
        epochs = steps * self._size / rows
        if self.is_first_epoch(steps):  # the count is known without looking at the rows
            return Coverage(epochs, covered=epochs, repeated=0.0)
        times = np.zeros(rows, np.uint32)
        at_once = max(1, _AT_ONCE // self._size)
        for begin in range(0, steps, at_once):
            chosen = np.arange(begin, min(steps, begin + at_once))
            np.add.at(times, self.rows(chosen).ravel(), 1)
        return Coverage(
            epochs,
            covered=float((times > 0).mean()),
            repeated=float((times > 1).mean()),
        )

    def is_first_epoch(self, steps: int) -> bool:
        """True if the first `steps` steps end before any row is read a second time."""
        end = (self._batch(steps - 1) + 1) * self._size if steps else 0
        ends = [*self._begins[1:], end]
        read = zip(ends, self._stretches, strict=True)
        return all(min(end, until) <= stretch.rows for until, stretch in read)

    def _batch(self, step: int) -> int:
        return int(self.batches(np.array([step]))[0])

    def _skip(self, skip: Skip) -> None:
        """Add the batches that the steps of `skip` read with the windows so far.

        The range from the first to the last of them contains only these batches and batches that
        are skipped already, so earlier windows within it are merged into the new one. A batch that
        was skipped stays skipped, even if a later roll-back goes back to an earlier step.
        """
        begin, last = self._batch(skip.step), self._batch(skip.step + skip.batches - 1)
        others = [(b, e) for b, e in self._windows if e <= begin or b > last]
        self._windows = sorted([*others, (begin, last + 1)])

    def _stretch(self, segment: Segment) -> "_Stretch":
        begin = segment.batch * self._size
        if not self._stretches:
            return _Stretch(begin, segment.rows, left=0, new=segment.rows)
        before = self._stretches[-1]
        after = begin - before.begin - before.left - before.new
        left = -after if after < 0 else -after % before.rows
        return _Stretch(begin, segment.rows, left=left, new=segment.rows - before.rows)

    def _rows(self, positions: Int64Array) -> Int64Array:
        """The rows at `positions` of the sequence."""
        numbers = np.searchsorted(self._begins, positions, side="right") - 1
        rows = np.empty_like(positions)
        for number in np.unique(numbers).tolist():
            chosen = numbers == number
            rows[chosen] = self._rows_of_stretch(positions[chosen], number)
        return rows

    def _rows_of_stretch(self, positions: Int64Array, number: int) -> Int64Array:
        """Return the rows at `positions` of a stretch, as if no other stretch followed."""
        stretch = self._stretches[number]
        first = stretch.left + stretch.new
        places = positions - stretch.begin
        epochs = np.maximum(0, (places - first) // stretch.rows + 1)
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            # A key of its own for every epoch of every stretch
            key = _mix(self._key + epoch + (number << 32))
            if epoch:
                of_epoch = places[chosen] - first - (epoch - 1) * stretch.rows
                rows[chosen] = permute(of_epoch, stretch.rows, key)
            else:
                rows[chosen] = self._unread(permute(places[chosen], first, key), number)
        return rows

    def _unread(self, places: Int64Array, number: int) -> Int64Array:
        """Return rows that the epoch in which a stretch begins has not read, by their `places`.

        The places begin with the rows that the stretch before would have read next, followed by the
        new rows.
        """
        stretch = self._stretches[number]
        old = places < stretch.left
        rows = places - stretch.left + stretch.rows - stretch.new
        if old.any():
            rows[old] = self._rows_of_stretch(stretch.begin + places[old], number - 1)
        return rows


class _Stretch(NamedTuple):
    """A segment in terms of positions in the sequence of rows."""

    begin: int
    rows: int
    left: int
    """Number of old rows that the current epoch has not read yet at `begin`."""

    new: int
    """Number of rows that the segment before did not have."""


def permute(places: Int64Array, size: int, key: int) -> Int64Array:
    """Return the images of `places` under a keyed permutation of range(size).

    Each place takes O(1) time and memory, because no list is shuffled. A Feistel network permutes
    the numbers with the smallest even number of bits that can represent `size`. It is applied again
    until its result is below `size`: Black & Rogaway 2002,
    https://doi.org/10.1007/3-540-45760-7_9
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
