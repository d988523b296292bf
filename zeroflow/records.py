"""JSON lines that one process appends and another follows.

`metrics.jsonl` holds an object for every logged step and validation, each once. `events.jsonl` is
the history of the processes, never shortened: started, metrics, saved, stopped, failed, done.
"""

import errno
import json
import os
from collections.abc import Callable
from io import RawIOBase
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def append(path: Path, line: Line) -> None:
    """Add `line`, whole or not at all, in the place of a half-written last one.

    Raises:
        OSError: the disk is full.
    """
    content = (json.dumps(line, ensure_ascii=False) + "\n").encode()
    with path.open("a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        end = _end_of_lines(file, size)
        if end != size:
            file.truncate(end)
        try:
            written = file.write(content)
        except OSError as error:
            raise OSError(error.errno, f"{path} cannot be added to: {error.strerror}") from error
        if written != len(content):
            file.truncate(end)
            raise OSError(errno.ENOSPC, f"{path} cannot be added to: the disk is full")


def _end_of_lines(file: RawIOBase, size: int) -> int:
    """Bytes of the complete lines in the first `size` of `file`, which others may add to now."""
    if size:
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            return (file.read(size) or b"").rfind(b"\n") + 1
    return size


def read(path: Path) -> list[Line]:
    """All complete lines; a line that a killed process left half-written is no line."""
    return Tail(path).new_lines() if path.exists() else []


def keep(path: Path, wanted: Callable[[Line], bool]) -> None:
    """Drop, atomically, the lines that are not `wanted`, and a half-written last one."""
    if not path.exists():
        return
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        for line in filter(wanted, read(path)):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


class Tail:
    """Follows a growing file from the line that comes after `position` bytes."""

    def __init__(self, path: Path, position: int = 0) -> None:
        self._path, self._position = path, position

    def new_lines(self) -> list[Line]:
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._position)
            complete, newline, _ = file.read().rpartition(b"\n")
        self._position += len(complete) + len(newline)
        return [self._parsed(line) for line in complete.split(b"\n") if line.strip()]

    def _parsed(self, line: bytes) -> Line:
        try:
            found: Line = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{self._path} has a line that is no JSON ({error}): take it out; it begins with "
                f"{line[:60].decode(errors='replace')!r}"
            ) from error
        return found


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
