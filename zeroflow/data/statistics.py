"""A look at the rows that a run reads: what they are made of, and what became of the documents."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from zeroflow import artifacts
from zeroflow.data.packing import Ids
from zeroflow.data.part_facts import DOCUMENTS
from zeroflow.data.rows import Rows
from zeroflow.data.shards import PLAN, ShardSet, build_times
from zeroflow.data.tokenizer import Tokenizer

_SAMPLES = 3


_SAMPLE_TOKENS = 80


class Look(NamedTuple):
    source: dict[str, Any]
    """What the documents depend on: source, revision and the like."""

    tokenizer: str
    lengths: Ids
    """Tokens of every training document, its end of text included."""

    samples: list[str]
    """Beginnings of a few rows spread over the training split, decoded."""

    tokens_per_second: float | None
    """While parts were built on this machine; None if none was."""

    text_bytes_per_second: float | None


def look(shards: ShardSet, tokenizer: Tokenizer) -> Look:
    """Gather what is known of a shard set, from its manifests, tables and rows."""
    plan = artifacts.read_signed(shards.path / PLAN)
    times = [line for line in build_times(shards.path) if line["part"] < shards.parts]
    seconds = sum(line["seconds"] for line in times)
    return Look(
        source=plan["identity"]["corpus"],
        tokenizer=plan["tokenizer"],
        lengths=np.concatenate([_document_lengths(path) for path in shards.part_paths]),
        samples=_samples(Rows(shards, "train"), tokenizer),
        tokens_per_second=sum(t["tokens"] for t in times) / seconds if times else None,
        text_bytes_per_second=sum(t["text_bytes"] for t in times) / seconds if times else None,
    )


def _document_lengths(part: Path) -> Ids:
    table = pq.read_table(part / DOCUMENTS, columns=["split", "start", "tokens"])
    table = table.filter(pc.equal(table["split"], "train"))
    starts = table["start"].to_numpy()
    tokens = table["tokens"].to_numpy().astype(np.int64)
    # the pieces of a document follow each other, and its first starts at 0
    return np.add.reduceat(tokens, np.flatnonzero(starts == 0)) if len(tokens) else tokens


def _samples(rows: Rows, tokenizer: Tokenizer) -> list[str]:
    places = np.linspace(0, len(rows), min(_SAMPLES, len(rows)), endpoint=False, dtype=np.int64)
    beginnings = [row[:_SAMPLE_TOKENS].tolist() for row in rows[places]]
    if tokenizer.path is None:
        return [" ".join(map(str, ids)) for ids in beginnings]
    backend = tokenizer.load()
    return [backend.decode(ids, skip_special_tokens=False) for ids in beginnings]
