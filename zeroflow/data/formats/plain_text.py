"""Plain text: each file is a document."""

from collections.abc import Iterator
from dataclasses import replace
from typing import IO

from zeroflow.data.documents import Document, Tally, TextBatch
from zeroflow.data.formats.file import DocumentFile
from zeroflow.data.formats.format import COMPRESSED_BYTES, Format, Opened, Sample
from zeroflow.data.formats.utf8 import NotUtf8, decode


class TextFormat(Format):
    description = ".txt (one document per file)"
    can_be_cut = False

    def read(
        self, file: DocumentFile, start: int, stop: int | None, tally: Tally
    ) -> Iterator[TextBatch]:
        with file.open_decompressed() as stream:
            content = stream.read()
        try:
            document = Document(file.name, decode(content))
        except NotUtf8 as error:
            raise NotUtf8(f"{file.place} {error}") from error
        if document.text:
            yield TextBatch.from_documents([document])
        else:
            tally.empty += 1

    def sample(self, file: DocumentFile, offset: int, most_bytes: int) -> Sample:
        opened = Opened(file.storage)
        with replace(file, storage=opened).open_decompressed() as stream:
            if offset:
                stream.seek(offset)
            if file.is_compressed:
                return _sample_compressed(stream, opened, file)
            content = stream.read(most_bytes)
            is_whole = not offset and not stream.read(1)
        return Sample([_text(content)], int(is_whole), offset, len(content))


def _sample_compressed(stream: IO[bytes], opened: Opened, file: DocumentFile) -> Sample:
    first = stream.read(2**20)
    before = opened.position(file.file)
    content = stream.read(COMPRESSED_BYTES)
    position = opened.position(file.file)
    if stream.read(1) and position > before:
        return Sample([_text(content)], 0, 0, position - before)
    return Sample([_text(first + content)], 1, 0, file.file.size)


def _text(content: bytes) -> str:
    return content.decode("utf-8", errors="ignore")  # its ends may cut a character
