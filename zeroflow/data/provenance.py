"""Which documents lie in given rows: from a batch of a run back to the texts it was made of."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from zeroflow import artifacts
from zeroflow.data.packing import Ids
from zeroflow.data.part_facts import DOCUMENTS, PartFacts
from zeroflow.data.rows import Rows
from zeroflow.data.shards import ShardSet
from zeroflow.data.tokenizer import Tokenizer

_FIRST_TOKENS = 24


class Piece(NamedTuple):
    """What a row holds of a document."""

    row: int
    """Of the training rows that the run reads, from 0."""

    part: int
    offset: int
    """Token of the row at which the piece begins."""

    document: str
    url: str
    """Empty where the source has none."""

    start: int
    """Token of the document at which the piece begins."""

    tokens: int
    """Tokens of the piece."""

    words: str
    """Its beginning as text; token ids where there is no text."""


def pieces(shards: ShardSet, tokenizer: Tokenizer, rows: Ids) -> list[Piece]:
    """The pieces of documents in each of the training `rows`, in the order given.

    Documents are read of those parts only that hold one of the rows.
    """
    counts = [_facts(path).train.rows for path in shards.part_paths]
    ends = np.cumsum(counts)
    of_part = np.searchsorted(ends, rows, side="right")
    found: dict[int, list[Piece]] = {row: [] for row in rows.tolist()}
    contents = Rows(shards, "train")
    decode = _decoder(tokenizer)
    for part in np.unique(of_part).tolist():
        first = int(ends[part]) - counts[part]
        here = rows[of_part == part]
        for line in _lines(shards.part_paths[part], here - first):
            row, offset, length = first + line["row"], line["offset"], line["tokens"]
            beginning = contents[np.array([row])][0, offset : offset + min(length, _FIRST_TOKENS)]
            piece = Piece(
                row=row,
                part=part,
                offset=offset,
                document=line["id"],
                url=line["url"],
                start=line["start"],
                tokens=length,
                words=decode([i for i in beginning.tolist() if i != shards.end_of_text]),
            )
            found[row].append(piece)
    # A batch longer than an epoch holds a row more than once
    return [piece for row in rows.tolist() for piece in sorted(found[row])]


def _decoder(tokenizer: Tokenizer) -> Callable[[list[int]], str]:
    """What makes one line of text of token ids."""
    if tokenizer.path is None:
        return lambda ids: " ".join(map(str, ids))
    backend = tokenizer.load()
    return lambda ids: " ".join(backend.decode(ids, skip_special_tokens=False).split())


def _facts(part: Path) -> PartFacts:
    return PartFacts.model_validate(artifacts.read_json(part / artifacts.MANIFEST)["facts"])


def _lines(part: Path, rows: Ids) -> list[dict[str, Any]]:
    """The table's lines of those training rows of a part.

    Raises:
        DamagedArtifact: the table cannot be read.
    """
    chosen = (pc.field("split") == "train") & pc.field("row").isin(rows.tolist())
    columns = ["id", "url", "row", "offset", "start", "tokens"]
    table = part / DOCUMENTS
    try:
        return pq.read_table(table, columns=columns, filters=chosen).to_pylist()
    except (OSError, pa.ArrowException) as error:
        why = f"cannot be read ({error})" if table.exists() else "is missing"
        raise artifacts.DamagedArtifact(
            f"{table} {why}: the command of the run sets the part aside and builds it anew"
        ) from error
