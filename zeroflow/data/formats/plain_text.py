"""Plain text: each file is a document."""

from collections.abc import Iterator

from zeroflow.data.documents import Document, Tally, TextBatch
from zeroflow.data.formats.file import DocumentFile
from zeroflow.data.formats.format import Format


class TextFormat(Format):
    description = ".txt (one document per file)"
    can_be_cut = False

    def read(
        self, file: DocumentFile, start: int, stop: int | None, tally: Tally
    ) -> Iterator[TextBatch]:
        with file.open_decompressed() as stream:
            document = Document(file.name, stream.read().decode("utf-8-sig"))
        if document.text:
            yield TextBatch.from_documents([document])
        else:
            tally.empty += 1
