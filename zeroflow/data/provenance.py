"""Provenance of rows: the documents that given rows contain."""

from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from zeroflow import artifacts
from zeroflow.data import document_table, part_counts
from zeroflow.data.arrays import Int64Array
from zeroflow.data.rows import Rows
from zeroflow.data.shards import ShardSet
from zeroflow.data.tokenizer import Tokenizer

_FIRST_TOKENS = 24
"""Number of tokens of a piece that are shown as text."""


class Piece(NamedTuple):
    """A piece of a document in a row."""

    row: int
    """Index of the row among the training rows that the run reads, from 0."""

    part: int
    offset: int
    """Index in the row of the piece's first token."""

    document: str
    """The document's id."""

    url: str
    """Empty if the source has none."""

    start: int
    """Index in the document of the piece's first token."""

    tokens: int
    """Number of tokens of the piece."""

    words: str
    """Its beginning as text; token ids for synthetic data."""


def pieces(shards: ShardSet, tokenizer: Tokenizer, rows: Int64Array) -> list[Piece]:
    """Return the pieces of documents in each of the training `rows`, in the order of `rows`.

    Only the tables of parts that contain one of the rows are read.

    Raises:
        DamagedArtifact: a table cannot be read.
    """
    counts = part_counts.of(shards).column("train_rows")
    ends = np.cumsum(counts)
    part_of = np.searchsorted(ends, rows, side="right")
    found: dict[int, list[Piece]] = {row: [] for row in rows.tolist()}
    contents, decode = Rows(shards, "train"), tokenizer.decoder()
    for part in np.unique(part_of).tolist():
        first = int(ends[part] - counts[part])
        here = rows[part_of == part]
        for line in _lines(shards.part(part), here - first):
            row, offset, length = first + line["row"], line["offset"], line["tokens"]
            beginning = contents[np.array([row])][0, offset : offset + min(length, _FIRST_TOKENS)]
            ids = [token for token in beginning.tolist() if token != shards.end_of_text]
            piece = Piece(
                row=row,
                part=part,
                offset=offset,
                document=line["id"],
                url=line["url"],
                start=line["start"],
                tokens=length,
                words=" ".join(decode(ids).split()),
            )
            found[row].append(piece)
    # A batch longer than an epoch contains a row more than once
    return [piece for row in rows.tolist() for piece in sorted(found[row])]


class _TableLine(TypedDict):
    """A piece of a document in the table of a part."""

    id: str
    url: str
    row: int
    offset: int
    start: int
    tokens: int


def _lines(part: Path, rows: Int64Array) -> list[_TableLine]:
    """The table's lines for some training rows of a part.

    Raises:
        DamagedArtifact: the table cannot be read.
    """
    chosen = (pc.field("split") == "train") & pc.field("row").isin(rows.tolist())
    try:
        lines: list[_TableLine] = document_table.read(
            part, [*_TableLine.__annotations__], chosen
        ).to_pylist()
        return lines
    except (OSError, pa.ArrowException) as error:
        table = part / document_table.FILE
        why = f"cannot be read ({error})" if table.exists() else "is missing"
        raise artifacts.DamagedArtifact(
            f"{table} {why}: run the command of the run again, which sets the part aside and "
            "rebuilds it"
        ) from error
