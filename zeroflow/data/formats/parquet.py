"""Parquet: each row is a document; text, id and URL are columns."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from zeroflow.data import arrays, documents
from zeroflow.data.arrays import Int64Array
from zeroflow.data.documents import Tally, TextBatch
from zeroflow.data.formats.file import DocumentFile
from zeroflow.data.formats.format import Format, Sample, count_bad_line

_STRINGS = (pa.string(), pa.large_string(), pa.string_view())
_BYTES = (pa.binary(), pa.large_binary(), pa.binary_view())
"""Types of text columns that a writer has not marked as text, as Spark and Impala do by default."""

_TEXTS = (*_STRINGS, *_BYTES)


class ParquetFormat(Format):
    """Parts are ranges of row groups."""

    description = ".parquet"
    is_dense = True

    def read(
        self, file: DocumentFile, start: int, stop: int | None, tally: Tally
    ) -> Iterator[TextBatch]:
        with _open(file) as opened:
            column = _text_column(file, opened)
            footer = opened.metadata
            groups = range(start, footer.num_row_groups if stop is None else stop)
            number = sum(_group_rows(footer)[:start])
            batches = opened.iter_batches(
                _rows_at_once(footer, groups, column),
                row_groups=groups,
                columns=[column, *_other_columns(file, opened)],
                use_threads=False,  # several parts are built at once, each in its own thread
            )
            for batch in batches:
                rows = np.arange(number, number + len(batch))
                try:
                    found, empty = _documents(file, batch, rows)
                except (UnicodeDecodeError, pa.ArrowInvalid):
                    good = _good_rows(file, footer, batch, rows, tally)
                    if len(good) == len(rows):
                        raise
                    found, empty = _documents(file, _taken(batch, good), rows[good])
                tally.empty += empty
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


_NAMED = ("id", "url")
"""Columns that are read besides the text."""

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
    if kind not in _TEXTS:
        raise ValueError(
            f"{file.place} has {kind} in column {file.text_column!r}, not text: "
            + (_NESTED if pa.types.is_nested(kind) else "set --text-column")
        )
    return file.text_column


def _other_columns(file: DocumentFile, opened: pq.ParquetFile) -> list[str]:
    """Return those of the columns `id` and `url` that the file has."""
    present = opened.schema_arrow.names
    for name in _NAMED:
        if present.count(name) > 1:
            raise ValueError(
                f"{file.place} has {present.count(name)} columns {name!r}: keep only one"
            )
    return [c for c in _NAMED if c in present and c != file.text_column]


def _rows_at_once(footer: pq.FileMetaData, groups: range, column: str) -> int:
    """Return the rows of a batch: fewer if documents are long, as eight batches are in memory."""
    rows = sum(_group_rows(footer)[group] for group in groups)
    size = sum(_column_bytes(footer.row_group(group), column) for group in groups)
    return max(1, min(documents.BATCH_DOCUMENTS, documents.BATCH_BYTES * rows // max(1, size)))


def _group_rows(footer: pq.FileMetaData) -> list[int]:
    """Return the number of rows of each row group."""
    return [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]


def _column_bytes(group: pq.RowGroupMetaData, name: str) -> int:
    columns = (group.column(number) for number in range(group.num_columns))
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema == name)


def _texts(values: pa.Array) -> pa.StringArray:
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    return _as_strings(values.cast(pa.string()) if values.type in _BYTES else values)


def _documents(
    file: DocumentFile, batch: pa.RecordBatch, rows: Int64Array
) -> tuple[TextBatch, int]:
    """Return the documents of a batch, and the number of empty ones, which are left out.

    Args:
        rows: number of each row in the file, from 0; a document without an id gets its id from it.

    Raises:
        UnicodeDecodeError, pa.ArrowInvalid: a text, id or URL is not UTF-8.
    """
    ids, urls = (
        _as_strings(batch.column(name))
        if name in batch.schema.names and name != file.text_column
        else arrays.strings([""] * len(batch))
        for name in _NAMED
    )
    if not arrays.byte_lengths(ids).all():
        numbered = zip(rows.tolist(), ids.to_pylist(), strict=True)
        ids = arrays.strings(id_ or f"{file.name}:{row + 1}" for row, id_ in numbered)
    texts = _texts(batch.column(file.text_column))
    text_bytes = arrays.byte_lengths(texts)
    if not text_bytes.all():
        full = arrays.numbers(np.flatnonzero(text_bytes), pa.int64())
        texts, ids, urls = (values.take(full) for values in (texts, ids, urls))
        text_bytes = text_bytes[text_bytes > 0]
    for values in (ids, urls):
        values.validate(full=True)  # the Parquet reader does not check that strings are UTF-8
    empty = len(batch) - len(texts)
    return TextBatch(ids.view(pa.binary()), urls, texts.to_pylist(), text_bytes), empty


def _good_rows(
    file: DocumentFile,
    footer: pq.FileMetaData,
    batch: pa.RecordBatch,
    rows: Int64Array,
    tally: Tally,
) -> Int64Array:
    """Return the places in `batch` of the rows that are UTF-8, and count the others as bad lines.

    Raises:
        ValueError: there are more bad lines than allowed.
    """
    contents = []
    for name in batch.schema.names:
        kinds, values = _TEXTS if name == file.text_column else _STRINGS, batch.column(name)
        contents.append(_bytes(values) if _kind(values) in kinds else [b""] * len(rows))
    ends, good = np.cumsum(_group_rows(footer)), []
    for place, (row, *values) in enumerate(zip(rows.tolist(), *contents, strict=True)):
        for name, value in zip(batch.schema.names, values, strict=True):
            try:
                value.decode()
            except UnicodeDecodeError as error:
                group = np.searchsorted(ends, row, side="right")
                count_bad_line(
                    file,
                    tally,
                    f"{file.place}, row {row + 1:,} (in row group {group}, counted from 0) is not "
                    f"UTF-8: byte {error.start:,} of its {name!r} is 0x{value[error.start]:02x}: "
                    "correct or remove the row",
                )
                break
        else:
            good.append(place)
    return np.array(good, dtype=np.int64)


def _taken(batch: pa.RecordBatch, places: Int64Array) -> pa.RecordBatch:
    """Return some rows of a batch. Arrow's `take` does not support all types of strings."""
    columns = {}
    for name in batch.schema.names:
        values = batch.column(name)
        if _kind(values) in _TEXTS:
            contents = _bytes(values)
            taken = arrays.binary([contents[place] for place in places])
            columns[name] = taken if _kind(values) in _BYTES else taken.view(pa.string())
        else:
            columns[name] = values.take(arrays.numbers(places, pa.int64()))
    return pa.RecordBatch.from_pydict(columns)


def _kind(values: pa.Array) -> pa.DataType:
    return values.type.value_type if pa.types.is_dictionary(values.type) else values.type


def _bytes(values: pa.Array) -> list[bytes]:
    """Return the strings of a column, without decoding them; null becomes empty."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    return [value or b"" for value in values.cast(pa.binary()).to_pylist()]


def _as_strings(values: pa.Array) -> pa.StringArray:
    """A column as strings: null becomes empty, and a number is formatted as Python does."""
    if _kind(values) in _STRINGS:
        texts = values if values.type == pa.string() else values.cast(pa.string())
        return texts.fill_null("") if texts.null_count else texts
    return arrays.strings("" if value is None else str(value) for value in values.to_pylist())
