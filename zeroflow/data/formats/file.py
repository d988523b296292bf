"""Files of documents: opening and decompressing them."""

import io
import lzma
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, cast

import pyarrow as pa
from pydantic import NonNegativeInt

from zeroflow.config import Config

# Raised by decompressors, the Parquet reader and UTF-8 decoding; none of these names the file
UNREADABLE = (OSError, EOFError, lzma.LZMAError, pa.ArrowException, UnicodeDecodeError)

COMPRESSED = (".gz", ".bz2", ".zst", ".lz4", ".xz")
"""Suffixes of compressed files."""

_CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}  # Arrow's names
_READ_BYTES = 2**20


class CorpusFile(Config):
    """An entry in the list of a corpus's files."""

    name: str
    """Path within the corpus, the same on every machine."""

    size: NonNegativeInt
    """Bytes as stored."""


class Storage(Protocol):
    """A place where files can be opened."""

    def open(self, file: CorpusFile, revision: str) -> IO[bytes]:
        """The stored bytes of a file."""
        ...

    def place(self, file: CorpusFile) -> str:
        """Location of the file for messages: its path or address."""
        ...

    def path(self, file: CorpusFile) -> Path | None:
        """The file's path; None if it is not on this machine."""
        ...


@dataclass(frozen=True)
class DocumentFile:
    """A file of documents with the settings for reading it."""

    storage: Storage
    file: CorpusFile
    revision: str
    text_column: str
    bad_lines_limit: int

    @property
    def name(self) -> str:
        """Name within the corpus; the ids of documents without one are made from it."""
        return self.file.name

    @property
    def place(self) -> str:
        """Location of the file for messages: its path or address."""
        return self.storage.place(self.file)

    @property
    def path(self) -> Path | None:
        """The file's path; None if it is not on this machine."""
        return self.storage.path(self.file)

    @property
    def is_compressed(self) -> bool:
        return is_compressed(self.name)

    def open(self) -> IO[bytes]:
        """The stored bytes."""
        return self.storage.open(self.file, self.revision)

    def open_decompressed(self) -> IO[bytes]:
        if self.is_compressed and not self.file.size:  # Arrow would read an empty text
            raise EOFError("it is empty: compressed, even an empty file has some bytes")
        stored = self.open()
        suffix = Path(self.name).suffix.lower()
        if suffix == ".xz":
            return io.BufferedReader(_XzStreams(stored), _READ_BYTES)
        if suffix in COMPRESSED:
            stream = pa.CompressedInputStream(pa.PythonFile(stored, mode="r"), _CODECS[suffix])
            return cast(IO[bytes], io.BufferedReader(stream, _READ_BYTES))
        return stored


def is_compressed(name: str) -> bool:
    return Path(name).suffix.lower() in COMPRESSED


class _XzStreams(io.RawIOBase):
    """A decompressed .xz file.

    `lzma.open` could read it too, but it ends silently if a stream after the first is damaged.

    Source: https://tukaani.org/xz/xz-file-format.txt, section 2: streams with padding between them.
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
