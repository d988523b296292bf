"""documents.parquet of a part: the position of each document.

It has one line for each piece of a document, in order: id, url, split, row of that split in the
part, offset in the row, start in the document, tokens of the piece, UTF-8 bytes of the whole
document, and a hash of its text if duplicates are left out.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from zeroflow.data import arrays
from zeroflow.data.packing import Pieces
from zeroflow.data.shards import Split
from zeroflow.data.token_batches import DocumentColumns

FILE = "documents.parquet"

MOST_NAME_BYTES = 2**30
"""Maximum number of bytes of ids, or of URLs, in lines that are written at once, because the
offsets of an Arrow array have 32 bits."""

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("url", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("offset", pa.int32(), nullable=False),
        pa.field("start", pa.int64(), nullable=False),
        pa.field("tokens", pa.int32(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("text_hash", pa.uint64(), nullable=False),
    ]
)


class DocumentTable:
    """Writer of a part's table."""

    def __init__(self, writer: pq.ParquetWriter) -> None:
        self._writer = writer

    @classmethod
    @contextmanager
    def create(cls, part: Path) -> Iterator[Self]:
        with (
            pa.OSFile(str(part / FILE), "wb") as sink,  # can be closed even if the disk is full
            pq.ParquetWriter(sink, SCHEMA, compression="zstd") as writer,
        ):
            yield cls(writer)

    def add(
        self, split: Split, documents: DocumentColumns, pieces: Pieces, *, first_row: int
    ) -> None:
        """Write the lines of a window of documents; the window's first row is `first_row`."""
        ids, urls = arrays.well_formed_strings(documents.ids), documents.urls
        sizes = [arrays.byte_lengths(names)[documents.places] for names in (ids, urls)]
        longest = int(np.max(sizes))
        at_once = max(1, MOST_NAME_BYTES // max(1, longest))  # every piece repeats its names
        for begin in range(0, len(pieces.document), at_once):
            some = slice(begin, begin + at_once)
            document = pieces.document[some]
            names = arrays.numbers(documents.places[document], pa.int64())
            columns = [
                ids.take(names),
                urls.take(names),
                arrays.strings([split] * len(document)),
                arrays.numbers(pieces.row[some] + first_row, pa.int64()),
                arrays.numbers(pieces.offset[some], pa.int32()),
                arrays.numbers(pieces.start[some], pa.int64()),
                arrays.numbers(pieces.tokens[some], pa.int32()),
                arrays.numbers(documents.text_bytes[document], pa.int64()),
                arrays.numbers(documents.hashes[document], pa.uint64()),
            ]
            self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))


def read(
    part: Path, columns: Sequence[str] | None = None, filters: pc.Expression | None = None
) -> pa.Table:
    """The table of a part, or the requested columns and lines of it."""
    wanted = None if columns is None else list(columns)
    if filters is not None:
        return pq.read_table(part / FILE, columns=wanted, filters=filters)
    with pq.ParquetFile(part / FILE) as file:  # read_table imports pandas, which takes a second
        return file.read(wanted)
