"""The held-out rows on which every run with a shard set validates.

Packing puts full rows of long documents first, so the first rows of a split are not representative.
The sample is drawn with a fixed key from the first parts that have enough rows. So it is the same
for every run and model with this set, even if a run reads more parts.
"""

from typing import NamedTuple

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from zeroflow.config import Config
from zeroflow.data import arrays, document_table, encoding
from zeroflow.data.arrays import BoolArray, Float64Array, Int64Array
from zeroflow.data.batches import IGNORED, to_micro_batch
from zeroflow.data.order import permute
from zeroflow.data.rows import Rows
from zeroflow.data.shards import PartManifest, ShardSet
from zeroflow.data.token_bytes import may_add_text, token_bytes
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
    """UTF-8 bytes of the text of exactly these tokens, without unknown ones; None for synthetic
    data."""

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


class ValidationSample(NamedTuple):
    """The rows of a validation, and the documents of their tokens."""

    rows: Int64Array
    """Numbers of the rows, in order."""

    documents: Int64Array
    """(rows, row_tokens): number of the document of each token, from 0; -1 for padding."""

    pool: "_Pool"

    @property
    def sampled_documents(self) -> int:
        """Number of documents with at least one token in the sample."""
        return int(self.documents.max(initial=-1)) + 1


class _Pool(NamedTuple):
    """The first parts of a set that hold enough validation rows."""

    parts: int
    rows: int
    text_bytes: int
    """UTF-8 bytes of their held-out documents."""


def validation_rows(shards: ShardSet, count: int) -> Int64Array:
    """Return the numbers of the rows of the sample: `count` rows, or all if there are fewer.

    A larger sample of the same parts contains the smaller one.
    """
    pool = _pool(shards, count)
    places = np.arange(min(count, pool.rows))
    return np.sort(permute(places, pool.rows, _KEY))


def draw_sample(shards: ShardSet, count: int) -> ValidationSample:
    """Return the sample of `validation_rows(shards, count)`. This reads the tables of documents."""
    chosen, pool = validation_rows(shards, count), _pool(shards, count)
    documents = np.full((len(chosen), shards.row_tokens), -1, dtype=np.int64)
    first = before = 0
    for path in map(shards.part, range(pool.parts)):
        table = document_table.read(path, ["split", "row", "offset", "start", "tokens"])
        held_out = arrays.equals(table["split"], "validation")
        row, offset, start, tokens = (
            arrays.whole_numbers(table[name])[held_out]
            for name in ("row", "offset", "start", "tokens")
        )
        # The pieces of a document follow each other, and its first starts at 0
        document = before + np.cumsum(start == 0)
        before = document.max(initial=before)
        some = np.isin(row + first, chosen)
        place = np.searchsorted(chosen, row[some] + first)
        lengths = tokens[some]
        begin = place * shards.row_tokens + offset[some]
        position = np.repeat(begin - np.cumsum(lengths) + lengths, lengths)
        position += np.arange(len(position))
        documents.flat[position] = np.repeat(document[some], lengths)
        first += PartManifest.read(path).facts.validation.rows
    numbers = np.unique(documents[documents >= 0], return_inverse=True)[1]
    documents[documents >= 0] = numbers
    return ValidationSample(chosen, documents, pool)


def count_sample(shards: ShardSet, tokenizer: Tokenizer, sample: ValidationSample) -> SampleCounts:
    """Return the contents of a sample."""
    valid, scored = _scored(shards, sample)
    sizes = target_bytes(shards, tokenizer, sample)
    unknown = None
    if tokenizer.path is not None:
        unknown_id = encoding.unknown_id(tokenizer.load())
        unknown = 0 if unknown_id is None else int((scored[valid] == unknown_id).sum())
    return SampleCounts(
        rows=len(sample.rows),
        documents=sample.sampled_documents,
        tokens=int(valid.sum()),
        text_bytes=None if sizes is None else round(sizes.sum()),
        unknown=unknown,
    )


def target_bytes(
    shards: ShardSet, tokenizer: Tokenizer, sample: ValidationSample
) -> Float64Array | None:
    """Return the bytes of text of each target of a sample, (rows, T); None for synthetic data."""
    if tokenizer.path is None:
        return None
    loaded, end = tokenizer.load(), shards.end_of_text
    rows = Rows(shards, "validation")
    chosen = rows[sample.rows]
    before, targets = chosen[:, :-1], chosen[:, 1:]
    sizes = token_bytes(loaded, targets.astype(np.int64), before == end, end_of_text=end)
    if not may_add_text(loaded):
        return sizes.astype(np.float64)
    every = rows[np.arange(sample.pool.rows)].astype(np.int64)
    # The first token of every row counts as the beginning of a text, which is at most a space less
    begins = np.pad(every[:, :-1] == end, ((0, 0), (1, 0)), constant_values=True)
    counted = int(token_bytes(loaded, every, begins, end_of_text=end).sum())
    share = min(1.0, sample.pool.text_bytes / max(1, counted))
    return sizes.astype(np.float64) * share


def _scored(shards: ShardSet, sample: ValidationSample) -> tuple[BoolArray, Int64Array]:
    """Return which targets of a sample are scored, and all targets."""
    rows = Rows(shards, "validation")
    batch = to_micro_batch(rows[sample.rows], end_of_text=rows.end_of_text)
    targets = batch.targets.numpy()
    return targets != IGNORED, targets


def _pool(shards: ShardSet, count: int) -> _Pool:
    rows = text_bytes = 0
    for number in range(shards.parts):
        facts = PartManifest.read(shards.part(number)).facts.validation
        rows, text_bytes = rows + facts.rows, text_bytes + facts.text_bytes
        if rows >= count:
            return _Pool(number + 1, rows, text_bytes)
    return _Pool(shards.parts, rows, text_bytes)
