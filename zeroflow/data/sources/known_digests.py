"""Stored digests of local files, so that a start does not have to read all files again.

A file counts as unchanged if its path, size, inode and both times are the same. A program can set
the modification time of a file, but not the change time of the inode. So a file is also read again
if its modification time was set back after a change.
"""

import logging
import time
from collections.abc import Iterable, Mapping
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


class FileDigest(NamedTuple):
    """Digest of a file, and the state in which it was computed."""

    sha256: str
    stamp: Stamp


def digest_files(paths: Iterable[Path], store: Path | None) -> dict[Path, FileDigest]:
    """Return the digest of each file, which is read only if no digest of its state is stored.

    Args:
        store: file of the cache with digests, which is replaced; None to store nothing.
    """
    known = _stored(store) if store is not None and store.exists() else {}
    found = {}
    for path in paths:
        now = stamp(path)
        match known.get(str(path)):
            case [str(digest), *state] if state == list(now):
                found[path] = FileDigest(digest, now)
            case _:
                found[path] = FileDigest(artifacts.file_sha256(path), now)
    if store is not None and sum(each.stamp.size for each in found.values()) >= _WORTH_BYTES:
        _keep(store, found, known)
    return found


def _stored(store: Path) -> JsonObject:
    try:
        content = artifacts.read_signed(store)
        files = content["files"]
        if content["format"] == _FORMAT and isinstance(files, dict):
            return files
    except (DamagedArtifact, KeyError) as error:
        log.info("reading all files of the corpus: %s", error)
    return {}


def _keep(store: Path, found: Mapping[Path, FileDigest], known: JsonObject) -> None:
    """Replace the stored digests, if any has changed. Those of new files are left out."""
    limit = time.time_ns() - _SETTLED_SECONDS * 10**9
    kept: JsonObject = {
        str(path): [digest, *now]
        for path, (digest, now) in found.items()
        if max(now.modified, now.changed) < limit
    }
    if kept == known:
        return
    try:
        artifacts.write_signed(store, {"format": _FORMAT, "files": kept})
    except OSError as error:  # the next start reads the files again
        log.warning("cannot store the digests of the corpus: %s", artifacts.explained(error))
