"""The interface of a source of text files."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import IO, ClassVar

from zeroflow.data.formats import registry
from zeroflow.data.formats.file import CorpusFile, Storage
from zeroflow.data.formats.format import Format


class Source(Storage, ABC):
    """A place that files of documents come from, without the settings of how they are read.

    Subclasses are frozen dataclasses: their fields name the place.
    """

    is_local: ClassVar[bool] = False
    """True if the files are on this machine, where looking at them costs nothing."""

    has_columns: ClassVar[bool] = True
    """False if all files are plain text, so that no setting chooses a column of them."""

    skips_undecodable: ClassVar[bool] = False
    """True if a file that is not UTF-8 is left out instead of ending the run."""

    @abstractmethod
    def pin(self, revision: str | None) -> str:
        """The revision of what is there, which stands for the content of all files.

        Args:
            revision: the revision that is asked for; None for the current one.

        Raises:
            hub.HubError: the hub refused or is out of reach.
            ValueError: there are no files, or they are not those of `revision`.
        """

    @abstractmethod
    def files(self, revision: str) -> list[CorpusFile]:
        """The files, in the order in which they are read.

        Raises:
            hub.HubError: the hub refused or failed.
            ValueError: there is no such dataset or subset.
        """

    @abstractmethod
    def open(self, file: CorpusFile, revision: str) -> IO[bytes]: ...

    @abstractmethod
    def place(self, file: CorpusFile) -> str: ...

    def path(self, file: CorpusFile) -> Path | None:
        return None

    def format_of(self, name: str) -> Format:
        """The format of a file, by its name; a source may have a format of its own.

        Raises:
            ValueError: it is none of the known ones.
        """
        return registry.format_of(name)

    def identity(self) -> dict[str, str | None]:
        """Settings that the documents depend on, beside the revision."""
        return {}

    def digests(self) -> dict[str, str]:
        """A digest of each file by its name, where the revision is made of them."""
        return {}

    @abstractmethod
    def require_unchanged(self, file: CorpusFile) -> None:
        """Check that a file is still the one that the revision stands for.

        Raises:
            ValueError: it is not.
        """
