"""JSON lines: each line is an object with a document's text and optionally its id and URL."""

import codecs
import json
from collections.abc import Iterator
from typing import IO

from zeroflow.artifacts import JsonObject
from zeroflow.data import documents
from zeroflow.data.documents import Document, Tally, TextBatch
from zeroflow.data.formats.file import DocumentFile
from zeroflow.data.formats.format import Format, Sample, count_bad_line
from zeroflow.data.formats.utf8 import NotUtf8, decode

_LONGEST_LINE = 2**24
"""Maximum bytes of a line in a sample of a file."""


class JsonLinesFormat(Format):
    """Parts are ranges of bytes; a line belongs to the part in which it begins."""

    description = ".jsonl"

    def read(
        self, file: DocumentFile, start: int, stop: int | None, tally: Tally
    ) -> Iterator[TextBatch]:
        batch: list[Document] = []
        characters = 0
        for document in _documents(file, start, stop, tally):
            if not document.text:
                tally.empty += 1
                continue
            batch.append(document)
            characters += len(document.text)
            if len(batch) >= documents.BATCH_DOCUMENTS or characters >= documents.BATCH_BYTES:
                yield TextBatch.from_documents(batch)
                batch, characters = [], 0
        if batch:
            yield TextBatch.from_documents(batch)

    def sample(self, file: DocumentFile, offset: int, most_bytes: int) -> Sample:
        if file.is_compressed:
            return super().sample(file, offset, most_bytes)
        # Whole lines, because a line may be longer than `most_bytes`
        with file.open() as stream:
            begin = _next_line(stream, offset, file.file.size)
            if begin == file.file.size:
                begin = 0
            stop = _next_line(stream, begin + most_bytes, file.file.size)
        if stop - begin > most_bytes + _LONGEST_LINE:
            return Sample([], 0, begin, 0)
        return super().sample(file, begin, stop - begin)

    def cuts(self, file: DocumentFile, part_bytes: int) -> list[int]:
        return [*range(0, file.file.size, part_bytes), file.file.size]


def _next_line(stream: IO[bytes], position: int, size: int) -> int:
    """Return the first byte of a line at `position` or later; `size` if there is none nearby."""
    if position:
        stream.seek(position - 1)
        if not stream.readline(_LONGEST_LINE).endswith(b"\n"):
            return size
        position = stream.tell()
    return position


def _documents(
    file: DocumentFile, start: int, stop: int | None, tally: Tally
) -> Iterator[Document]:
    with file.open_decompressed() as stream:
        position, number, seen = start, 0, False
        if position:
            # Skip to the first line that begins in this part, because a line that spans the cut
            # belongs to the previous part. Start one byte earlier: if that byte is a newline, a
            # line begins exactly at the cut
            stream.seek(position - 1)
            position += len(stream.readline()) - 1
        while stop is None or position < stop:
            if not (line := stream.readline()):
                return
            begin, number, position = position, number + 1, position + len(line)
            if not (content := line.removeprefix(codecs.BOM_UTF8).strip()):
                continue
            if not seen and not start and content.startswith(b"["):
                raise ValueError(
                    f"{file.place} begins with a JSON array, but must have one line per document: "
                    "convert it to lines, as in jq -c '.[]' FILE.json > FILE.jsonl"
                )
            seen = True
            try:
                yield _document(file, line, begin)
            except (ValueError, RecursionError) as error:
                where = f"line {number}" if not start else f"the line at byte {begin}"
                count_bad_line(file, tally, f"{file.place}, {where} {error}")


def _document(file: DocumentFile, line: bytes, position: int) -> Document:
    """The document of a line; if it has no id, the position of the line's first byte is its id."""
    column = file.text_column
    try:
        # A surrogate on its own is allowed, as in an escape sequence of JSON
        fields = json.loads(decode(line, position=position, errors="surrogatepass"))
    except NotUtf8:
        raise
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from error
    if isinstance(fields, dict) and fields.get(column, "") is None:
        return Document(file.name, "")  # null is an empty document, as in Parquet files
    if not isinstance(fields, dict):
        kind = type(fields).__name__
        raise ValueError(f"is JSON of type {kind}, not an object with a field {column!r}")
    if not isinstance(fields.get(column), str):
        raise ValueError(_no_text(fields, column))
    document_id, url = fields.get("id"), fields.get("url")
    named = isinstance(document_id, str | int) and document_id != ""
    return Document(
        str(document_id) if named else f"{file.name}@{position}",
        fields[column],
        url if isinstance(url, str) else "",
    )


def _no_text(fields: JsonObject, column: str) -> str:
    texts = sorted(name for name, value in fields.items() if isinstance(value, str))
    kind = f", but a value of type {type(fields[column]).__name__}" if column in fields else ""
    if not texts:
        return f"has no text in field {column!r}{kind}, and no other field has text"
    return (
        f"has no text in field {column!r}{kind}; fields with text: {texts}: "
        "set --text-column to one of them"
    )
