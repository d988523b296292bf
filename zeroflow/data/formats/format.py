"""The interface of a format."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, ClassVar, NamedTuple

from zeroflow.data.documents import Tally, TextBatch
from zeroflow.data.formats.file import CorpusFile, DocumentFile, Storage

COMPRESSED_BYTES = 2**23
"""Bytes of text to read from a compressed file. A decompressor reads ahead, so its position is
compared with that after the first megabyte."""


class Sample(NamedTuple):
    """Text at one place of a file."""

    texts: list[str]
    documents: int
    """Number of complete documents; 0 if the text is a part of one."""

    start: int
    """Position in the file at which it was read."""

    stored: float
    """Number of bytes of the file that contain the text; compressed bytes of a compressed file."""


class Opened:
    """A storage that records how far its stream has been read."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._stream: IO[bytes] | None = None

    def open(self, file: CorpusFile, revision: str) -> IO[bytes]:
        self._stream = self._storage.open(file, revision)
        return self._stream

    def place(self, file: CorpusFile) -> str:
        return self._storage.place(file)

    def path(self, file: CorpusFile) -> Path | None:
        return self._storage.path(file)

    def position(self, file: CorpusFile) -> int:
        """Return the position in the stream; its end if the reader has closed it."""
        if self._stream is None:
            return 0
        return file.size if self._stream.closed else self._stream.tell()


class Format(ABC):
    """Reader for one kind of file. It reads a whole file, or a part of it."""

    description: ClassVar[str]
    """Description of the kind of file, for help texts."""

    can_be_cut: ClassVar[bool] = True
    """True if a part of an uncompressed file can be read without the preceding ones."""

    is_dense: ClassVar[bool] = False
    """True if the format itself compresses its content."""

    @abstractmethod
    def read(
        self, file: DocumentFile, start: int, stop: int | None, tally: Tally
    ) -> Iterator[TextBatch]:
        """The documents of a file, or of a part of it; empty ones are left out and counted.

        Args:
            start: position of the part, one of `cuts`; 0 for the beginning of the file.
            stop: position of the next part; None for the end of the file.

        Raises:
            ValueError: the content does not match the file's suffix, or too many lines are bad.
            hub.HubError: the hub failed while the file was read.
            OSError, EOFError, ...: any of `file.UNREADABLE`.
        """

    def sample(self, file: DocumentFile, offset: int, most_bytes: int) -> Sample:
        """Return text at a place of a non-empty file.

        Args:
            offset: byte at which the text begins, approximately; 0 for a compressed file.
            most_bytes: bytes to read, approximately.
        """
        if not file.is_compressed:
            stop = min(file.file.size, offset + most_bytes)
            batches = self.read(file, offset, stop, Tally())
            found = [text for batch in batches for text in batch.texts]
            return Sample(found, len(found), offset, stop - offset)
        opened = Opened(file.storage)
        texts: list[str] = []
        size, before, begin = 0, 0, 0
        for batch in self.read(replace(file, storage=opened), 0, None, Tally()):
            if not before:
                before, begin = opened.position(file.file), len(batch.texts)
            texts += batch.texts
            size += int(batch.text_bytes.sum())
            position = opened.position(file.file)
            if size >= COMPRESSED_BYTES and position > before:
                return Sample(texts[begin:], len(texts) - begin, 0, position - before)
        return Sample(texts, len(texts), 0, file.file.size)

    def cuts(self, file: DocumentFile, part_bytes: int) -> list[int]:
        """Positions that cut a file into parts of about `part_bytes` of text: first, ..., end.

        The unit of a position depends on the format.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be cut")


def count_bad_line(file: DocumentFile, tally: Tally, place: str) -> None:
    """Count a line, or a row of a table, that cannot be read.

    Raises:
        ValueError: it exceeds `bad_lines_limit`.
    """
    tally.add_bad_line(place)
    if tally.bad_lines > file.bad_lines_limit:
        allowed = f" ({tally.bad_lines} bad lines, --bad-lines-limit {file.bad_lines_limit})"
        raise ValueError(place + (allowed if file.bad_lines_limit else ""))
