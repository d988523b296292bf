"""Writes large files as fast as the disk: in chunks, by several threads, past the page cache.

Each chunk is hashed by the thread that writes it, because a single sha256 of a file would limit it
to the speed of one core.
"""

import errno
import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from zeroflow.artifacts import ChunkedRecord

CHUNK_BYTES = 2**24
"""Bytes of a chunk: few enough to name damage precisely and to buffer one for each thread, and so
many that neither a system call nor the disk's latency matters."""

_THREADS = 8
"""Number of chunks that are hashed and written at the same time. Four are enough for a disk of
2.5 GB/s if the processor has instructions for sha256; without them a core hashes only 0.4 GB/s."""

_BLOCK_BYTES = 4096
"""Position, length and memory of a direct write have to be multiples of this."""

_DIRECT = getattr(os, "O_DIRECT", 0)
"""0 on systems without direct writes."""


class Content(Protocol):
    """Content of a file."""

    @property
    def size(self) -> int: ...

    def read(self, begin: int, end: int) -> memoryview:
        """Return the bytes from `begin` to `end`, in memory that begins at a page.

        Several threads call it. The memory may be reused by the next call of the same thread.
        """


def write(folder: Path, contents: Mapping[str, Content]) -> dict[str, ChunkedRecord]:
    """Write files into `folder`, all at the same time, sync them to the disk, and return their
    entries in the manifest.

    Args:
        contents: contents by file name.

    Raises:
        OSError: a file exists already or cannot be written.
    """
    files: dict[str, _File] = {}
    with ThreadPoolExecutor(_THREADS, "checkpoint") as pool:
        try:
            for name, content in contents.items():
                files[name] = _File(folder / name)
                files[name].write(content, pool)
            return {name: file.finish() for name, file in files.items()}
        finally:
            pool.shutdown(cancel_futures=True)
            for file in files.values():
                file.close()


class _File:
    """A file that is being written, once directly and, where that is impossible, buffered."""

    def __init__(self, path: Path) -> None:
        self._buffered = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._direct: int | None = None
        try:
            self._direct = os.open(path, os.O_WRONLY | _DIRECT) if _DIRECT else None
        except OSError as error:
            if error.errno != errno.EINVAL:  # the file system has no direct writes
                self.close()
                raise
        self._size, self._digests = 0, list[Future[str]]()

    def write(self, content: Content, pool: ThreadPoolExecutor) -> None:
        """Begin to write `content`."""
        self._size = content.size
        for begin in range(0, self._size, CHUNK_BYTES):
            end = min(begin + CHUNK_BYTES, self._size)
            self._digests.append(pool.submit(self._write_chunk, content, begin, end))

    def finish(self) -> ChunkedRecord:
        """Wait until the file is on the disk."""
        digests = tuple(digest.result() for digest in self._digests)
        os.fsync(self._buffered)
        return ChunkedRecord(self._size, CHUNK_BYTES, digests)

    def close(self) -> None:
        os.close(self._buffered)
        if self._direct is not None:
            os.close(self._direct)

    def _write_chunk(self, content: Content, begin: int, end: int) -> str:
        chunk = content.read(begin, end)
        digest = hashlib.sha256(chunk).hexdigest()
        whole_blocks = len(chunk) - len(chunk) % _BLOCK_BYTES
        done = self._write_directly(chunk[:whole_blocks], begin)
        while done < len(chunk):
            done += os.pwrite(self._buffered, chunk[done:], begin + done)
        return digest

    def _write_directly(self, chunk: memoryview, begin: int) -> int:
        """Return the number of bytes that were written; fewer than all if the disk refuses it."""
        done = 0
        if self._direct is None:
            return done
        try:
            while done < len(chunk):
                done += os.pwrite(self._direct, chunk[done:], begin + done)
        except OSError as error:
            if error.errno != errno.EINVAL:  # its blocks may be larger than ours
                raise
        return done
