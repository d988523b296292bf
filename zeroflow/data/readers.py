"""Files of documents: text, JSON lines and Parquet, compressed or not, in batches of columns.

What a file holds is told by its name. Each is read by itself, whatever corpus it belongs to.
"""

import codecs
import io
import json
import lzma
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, chain
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import NonNegativeInt

from zeroflow.config import Config
from zeroflow.data import hub
from zeroflow.data.hub import HubFile

# What the decompressors, the Parquet reader and UTF-8 raise; none of them names the file
UNREADABLE = (OSError, EOFError, lzma.LZMAError, pa.ArrowException, UnicodeDecodeError)

_READ_ROWS = 1000
_READ_BYTES = 2**20
_SUFFIXES = (".txt", ".jsonl", ".parquet")
_ALSO = {".json": ".jsonl", ".ndjson": ".jsonl", ".py": ".txt"}  # .py of the sample
_COMPRESSED = (".gz", ".bz2", ".zst", ".lz4", ".xz")
_STRINGS = (pa.string(), pa.large_string(), pa.string_view())
_PLACES = 10


class Document(NamedTuple):
    id: str
    text: str
    url: str = ""


class Batch(NamedTuple):
    """Some documents, none of them empty, in columns."""

    ids: pa.BinaryArray
    """UTF-8, but for the lone surrogates that an id from JSON can hold."""

    urls: pa.StringArray
    texts: list[str]
    """Without surrogates."""

    text_bytes: npt.NDArray[np.int64]
    """Of each text in UTF-8."""


@dataclass
class Tally:
    """What was left out in reading."""

    empty: int = 0
    bad: int = 0
    places: list[str] = field(default_factory=list)
    """Where the first bad lines are, and why they are bad."""


def regrouped(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same documents in batches of about equal size, whatever files they are of."""
    waiting: list[Batch] = []
    documents = characters = 0  # that wait
    for batch in batches:
        passed = list(accumulate(map(len, batch.texts), initial=0))
        begin = 0
        while begin < len(batch.texts):
            # a batch ends with the text that fills it
            filled = bisect_left(passed, passed[begin] + _READ_BYTES - characters, begin + 1)
            end = min(filled, begin + _READ_ROWS - documents, len(batch.texts))
            waiting.append(_cut_out(batch, begin, end))
            documents += end - begin
            characters += passed[end] - passed[begin]
            if documents >= _READ_ROWS or characters >= _READ_BYTES:
                yield _joined(waiting)
                waiting, documents, characters = [], 0, 0
            begin = end
    if waiting:
        yield _joined(waiting)


def _cut_out(batch: Batch, begin: int, end: int) -> Batch:
    return Batch(
        batch.ids[begin:end],
        batch.urls[begin:end],
        batch.texts[begin:end],
        batch.text_bytes[begin:end],
    )


def _joined(batches: list[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    ids, urls, texts, text_bytes = zip(*batches, strict=True)
    return Batch(
        pa.concat_arrays(ids),
        pa.concat_arrays(urls),
        list(chain.from_iterable(texts)),
        np.concatenate(text_bytes),
    )


def sound_text(text: str) -> tuple[str, int]:
    """`text` without surrogates, and its bytes in UTF-8.

    JSON can hold half of a UTF-16 pair, which is no character: U+FFFD takes its place.
    """
    try:
        return text, len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError:
        sound = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return sound, len(sound.encode())


# What pa.array gives too, but that imports pandas, which takes a third of a second


def numbers(values: npt.NDArray[Any], kind: pa.DataType) -> pa.Array:
    buffer = pa.py_buffer(np.ascontiguousarray(values, dtype=str(kind)))
    return pa.Array.from_buffers(kind, len(values), [None, buffer])


def binary(values: Sequence[bytes]) -> pa.BinaryArray:
    offsets = np.zeros(len(values) + 1, dtype=np.int32)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(values))]
    return pa.Array.from_buffers(pa.binary(), len(values), buffers)


def strings(values: Iterable[str]) -> pa.StringArray:
    """Without surrogates."""
    return binary([sound_text(value)[0].encode() for value in values]).view(pa.string())


def kind(name: str) -> str:
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes = suffixes[:-1]
    kind = _ALSO.get(suffixes[-1], suffixes[-1]) if suffixes else ""
    if kind not in _SUFFIXES:
        raise ValueError(
            f"{name}: cannot tell what it holds; known are {', '.join(_SUFFIXES)}, "
            f"each also with {', '.join(_COMPRESSED)}"
        )
    return kind


def is_compressed(name: str) -> bool:
    return Path(name).suffix.lower() in _COMPRESSED


def _column_bytes(group: pq.RowGroupMetaData, name: str) -> int:
    columns = (group.column(number) for number in range(group.num_columns))
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema == name)


class Source(Config):
    """A file that is read."""

    name: str
    """Within its corpus. Documents without an id are named after it."""

    size: NonNegativeInt
    """Bytes, as they are stored."""

    path: Path | None
    """None on the hub."""

    dataset: str = ""
    revision: str = ""
    """Commit of the dataset on the hub."""

    text_column: str
    bad_lines_limit: NonNegativeInt

    @property
    def place(self) -> str:
        """The file as a person finds it."""
        return f"{self.dataset}, {self.name}" if self.path is None else str(self.path)

    def open(self) -> IO[bytes]:
        """The stored bytes."""
        if self.path is not None:
            return self.path.open("rb")
        remote = HubFile(name=self.name, size=self.size)
        return cast(IO[bytes], hub.open_file(self.dataset, remote, revision=self.revision))


def read(source: Source, start: int, stop: int | None, tally: Tally) -> Iterator[Batch]:
    """The documents of a file, or of a part of it; empty ones are left out.

    Args:
        start: first row group of a .parquet file, first byte of a .jsonl file.
        stop: one after the last; None for the end.

    Raises:
        ValueError: it does not hold what its name promises, or too many lines are bad.
        hub.HubError: the hub failed in mid-stream.
        OSError, EOFError, ...: `UNREADABLE`.
    """
    match kind(source.name):
        case ".txt":
            return _read_text(source, tally)
        case ".jsonl":
            return _read_jsonl(source, start, stop, tally)
        case _:
            return _read_parquet(source, start, stop, tally)


def _decompressed(source: Source) -> IO[bytes]:
    stored = source.open()
    suffix = Path(source.name).suffix.lower()
    if suffix == ".xz":
        return io.BufferedReader(_XzStreams(stored), _READ_BYTES)
    if suffix in _COMPRESSED:
        codec = {".gz": "gzip", ".zst": "zstd"}.get(suffix, suffix[1:])
        stream = pa.CompressedInputStream(pa.PythonFile(stored, mode="r"), codec)
        return cast(IO[bytes], io.BufferedReader(stream, _READ_BYTES))
    return stored


class _XzStreams(io.RawIOBase):
    """What `lzma.open` reads, which ends in silence where a stream behind the first is damaged.

    Source: https://tukaani.org/xz/xz-file-format.txt, section 2: streams and zeros between them.
    """

    def __init__(self, stored: IO[bytes]) -> None:
        self._stored, self._decoder, self._input = stored, lzma.LZMADecompressor(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data:
            if self._decoder.eof and not self._next_stream():
                return 0
            if self._decoder.needs_input and not self._input:
                self._input = self._stored.read(_READ_BYTES)
                if not self._input:
                    raise EOFError("it ends in the middle of a compressed stream")
            data = self._decoder.decompress(self._input, len(buffer))
            self._input = b""
        buffer[: len(data)] = data
        return len(data)

    def _next_stream(self) -> bool:
        self._input = self._decoder.unused_data.lstrip(b"\0")
        while not self._input:
            if not (stored := self._stored.read(_READ_BYTES)):
                return False
            self._input = stored.lstrip(b"\0")
        self._decoder = lzma.LZMADecompressor()
        return True

    def close(self) -> None:
        self._stored.close()
        super().close()


def _read_text(source: Source, tally: Tally) -> Iterator[Batch]:
    with _decompressed(source) as stream:
        document = Document(source.name, stream.read().decode("utf-8-sig"))
    if document.text:
        yield _columns([document])
    else:
        tally.empty += 1


def _read_jsonl(source: Source, start: int, stop: int | None, tally: Tally) -> Iterator[Batch]:
    some: list[Document] = []
    characters = 0
    for document in _lines(source, start, stop, tally):
        if not document.text:
            tally.empty += 1
            continue
        some.append(document)
        characters += len(document.text)
        if len(some) >= _READ_ROWS or characters >= _READ_BYTES:
            yield _columns(some)
            some, characters = [], 0
    if some:
        yield _columns(some)


def _columns(some: list[Document]) -> Batch:
    ids = binary([document.id.encode("utf-8", "surrogatepass") for document in some])
    sound = [sound_text(document.text) for document in some]
    return Batch(
        ids,
        strings(document.url for document in some),
        [text for text, _ in sound],
        np.array([size for _, size in sound], dtype=np.int64),
    )


def _lines(source: Source, start: int, stop: int | None, tally: Tally) -> Iterator[Document]:
    """Lines that begin within the part; a document without an id is named by its first byte."""
    with _decompressed(source) as stream:
        position, number = start, 0
        if position:
            stream.seek(position - 1)
            position += len(stream.readline()) - 1  # the rest of a line that the part before owns
        while stop is None or position < stop:
            if not (line := stream.readline()):
                return
            begin, number, position = position, number + 1, position + len(line)
            if not (content := line.removeprefix(codecs.BOM_UTF8).strip()):
                continue
            try:
                yield _from_line(source, content, begin)
            except (ValueError, RecursionError) as error:
                where = f"line {number}" if not start else f"the line at byte {begin}"
                _count_bad(source, tally, f"{source.place}, {where} {error}")


def _from_line(source: Source, line: bytes, position: int) -> Document:
    column = source.text_column
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from error
    if isinstance(fields, dict) and fields.get(column, "") is None:
        return Document(source.name, "")  # as in Parquet files, null is an empty document
    if not isinstance(fields, dict) or not isinstance(fields.get(column), str):
        found = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
        raise ValueError(f"has no text in field {column!r}, only {found}: set --text-column")
    document_id, url = fields.get("id"), fields.get("url")
    return Document(
        str(document_id) if _names(document_id) else f"{source.name}@{position}",
        fields[column],
        url if isinstance(url, str) else "",
    )


def _names(document_id: object) -> bool:
    return isinstance(document_id, str | int) and document_id != ""


def _count_bad(source: Source, tally: Tally, place: str) -> None:
    tally.bad += 1
    if len(tally.places) < _PLACES:
        tally.places.append(place)
    if tally.bad > source.bad_lines_limit:
        allowed = f" ({tally.bad} bad lines, --bad-lines-limit {source.bad_lines_limit})"
        raise ValueError(place + (allowed if source.bad_lines_limit else ""))


@lru_cache(maxsize=4)
def _footer(source: Source) -> pq.FileMetaData:
    """Of a file on the hub, which has about a megabyte of it and is opened for every slice."""
    return pq.read_metadata(pa.PythonFile(source.open(), mode="r"))


def _parquet(source: Source) -> pq.ParquetFile:
    file: Any
    footer, remote = None, source.path is None
    if is_compressed(source.name):
        # Parquet is read from its end, which a compressed stream cannot reach
        with _decompressed(source) as stream:
            file = pa.BufferReader(stream.read())
    elif remote:
        file, footer = pa.PythonFile(source.open(), mode="r"), _footer(source)
    else:
        file = str(source.path)
    return pq.ParquetFile(
        file,
        metadata=footer,
        memory_map=False,  # a file that is cut meanwhile would end the process
        pre_buffer=remote,
        page_checksum_verification=True,
    )


def row_group_bytes(source: Source) -> list[int]:
    """Text in each row group of a .parquet file."""
    with _parquet(source) as opened:
        footer, column = opened.metadata, _present(source, opened)
        groups = map(footer.row_group, range(footer.num_row_groups))
        return [_column_bytes(group, column) for group in groups]


def _present(source: Source, opened: pq.ParquetFile) -> str:
    """The text column, which has to be there."""
    present = opened.schema_arrow.names
    if present.count(source.text_column) != 1:
        raise ValueError(
            f"{source.place} has no one column {source.text_column!r}, but {present}: "
            "set --text-column"
        )
    kind = opened.schema_arrow.field(source.text_column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if kind not in _STRINGS:
        raise ValueError(
            f"{source.place} has {kind} in column {source.text_column!r}, no text: "
            "set --text-column"
        )
    return source.text_column


def _also_present(source: Source, opened: pq.ParquetFile) -> list[str]:
    """Those of the columns for ids and URLs that are there, beside the text's."""
    present = opened.schema_arrow.names
    for name in ("id", "url"):
        if present.count(name) > 1:
            raise ValueError(
                f"{source.place} has {present.count(name)} columns {name!r}: leave one"
            )
    return [c for c in ("id", "url") if c in present and c != source.text_column]


def _read_parquet(source: Source, start: int, stop: int | None, tally: Tally) -> Iterator[Batch]:
    with _parquet(source) as opened:
        column = _present(source, opened)
        columns = [column, *_also_present(source, opened)]
        footer = opened.metadata
        groups = range(start, footer.num_row_groups if stop is None else stop)
        number = sum(footer.row_group(group).num_rows for group in range(start))
        rows = sum(footer.row_group(group).num_rows for group in groups)
        size = sum(_column_bytes(footer.row_group(group), column) for group in groups)
        # long documents are read a few at a time: eight batches are on their way at once
        at_once = max(1, min(_READ_ROWS, _READ_BYTES * rows // max(1, size)))
        some = opened.iter_batches(
            at_once,
            row_groups=groups,
            columns=columns,
            use_threads=False,  # parts have their own
        )
        for batch in some:
            texts, ids, urls = (
                _as_strings(batch.column(name)) if name in columns else strings([""] * len(batch))
                for name in (column, "id", "url")
            )
            if not byte_lengths(ids).all():
                named = enumerate(ids.to_pylist(), start=number + 1)
                ids = strings(name or f"{source.name}:{place}" for place, name in named)
            number += len(batch)
            text_bytes = byte_lengths(texts)
            if not text_bytes.all():
                full = numbers(np.flatnonzero(text_bytes), pa.int64())
                texts, ids, urls = (values.take(full) for values in (texts, ids, urls))
                tally.empty += len(batch) - len(texts)
                text_bytes = text_bytes[text_bytes > 0]
            for values in (ids, urls):
                values.validate(full=True)  # that it is UTF-8, which Parquet files only claim
            yield Batch(ids.view(pa.binary()), urls, texts.to_pylist(), text_bytes)


def byte_lengths(values: pa.StringArray) -> npt.NDArray[np.int64]:
    """Of strings none of which is null."""
    if not len(values):
        return np.empty(0, dtype=np.int64)
    offsets = np.frombuffer(values.buffers()[1], np.int32, len(values) + 1, 4 * values.offset)
    return np.diff(offsets).astype(np.int64)


def _as_strings(values: pa.Array) -> pa.StringArray:
    """Null is empty; a number is as Python writes it."""
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if kind in _STRINGS:
        texts = values if values.type == pa.string() else values.cast(pa.string())
        return texts.fill_null("") if texts.null_count else texts
    return strings("" if value is None else str(value) for value in values.to_pylist())
