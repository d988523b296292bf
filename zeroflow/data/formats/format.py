"""The interface of a format."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from zeroflow.data.documents import Tally, TextBatch
from zeroflow.data.formats.file import DocumentFile


class Format(ABC):
    """How files of one kind are read, whole or a part at a time."""

    description: ClassVar[str]
    """The kind of file, as the help names it."""

    can_be_cut: ClassVar[bool] = True
    """True if a part of an uncompressed file can be read without what comes before it."""

    is_dense: ClassVar[bool] = False
    """True if files are compressed by the format itself."""

    @abstractmethod
    def read(
        self, file: DocumentFile, start: int, stop: int | None, tally: Tally
    ) -> Iterator[TextBatch]:
        """The documents of a file, or of a part of it; empty ones are left out and counted.

        Args:
            start: where the part begins, one of `cuts`; 0 for the beginning of the file.
            stop: where the next part begins; None for the end of the file.

        Raises:
            ValueError: the file does not hold what its name promises, or too many lines are bad.
            hub.HubError: the hub failed in mid-stream.
            OSError, EOFError, ...: `file.UNREADABLE`.
        """

    def cuts(self, file: DocumentFile, part_bytes: int) -> list[int]:
        """Where to cut a file into parts of about `part_bytes` of text: first, ..., end.

        Their unit is the format's own.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be cut")
