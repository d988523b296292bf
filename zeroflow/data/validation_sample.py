"""The held-out rows on which every run with a shard set validates.

Packing puts full rows of long documents first, so the first rows of a split are not representative.
The sample is drawn with a fixed key from the first parts that have enough rows. So it is the same
for every run and model with this set, even if a run reads more parts.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from zeroflow.config import Config
from zeroflow.data import arrays, document_table, encoding
from zeroflow.data.arrays import Int64Array
from zeroflow.data.batches import IGNORED, to_micro_batch
from zeroflow.data.order import permute
from zeroflow.data.rows import Rows
from zeroflow.data.shards import PartManifest, ShardSet
from zeroflow.data.token_bytes import token_bytes
from zeroflow.data.tokenizer import Tokenizer
from zeroflow.records import omitted

_KEY = 0
"""Key of the permutation; changing it would make losses of runs incomparable."""


class SampleCounts(Config):
    """Contents of a validation sample."""

    rows: PositiveInt
    documents: NonNegativeInt
    """Number of documents with at least one token in the sample."""

    tokens: PositiveInt
    """Number of scored targets, which exclude padding and the first token of each row."""

    text_bytes: NonNegativeInt | None
    """UTF-8 bytes of exactly these tokens, without unknown ones; None for synthetic data."""

    unknown: NonNegativeInt | None = omitted()
    """Number of these tokens that are unknown; None for synthetic data, and in files of older
    versions."""

    @property
    def bytes_per_token(self) -> float | None:
        return self.text_bytes / self.tokens if self.text_bytes else None

    @property
    def without_unknown(self) -> str:
        """Remark about bits per byte; empty if no token is unknown."""
        if not self.unknown:
            return ""
        return f" (unknown tokens, {self.unknown / self.tokens:.2%}, count no bytes)"


class _Pool(NamedTuple):
    """The first parts of a set that hold enough validation rows."""

    parts: int
    rows: int


def validation_rows(shards: ShardSet, count: int) -> Int64Array:
    """Return the numbers of the rows of the sample: `count` rows, or all if there are fewer.

    A larger sample of the same parts contains the smaller one.
    """
    pool = _pool(shards, count)
    places = np.arange(min(count, pool.rows))
    return np.sort(permute(places, pool.rows, _KEY))


def count_sample(shards: ShardSet, tokenizer: Tokenizer, count: int) -> SampleCounts:
    """Return the contents of the sample of `validation_rows(shards, count)`."""
    chosen = validation_rows(shards, count)
    rows = Rows(shards, "validation")
    batch = to_micro_batch(rows[chosen], end_of_text=rows.end_of_text)
    inputs, targets = batch.inputs.numpy(), batch.targets.numpy()
    valid = targets != IGNORED
    scored, begins = targets[valid], inputs[valid] == rows.end_of_text
    counts = SampleCounts(
        rows=len(chosen),
        documents=_documents(shards, chosen, _pool(shards, count).parts),
        tokens=len(scored),
        text_bytes=None,
    )
    if tokenizer.path is None:
        return counts
    loaded = tokenizer.load()
    sizes = token_bytes(loaded, scored, begins, end_of_text=rows.end_of_text)
    unknown = encoding.unknown_id(loaded)
    return counts.replace(
        text_bytes=int(sizes.sum()),
        unknown=0 if unknown is None else int((scored == unknown).sum()),
    )


def sampled_units(shards: ShardSet, chosen: Int64Array) -> Int64Array:
    """Return the number of the sampled unit of each of the `chosen` rows, from 0.

    Rows that share a document are one unit, because the losses of its pieces are correlated.
    """
    unit = np.arange(len(chosen), dtype=np.int64)
    pieces = [
        (documents, np.searchsorted(chosen, rows))
        for documents, rows in _pieces(shards, chosen, _pool(shards, len(chosen)).parts)
    ]
    if not pieces:
        return unit
    names, places = (np.concatenate(columns) for columns in zip(*pieces, strict=True))
    _, document = np.unique(names, return_inverse=True)
    while True:  # the smallest number spreads over rows and documents
        smallest = np.full(document.max(initial=-1) + 1, len(chosen))
        np.minimum.at(smallest, document, unit[places])
        spread = unit.copy()
        np.minimum.at(spread, places, smallest[document])
        if (spread == unit).all():
            return np.unique(unit, return_inverse=True)[1].astype(np.int64)
        unit = spread


def _pool(shards: ShardSet, count: int) -> _Pool:
    rows = 0
    for number in range(shards.parts):
        rows += PartManifest.read(shards.part(number)).facts.validation.rows
        if rows >= count:
            return _Pool(number + 1, rows)
    return _Pool(shards.parts, rows)


def _documents(shards: ShardSet, chosen: Int64Array, parts: int) -> int:
    """Return the number of documents in the `chosen` validation rows of the first `parts` parts."""
    return sum(len(np.unique(documents)) for documents, _ in _pieces(shards, chosen, parts))


def _pieces(
    shards: ShardSet, chosen: Int64Array, parts: int
) -> Iterator[tuple[Int64Array, Int64Array]]:
    """Yield, for each of the first `parts` parts, the pieces of documents in the `chosen` rows.

    A piece is a number of its document, which no other document of the set has, and its row.
    """
    first, before = 0, 0
    for path in map(shards.part, range(parts)):
        table = document_table.read(path, ["split", "row", "start"])
        held_out = arrays.equals(table["split"], "validation")
        rows = arrays.whole_numbers(table["row"])[held_out] + first
        # The pieces of a document follow each other, and its first starts at 0
        document = before + np.cumsum(arrays.whole_numbers(table["start"])[held_out] == 0)
        in_sample = np.isin(rows, chosen)
        yield document[in_sample], rows[in_sample]
        first += PartManifest.read(path).facts.validation.rows
        before = document.max(initial=before)
