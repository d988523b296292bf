"""Digests of local files that an earlier command computed, so that no start reads them all again.

A file counts as the same if path, size, inode and both times are. The time of the last change of
the inode cannot be set, so content that was put back with its old time of modification is read.
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
"""Age from which a file's times are believed. A file that is written twice within a tick of the
clock has the same times, and clocks of machines differ."""


_WORTH_BYTES = 2**26
"""Size of a corpus from which its digests are kept. A smaller one is read in a moment."""


class Stamp(NamedTuple):
    """State of a file: another content has another stamp."""

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
            file: None to remember nothing.
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
                log.info("all files of the corpus are read: %s", error)

    def sha256(self, path: Path, now: Stamp) -> str:
        """The digest of the file at `path`, whose stamp is `now`."""
        match self._known.get(str(path)):
            case [str(digest), *found] if found == list(now):
                return digest
        return artifacts.file_sha256(path)

    def keep(self, files: Sequence[tuple[Path, Stamp, str]]) -> None:
        """Remember the digests of these files and no others, if they are worth it."""
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
            log.warning("cannot remember the corpus's digests: %s", artifacts.explained(error))
