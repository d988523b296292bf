"""Statistics of the rows that a run reads: source, document lengths, samples, build speed."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from zeroflow.data import arrays, document_table
from zeroflow.data.arrays import Int64Array
from zeroflow.data.build_times import last_build_times
from zeroflow.data.corpus import CorpusIdentity
from zeroflow.data.part_plan import ShardPlan
from zeroflow.data.rows import Rows
from zeroflow.data.shards import ShardSet
from zeroflow.data.tokenizer import Tokenizer

_SAMPLES = 3
"""Number of rows whose beginning is shown."""

_MOST_TABLES = 64
"""Maximum number of parts whose tables are read; together they have about a million documents."""

_SAMPLE_TOKENS = 80
"""Number of tokens of a row that are shown."""


class ShardStatistics(NamedTuple):
    source: CorpusIdentity
    """Settings that identify the corpus, such as source and revision, as in plan.json."""

    tokenizer: str
    lengths: Int64Array
    """Length of the training documents of `parts` in tokens, their ends of text included."""

    parts: int
    """Number of parts, spread evenly, whose documents are in `lengths`."""

    samples: list[str]
    """Decoded beginnings of a few rows spread over the training split."""

    tokens_per_second: float | None
    """Speed of the last builds on this machine; None if no part was built here."""

    text_bytes_per_second: float | None


def gather(shards: ShardSet, tokenizer: Tokenizer) -> ShardStatistics:
    """Statistics of a shard set, from its plan, its tables and a few of its rows."""
    plan = ShardPlan.read(shards.path)
    times = [line for line in last_build_times(shards.path) if line.part < shards.parts]
    numbers = shards.some_parts(_MOST_TABLES)
    seconds = sum(line.seconds for line in times)
    return ShardStatistics(
        source=plan.identity.corpus,
        tokenizer=plan.tokenizer,
        lengths=np.concatenate([_document_lengths(shards.part(number)) for number in numbers]),
        parts=len(numbers),
        samples=_samples(Rows(shards, "train"), tokenizer),
        tokens_per_second=sum(line.tokens for line in times) / seconds if times else None,
        text_bytes_per_second=sum(line.text_bytes for line in times) / seconds if times else None,
    )


def _document_lengths(part: Path) -> Int64Array:
    table = document_table.read(part, ["split", "start", "tokens"])
    trained = arrays.equals(table["split"], "train")
    starts = arrays.whole_numbers(table["start"])[trained]
    tokens = arrays.whole_numbers(table["tokens"])[trained].astype(np.int64)
    # the pieces of a document are consecutive, and the first one starts at 0
    return np.add.reduceat(tokens, np.flatnonzero(starts == 0)) if len(tokens) else tokens


def _samples(rows: Rows, tokenizer: Tokenizer) -> list[str]:
    places = np.linspace(0, len(rows), min(_SAMPLES, len(rows)), endpoint=False, dtype=np.int64)
    decode = tokenizer.decoder()
    return [decode(row[:_SAMPLE_TOKENS].tolist()) for row in rows[places]]
