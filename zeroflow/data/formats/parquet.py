"""Parquet: each row is a document; text, id and URL are columns."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from zeroflow.data import arrays, documents
from zeroflow.data.documents import Tally, TextBatch
from zeroflow.data.formats.file import DocumentFile
from zeroflow.data.formats.format import Format, Sample

_STRINGS = (pa.string(), pa.large_string(), pa.string_view())
_BYTES = (pa.binary(), pa.large_binary(), pa.binary_view())
"""Types of text columns that a writer has not marked as text, as Spark and Impala do by default."""


class ParquetFormat(Format):
    """Parts are ranges of row groups."""

    description = ".parquet"
    is_dense = True

    def read(
        self, file: DocumentFile, start: int, stop: int | None, tally: Tally
    ) -> Iterator[TextBatch]:
        with _open(file) as opened:
            column = _text_column(file, opened)
            columns = [column, *_other_columns(file, opened)]
            footer = opened.metadata
            groups = range(start, footer.num_row_groups if stop is None else stop)
            number = sum(footer.row_group(group).num_rows for group in range(start))
            batches = opened.iter_batches(
                _rows_at_once(footer, groups, column),
                row_groups=groups,
                columns=columns,
                use_threads=False,  # several parts are built at once, each in its own thread
            )
            for batch in batches:
                values = batch.column(column)
                ids, urls = (
                    _as_strings(batch.column(name))
                    if name in columns
                    else arrays.strings([""] * len(batch))
                    for name in ("id", "url")
                )
                if not arrays.byte_lengths(ids).all():
                    numbered = enumerate(ids.to_pylist(), start=number + 1)
                    ids = arrays.strings(id_ or f"{file.name}:{row}" for row, id_ in numbered)
                try:
                    found = _without_empty(_texts(values), ids, urls, tally)
                except (UnicodeDecodeError, pa.ArrowInvalid):
                    _require_utf8(file, values, number)
                    raise
                number += len(batch)
                yield found

    def sample(self, file: DocumentFile, offset: int, most_bytes: int) -> Sample:
        with _open(file) as opened:
            footer = opened.metadata
        group = offset * footer.num_row_groups // file.file.size
        tally, texts, size = Tally(), list[str](), 0
        for batch in self.read(file, group, group + 1, tally):
            texts += batch.texts
            size += int(batch.text_bytes.sum())
            if size >= most_bytes:
                break
        share = (len(texts) + tally.empty) / max(1, footer.num_rows)
        return Sample(texts, len(texts), group, share * file.file.size)

    def cuts(self, file: DocumentFile, part_bytes: int) -> list[int]:
        with _open(file) as opened:
            footer, column = opened.metadata, _text_column(file, opened)
            sizes = [
                _column_bytes(footer.row_group(group), column)
                for group in range(footer.num_row_groups)
            ]
        cuts, taken = [0], 0
        for number, size in enumerate(sizes, start=1):
            taken += size
            if taken >= part_bytes or number == len(sizes):
                cuts.append(number)
                taken = 0
        return cuts


_NESTED = "fields in nested columns are not read: write the text to a column of its own"


def _open(file: DocumentFile) -> pq.ParquetFile:
    content: Any
    footer, remote = None, file.path is None
    if file.is_compressed:
        # A Parquet reader begins at the end of the file, and a compressed stream cannot seek there
        with file.open_decompressed() as stream:
            content = pa.BufferReader(stream.read())
    elif remote:
        content, footer = pa.PythonFile(file.open(), mode="r"), _footer(file)
    else:
        content = str(file.path)
    return pq.ParquetFile(
        content,
        metadata=footer,
        memory_map=False,  # if a mapped file is truncated meanwhile, reading it is a bus error
        pre_buffer=remote,  # one request for all columns of a row group
        page_checksum_verification=True,
    )


@lru_cache(maxsize=4)
def _footer(file: DocumentFile) -> pq.FileMetaData:
    """The footer of a remote file, cached: it has about a megabyte and is needed for each part."""
    return pq.read_metadata(pa.PythonFile(file.open(), mode="r"))


def _text_column(file: DocumentFile, opened: pq.ParquetFile) -> str:
    """The name of the text column.

    Raises:
        ValueError: there is not exactly one such column, or it does not contain text.
    """
    present = opened.schema_arrow.names
    if present.count(file.text_column) != 1:
        nested = file.text_column.partition(".")[0] in present
        raise ValueError(
            f"{file.place} must have exactly one column {file.text_column!r}, but has {present}: "
            + (_NESTED if nested else "set --text-column")
        )
    kind = opened.schema_arrow.field(file.text_column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if kind not in (*_STRINGS, *_BYTES):
        raise ValueError(
            f"{file.place} has {kind} in column {file.text_column!r}, not text: "
            + (_NESTED if pa.types.is_nested(kind) else "set --text-column")
        )
    return file.text_column


def _other_columns(file: DocumentFile, opened: pq.ParquetFile) -> list[str]:
    """Return those of the columns `id` and `url` that the file has."""
    present = opened.schema_arrow.names
    for name in ("id", "url"):
        if present.count(name) > 1:
            raise ValueError(
                f"{file.place} has {present.count(name)} columns {name!r}: keep only one"
            )
    return [c for c in ("id", "url") if c in present and c != file.text_column]


def _rows_at_once(footer: pq.FileMetaData, groups: range, column: str) -> int:
    """Return the rows of a batch: fewer if documents are long, as eight batches are in memory."""
    rows = sum(footer.row_group(group).num_rows for group in groups)
    size = sum(_column_bytes(footer.row_group(group), column) for group in groups)
    return max(1, min(documents.BATCH_DOCUMENTS, documents.BATCH_BYTES * rows // max(1, size)))


def _column_bytes(group: pq.RowGroupMetaData, name: str) -> int:
    columns = (group.column(number) for number in range(group.num_columns))
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema == name)


def _texts(values: pa.Array) -> pa.StringArray:
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    return _as_strings(values.cast(pa.string()) if values.type in _BYTES else values)


def _require_utf8(file: DocumentFile, values: pa.Array, rows: int) -> None:
    """Check the texts of a batch that could not be decoded.

    Args:
        rows: number of rows before the batch.

    Raises:
        ValueError: one is not UTF-8. The Parquet reader does not check that.
    """
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    for row, text in enumerate(values.cast(pa.binary()).to_pylist(), start=rows + 1):
        try:
            (text or b"").decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{file.place} has a text in row {row:,} that is not UTF-8: its byte "
                f"{error.start:,} is 0x{text[error.start]:02x}: correct or remove the row"
            ) from error


def _as_strings(values: pa.Array) -> pa.StringArray:
    """A column as strings: null becomes empty, and a number is formatted as Python does."""
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if kind in _STRINGS:
        texts = values if values.type == pa.string() else values.cast(pa.string())
        return texts.fill_null("") if texts.null_count else texts
    return arrays.strings("" if value is None else str(value) for value in values.to_pylist())


def _without_empty(
    texts: pa.StringArray, ids: pa.StringArray, urls: pa.StringArray, tally: Tally
) -> TextBatch:
    text_bytes = arrays.byte_lengths(texts)
    if not text_bytes.all():
        full = arrays.numbers(np.flatnonzero(text_bytes), pa.int64())
        tally.empty += len(texts) - len(full)
        texts, ids, urls = (values.take(full) for values in (texts, ids, urls))
        text_bytes = text_bytes[text_bytes > 0]
    for values in (ids, urls):
        values.validate(full=True)  # the Parquet reader does not check that strings are UTF-8
    return TextBatch(ids.view(pa.binary()), urls, texts.to_pylist(), text_bytes)
