"""Directories that are complete or absent, and the fingerprints that name them."""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from filelock import FileLock

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_WRITE_BYTES = 2**17
"""At once. For more, Linux takes larger pages, of memory that a virtual machine may have given back
to its host while it was free, and which then takes ten times as long."""

DAMAGED = ".damaged-"
"""In the name of a directory that was set aside."""


NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""On a disk, in a quota or in a file."""


@dataclass(frozen=True)
class FileRecord:
    """What a manifest says of a file."""

    bytes: int
    sha256: str


class DamagedArtifact(ValueError):
    """A directory whose files are not those its manifest lists."""


def fingerprint(identity: Any) -> str:
    """12 hex digits that name `identity`, anything JSON can hold, whatever its key order."""
    return _sha256(identity)[:12]


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write `content` so that a reader, or a power cut, meets the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_json(path: Path) -> Any:
    """
    Raises:
        ValueError: the file is not JSON; it was cut or changed.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is no JSON any more ({error}): restore it, or move it away"
        ) from error


def write_signed(path: Path, content: dict[str, Any]) -> None:
    """`write_json` with a sha256 of the content as its last entry."""
    write_json(path, content | {"sha256": _sha256(content)})


def read_signed(path: Path) -> dict[str, Any]:
    """What `write_signed` wrote.

    Raises:
        DamagedArtifact: it is not there, cannot be read, or is not what was written.
    """
    try:
        content: dict[str, Any] = read_json(path)
        if content.pop("sha256", None) != _sha256(content):
            raise ValueError("it is not what was written")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DamagedArtifact(f"{path.parent} has no readable {path.name}: {error}") from error
    return content


def record(path: Path) -> FileRecord:
    """The manifest's entry of a finished file, once the disk has it."""
    _fsync(path)
    return FileRecord(path.stat().st_size, file_sha256(path))


def write_recorded(path: Path, content: memoryview) -> FileRecord:
    """Write a file and return its entry in the manifest, without reading the file again."""
    with path.open("wb", buffering=0) as file:
        rest = content
        while rest:
            rest = rest[file.write(rest[:_WRITE_BYTES]) :]
        os.fsync(file.fileno())
    return FileRecord(len(content), hashlib.sha256(content).hexdigest())


def seal(
    directory: Path,
    facts: dict[str, Any],
    recorded: Mapping[str, FileRecord] = MappingProxyType({}),
) -> None:
    """Write the manifest of a finished directory: `facts`, and size and sha256 of every file.

    The manifest's last entry is a sha256 of the others.

    Args:
        recorded: entries of files that are known already, by their names in the directory.
    """
    files = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST):
        name = path.relative_to(directory).as_posix()
        files[name] = asdict(recorded.get(name) or record(path))
    write_signed(directory / MANIFEST, facts | {"files": files})
    _fsync(directory)


def verify(directory: Path) -> dict[str, Any]:
    """The manifest of `directory`, after every file was compared with it.

    Raises:
        DamagedArtifact: a file is missing, too many, of another size or of another content; the
            manifest is a file as well.
    """
    manifest = read_signed(directory / MANIFEST)
    listed = manifest["files"]
    found = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}
    if unexpected := found - set(listed) - {MANIFEST}:
        raise DamagedArtifact(f"{directory} holds files its manifest does not list: {unexpected}")
    for name, facts in listed.items():
        path = directory / name
        if name not in found:
            raise DamagedArtifact(f"{path} is missing")
        if (size := path.stat().st_size) != facts["bytes"]:
            raise DamagedArtifact(f"{path} has {size} bytes instead of {facts['bytes']}")
        if file_sha256(path) != facts["sha256"]:
            raise DamagedArtifact(f"{path} is not what was written: its sha256 differs")
    return manifest


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory that becomes `path` when the block ends without an error.

    The block has to `seal` it. What an earlier, killed attempt left behind is removed.
    """
    partial = path.with_name(f".{path.name}.partial")
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


def set_aside(path: Path, reason: object) -> Path:
    """Rename a damaged directory so that it is kept but never used."""
    number = 1
    while (aside := path.with_name(f"{path.name}{DAMAGED}{number}")).exists():
        number += 1
    log.warning("%s: kept as %s and not used", reason, aside)
    path.replace(aside)
    return aside


def build_once(path: Path, build: Callable[[Path], None]) -> bool:
    """Have the verified directory `path`, calling `build` with a temporary one where it is absent.

    Two processes that want the same directory wait for each other; the kernel frees the lock of
    one that dies. A damaged directory is set aside and built again.

    Returns:
        whether an existing directory was reused.
    """
    with exclusive(path, waiting_for=f"another process builds {path}"):
        if path.exists():
            try:
                verify(path)
                return True
            except DamagedArtifact as damage:
                set_aside(path, damage)
        with new_directory(path) as partial:
            build(partial)
        return False


@contextmanager
def exclusive(path: Path, *, waiting_for: str = "", timeout_seconds: float = -1) -> Iterator[None]:
    """Hold the lock that belongs to `path`, waiting for it aloud; -1 waits for ever, 0 not at all.

    Raises:
        TimeoutError: another process held it all the while.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except TimeoutError:
        if not timeout_seconds:
            raise
        log.info("waiting: %s", waiting_for)
        lock.acquire(timeout=timeout_seconds)
    try:
        yield
    finally:
        lock.release()


def _sha256(content: Any) -> str:
    """Of `content` as JSON, whatever its key order."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
