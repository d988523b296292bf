"""Directories that are either complete or absent, and fingerprints for their names."""

import errno
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import socket
import stat
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, BinaryIO, NamedTuple

from pydantic import JsonValue, TypeAdapter

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
"""File that completes a directory: it lists the other files with their sizes and sha256."""

WRITE_BYTES = 2**17
"""Bytes per write. For larger writes, Linux allocates larger pages. If a virtual machine has
returned their memory to its host, getting it back takes ten times as long."""

_READ_BYTES = 2**20
"""Bytes per read."""

_READERS = 8
"""Number of threads that read and hash the files of a large directory."""

_LARGE_BYTES = 2**25
"""Size of a directory from which several threads are faster than one."""

DAMAGED = ".damaged-"
"""Part of the name of a directory that was set aside."""

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Errors of a full disk, an exhausted quota and a file at its size limit."""

_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
"""Errors of a file system that does not support locks."""

_OPEN_FILES = "raise the limit of open files, as with `ulimit -n 65536`"
_PERMISSIONS = "change its permissions, or name another --cache-dir if it is in the cache"

_REMEDIES = {
    errno.EMFILE: _OPEN_FILES,
    errno.ENFILE: _OPEN_FILES,
    errno.EACCES: _PERMISSIONS,
    errno.EPERM: _PERMISSIONS,
    errno.EROFS: "name another --cache-dir",
}

JsonObject = dict[str, JsonValue]


@dataclass(frozen=True)
class FileRecord:
    """Entry of a file in a manifest."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class ChunkedRecord:
    """Entry of a large file in a manifest, whose chunks are hashed separately, by any thread."""

    bytes: int
    chunk_bytes: int
    """Bytes of every chunk except the last."""

    sha256_of_chunks: tuple[str, ...]


_FILES = TypeAdapter(dict[str, FileRecord | ChunkedRecord])


class DamagedArtifact(ValueError):
    """A directory whose files differ from its manifest."""


def explained(error: OSError) -> str:
    """Return a message with the failure and the file, and for common causes what to change."""
    if not error.strerror or not error.errno:
        return str(error) or type(error).__name__
    message = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if error.errno in _REMEDIES and os.strerror(error.errno) in message:
        return f"{message}: {_REMEDIES[error.errno]}"
    return message  # our own messages already say what to change


def require_possible_folder(folder: Path, flag: str) -> None:
    """Check that `folder`, which need not exist, is not a file or below one.

    Args:
        flag: the setting that names the folder, for the message.

    Raises:
        ValueError: the path has a file where a folder is needed.
    """
    path = folder.absolute()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    if not there.is_dir():
        raise ValueError(f"{flag} {folder}: {there} is a file, not a folder: name another folder")


def fingerprint(identity: Any) -> str:
    """Return 12 hex digits that identify a JSON value, independent of its key order."""
    return _sha256(identity)[:12]


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Any, *, private: bool = False) -> None:
    """Write `content` as `write_bytes` does."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    write_bytes(path, memoryview(f"{text}\n".encode()), private=private)


def write_bytes(path: Path, content: memoryview, *, private: bool = False) -> None:
    """Write `content`; a reader finds either the old or the new file, even after a power cut.

    Args:
        private: create a file that only this user can read. One that replaces another has its
            permissions, which the user may have changed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The name is random: a process id may also exist in another container that shares the folder
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        if private:
            partial.touch(mode=0o600)
            if path.exists():
                partial.chmod(stat.S_IMODE(path.stat().st_mode))
        write_recorded(partial, content)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def create_private(path: Path) -> BinaryIO:
    """Create an empty file that only this user can read, in place of an earlier one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "w+b")


def read_json(path: Path) -> Any:
    """
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not valid JSON, because it was truncated or changed.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}): restore it or move it away"
        ) from error


def write_signed(path: Path, content: JsonObject) -> None:
    """Write `content` as `write_json` does, and add its sha256 as the last entry."""
    write_json(path, content | {"sha256": _sha256(content)})


def read_signed(path: Path) -> JsonObject:
    """Read a file that `write_signed` wrote.

    Raises:
        DamagedArtifact: the file is missing, cannot be read, or was changed.
    """
    try:
        content: JsonObject = read_json(path)
        if content.pop("sha256", None) != _sha256(content):
            raise ValueError("its content was changed")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DamagedArtifact(f"{path.parent} has no readable {path.name}: {error}") from error
    return content


def record(path: Path) -> FileRecord:
    """Sync a finished file to the disk and return its manifest entry."""
    _fsync(path)
    return FileRecord(path.stat().st_size, file_sha256(path))


def write_recorded(path: Path, content: memoryview) -> FileRecord:
    """Write a file and return its entry in the manifest, without reading the file again."""
    with path.open("wb", buffering=0) as file:
        rest = content
        while rest:
            rest = rest[file.write(rest[:WRITE_BYTES]) :]
        os.fsync(file.fileno())
    return FileRecord(len(content), hashlib.sha256(content).hexdigest())


def seal(
    directory: Path,
    facts: JsonObject,
    recorded: Mapping[str, FileRecord | ChunkedRecord] = MappingProxyType({}),
) -> None:
    """Write the manifest of a finished directory: `facts`, and the size and sha256 of every file.

    The last entry of the manifest is a sha256 of the others.

    Args:
        recorded: entries that are already known, by file name in the directory.
    """
    files: JsonObject = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST):
        name = path.relative_to(directory).as_posix()
        files[name] = asdict(recorded.get(name) or record(path))
    write_signed(directory / MANIFEST, facts | {"files": files})
    _fsync(directory)


def verify(directory: Path) -> JsonObject:
    """Compare every file of `directory` with its manifest, and return the manifest.

    Raises:
        DamagedArtifact: a file, or the manifest itself, is missing, unexpected or changed.
    """
    manifest = read_signed(directory / MANIFEST)
    listed = _FILES.validate_python(manifest["files"])
    found = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}
    if unexpected := found - set(listed) - {MANIFEST}:
        raise DamagedArtifact(
            f"{directory} has files that its manifest does not list: {unexpected}"
        )
    for name, facts in listed.items():
        path = directory / name
        if name not in found:
            raise DamagedArtifact(f"{path} is missing")
        if (size := path.stat().st_size) != facts.bytes:
            raise DamagedArtifact(f"{path} has {size} bytes instead of {facts.bytes}")
    _compare(directory, listed)
    return manifest


class _Piece(NamedTuple):
    """A piece of a file that has its own sha256."""

    path: Path
    begin: int
    end: int
    sha256: str
    where: str

    def require_unchanged(self) -> None:
        """
        Raises:
            DamagedArtifact: the content has another sha256.
        """
        digest, rest = hashlib.sha256(), self.end - self.begin
        buffer = memoryview(bytearray(min(rest, _READ_BYTES)))
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.begin)
            while rest and (count := file.readinto(buffer[:rest])):
                digest.update(buffer[:count])
                rest -= count
        if digest.hexdigest() != self.sha256:
            raise DamagedArtifact(f"{self.path} was changed: its sha256 differs{self.where}")


def _pieces(path: Path, facts: FileRecord | ChunkedRecord) -> Iterator[_Piece]:
    if isinstance(facts, FileRecord):
        yield _Piece(path, 0, facts.bytes, facts.sha256, where="")
        return
    begins = range(0, facts.bytes, facts.chunk_bytes)
    if len(begins) != len(facts.sha256_of_chunks):
        raise DamagedArtifact(f"{path.parent / MANIFEST} does not list every chunk of {path}")
    for begin, sha256 in zip(begins, facts.sha256_of_chunks, strict=True):
        end = min(begin + facts.chunk_bytes, facts.bytes)
        yield _Piece(path, begin, end, sha256, f" in bytes {begin} to {end - 1}")


def _compare(directory: Path, listed: Mapping[str, FileRecord | ChunkedRecord]) -> None:
    """Compare the contents of files with their sha256; large ones with several threads."""
    pieces = [piece for name, facts in listed.items() for piece in _pieces(directory / name, facts)]
    if sum(facts.bytes for facts in listed.values()) < _LARGE_BYTES or len(pieces) == 1:
        for piece in pieces:
            piece.require_unchanged()
        return
    with ThreadPoolExecutor(_READERS) as pool:
        try:
            list(pool.map(_Piece.require_unchanged, pieces))
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def new_directory(path: Path, *, mark: str = "") -> Iterator[Path]:
    """Yield a temporary directory that becomes `path` when the block ends without an error.

    The block must `seal` it. Leftovers of an earlier, killed attempt are removed.

    Args:
        mark: a part of the temporary name that is unique to this process; empty if no other process
            writes this directory.
    """
    partial = partial_path(path, mark)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        assert (partial / MANIFEST).exists(), f"{partial} was not sealed"
        partial.replace(path)
        _fsync(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def partial_path(path: Path, mark: str = "") -> Path:
    """Return the temporary name of the directory `path` during `new_directory`."""
    return path.with_name(f".{path.name}.{mark}.partial" if mark else f".{path.name}.partial")


def set_aside(path: Path, reason: object) -> Path:
    """Rename a damaged directory, so that it is kept but never used."""
    number = 1
    while (aside := path.with_name(f"{path.name}{DAMAGED}{number}")).exists():
        number += 1
    log.warning("%s: kept as %s, but not used", reason, aside)
    path.replace(aside)
    return aside


def build_once(path: Path, build: Callable[[Path], None]) -> bool:
    """Ensure that the directory `path` exists and verifies.

    Two processes that need the same directory wait for each other; the kernel frees the lock of a
    process that dies. On a file system that does not share locks between machines, several machines
    may build it at the same time, and the first complete directory is kept. A damaged directory is
    set aside and built again.

    Args:
        build: called with a temporary directory if `path` has to be built.

    Returns:
        True if an existing directory was reused.
    """
    with exclusive(path, waiting_for=f"another process is building {path}"):
        if path.exists():
            try:
                verify(path)
                return True
            except DamagedArtifact as damage:
                set_aside(path, damage)
        return build_first(path, build, mark=socket.gethostname())


def build_first(path: Path, build: Callable[[Path], None], *, mark: str = "") -> bool:
    """Ensure that the directory `path` exists, without a lock.

    Several processes may build it at the same time. The first complete one is kept, so all have to
    build the same content.

    Args:
        build: called with the temporary directory of this call.
        mark: a part of the temporary name that is unique to this process, or to the processes that
            share a lock.

    Returns:
        True if the directory exists already, or another process was faster.
    """
    if path.exists():
        return True
    try:
        with new_directory(path, mark=mark) as partial:
            build(partial)
    except OSError:  # the directory exists, or a process that took over removed the temporary one
        if path.exists():
            return True
        raise
    return False


@contextmanager
def exclusive(path: Path, *, waiting_for: str | None) -> Iterator[None]:
    """Hold the lock of `path` until the block ends.

    It is a lock of the kernel only. Locks that are files with a process id fail between containers,
    where another process may have the same id.

    Args:
        waiting_for: logged if the lock is not free; None does not wait.

    Raises:
        BlockingIOError: another process holds the lock, and this one does not wait.
        OSError: the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("ab") as file:
        try:
            _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting_for is None:
                raise
            log.info("waiting: %s", waiting_for)
            _lock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            _lock(file, fcntl.LOCK_UN)


def _lock(file: IO[bytes], operation: int) -> None:
    try:
        fcntl.flock(file, operation)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise OSError(
            error.errno,
            f"the file system of {file.name} has no locks ({os.strerror(error.errno)}), which "
            "keep two processes from writing the same files: name a --cache-dir on another one",
        ) from error


def _sha256(content: Any) -> str:
    """sha256 of `content` as JSON with sorted keys."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
