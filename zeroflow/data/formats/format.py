"""The interface of a format."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from zeroflow.data.documents import Tally, TextBatch
from zeroflow.data.formats.file import DocumentFile


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

    def cuts(self, file: DocumentFile, part_bytes: int) -> list[int]:
        """Positions that cut a file into parts of about `part_bytes` of text: first, ..., end.

        The unit of a position depends on the format.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be cut")
