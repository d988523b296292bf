"""The interface of a source of text files."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import IO, ClassVar

from zeroflow.data.formats import registry
from zeroflow.data.formats.file import CorpusFile, Storage
from zeroflow.data.formats.format import Format


class Source(Storage, ABC):
    """A place that provides files of documents, without the settings for reading them.

    Subclasses are frozen dataclasses whose fields identify the place.
    """

    is_local: ClassVar[bool] = False
    """True if the files are on this machine, so that inspecting them is cheap."""

    has_columns: ClassVar[bool] = True
    """False if all files are plain text and have no columns to choose from."""

    skips_undecodable: ClassVar[bool] = False
    """True if a file that is not UTF-8 is left out instead of ending the run."""

    @abstractmethod
    def pin(self, revision: str | None, known: Path | None = None) -> str:
        """The revision, which identifies the content of all files.

        Args:
            revision: the requested revision; None for the current one.
            known: folder for digests of files, so that unchanged files are not read again; None to
                read all.

        Raises:
            hub.HubError: the hub refused or could not be reached.
            ValueError: there are no files, or they differ from `revision`.
        """

    @abstractmethod
    def files(self, revision: str) -> list[CorpusFile]:
        """The files in reading order.

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
        """The format of a file, chosen by its name; a subclass may define its own.

        Raises:
            ValueError: the suffix is unknown.
        """
        return registry.format_of(name)

    def identity(self) -> dict[str, str | None]:
        """Settings, other than the revision, that the documents depend on."""
        return {}

    def digests(self) -> dict[str, str]:
        """The digest of each file by name, if the revision is computed from them."""
        return {}

    def look_again(self) -> None:
        """Forget what an earlier run of this process found, as files may have changed since."""

    def require_revision(self, revision: str) -> None:
        """Check that the content of all files is that of `revision`, unless `pin` did so before.

        Raises:
            ValueError: there are no files, or they differ.
        """

    @abstractmethod
    def require_unchanged(self, file: CorpusFile) -> None:
        """Check that a file still has the content of the revision.

        Raises:
            ValueError: the file has changed.
        """
