"""Stored digests of local files, so that a start does not have to read all files again.

A file counts as unchanged if its path, size, inode and both times are the same. A program can set
the modification time of a file, but not the change time of the inode. So a file is also read again
if its modification time was set back after a change.
"""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from zeroflow import artifacts
from zeroflow.artifacts import DamagedArtifact, JsonObject

log = logging.getLogger(__name__)

_FORMAT = 1
_SETTLED_SECONDS = 60
"""Minimum age of a file whose digest is stored. A file that is written twice within one tick of the
clock has the same times, and the clocks of machines differ."""


_WORTH_BYTES = 2**26
"""Minimum size of a corpus whose digests are stored. A smaller one is read in a moment."""


class Stamp(NamedTuple):
    """State of a file, which changes when its content changes."""

    size: int
    modified: int
    """Nanoseconds since 1970."""

    changed: int
    inode: int


def stamp(path: Path) -> Stamp:
    facts = path.stat()
    return Stamp(facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino)


class KnownDigests:
    """The sha256 of files by path, in a file of the cache."""

    def __init__(self, file: Path | None) -> None:
        """
        Args:
            file: None to store nothing.
        """
        self._file = file
        self._known: JsonObject = {}
        if file is not None and file.exists():
            try:
                content = artifacts.read_signed(file)
                files = content["files"]
                if content["format"] == _FORMAT and isinstance(files, dict):
                    self._known = files
            except (DamagedArtifact, KeyError) as error:
                log.info("reading all files of the corpus: %s", error)

    def sha256(self, path: Path, now: Stamp) -> str:
        """Return the digest of the file at `path`, whose stamp is `now`."""
        match self._known.get(str(path)):
            case [str(digest), *found] if found == list(now):
                return digest
        return artifacts.file_sha256(path)

    def keep(self, files: Sequence[tuple[Path, Stamp, str]]) -> None:
        """Replace the stored digests by those of `files`, if the corpus is large enough."""
        if self._file is None or sum(now.size for _, now, _ in files) < _WORTH_BYTES:
            return
        limit = time.time_ns() - _SETTLED_SECONDS * 10**9
        known: JsonObject = {
            str(path): [digest, *now]
            for path, now, digest in files
            if max(now.modified, now.changed) < limit
        }
        if known == self._known:
            return
        try:
            artifacts.write_signed(self._file, {"format": _FORMAT, "files": known})
        except OSError as error:  # the next start reads the files again
            log.warning("cannot store the digests of the corpus: %s", artifacts.explained(error))
