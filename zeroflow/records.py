"""Typed JSON: whole files, and files to which one process appends lines while others read them.

Data that a run writes and reads back is a `Record`. One class writes and reads it, with a format
version: a file of a newer format is rejected with an error message instead of being misread.
"""

import errno
import json
import os
from collections.abc import Callable, Iterator
from io import RawIOBase
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from zeroflow import artifacts
from zeroflow.artifacts import JsonObject
from zeroflow.config import Config, in_words


class Record(Config):
    """Content of a JSON file, or of a line in a file of JSON lines.

    A field that is added later has a default, so that older files stay readable; older versions
    ignore it. A change that they would misread increments `FORMAT`; the class then converts
    older content in a "before" validator. Files without a format have the first one.
    """

    model_config = ConfigDict(extra="ignore")

    FORMAT: ClassVar[int] = 1

    PRIVATE: ClassVar[bool] = False
    """True if only this user can read a new file, because it contains settings, and a setting of
    free text may contain a secret."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_newer_format(cls, content: Any) -> Any:
        found = content.get("format") if isinstance(content, dict) else None
        if isinstance(found, int) and found > cls.FORMAT:
            raise PydanticCustomError(
                "newer_format",
                "its format is {found}, and this version of zeroflow reads formats up to {known}: "
                "use the version that wrote it, or move the file away",
                {"found": found, "known": cls.FORMAT},
            )
        return content

    def as_json(self) -> JsonObject:
        """Return the content as it is written to the file; NaN and infinity are kept."""
        return {"format": self.FORMAT} | self.model_dump(mode="json")

    def write(self, path: Path) -> None:
        """Write the file atomically: a reader finds either the old or the new content."""
        artifacts.write_json(path, self.as_json(), private=self.PRIVATE)

    @classmethod
    def read(cls, path: Path) -> Self:
        """
        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not valid JSON, has a newer format, or is not this kind of record.
        """
        content = artifacts.read_json(path)
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise ValueError(f"{path} cannot be read: {_reason(error)}") from error

    @classmethod
    def read_if_exists(cls, path: Path) -> Self | None:
        """Return what `read` does, or None if there is no such file."""
        return cls.read(path) if path.exists() else None


def omitted() -> Any:
    """Return the default of a field that is left out of the file if it is None."""
    return Field(None, exclude_if=lambda value: value is None)


R = TypeVar("R", bound=Record)


class JsonLines(Generic[R]):
    """A kind of file with a record of type `R` on each line."""

    def __init__(self, kind: Any) -> None:
        """
        Args:
            kind: `R`, a record class or a union of record classes.
        """
        self._adapter: TypeAdapter[R] = TypeAdapter(kind)

    def append(self, path: Path, record: R) -> None:
        """Add `record` completely or not at all, replacing a half-written last line.

        Raises:
            OSError: the disk is full.
        """
        content = (json.dumps(record.as_json(), ensure_ascii=False) + "\n").encode()
        with path.open("a+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            end = _end_of_lines(file, size)
            if end != size:
                file.truncate(end)
            try:
                written = file.write(content)
            except OSError as error:
                raise OSError(error.errno, f"cannot add to {path}: {error.strerror}") from error
            if written != len(content):
                file.truncate(end)
                raise OSError(errno.ENOSPC, f"cannot add to {path}: the disk is full")

    def read(self, path: Path) -> list[R]:
        """Return the records of all complete lines; a killed process may leave half a line.

        Raises:
            ValueError: a line is not valid JSON, has a newer format, or is not this kind of record.
        """
        return self.follow(path).new_records()

    def readable(self, path: Path, *, most_bytes: int | None = None) -> list[R]:
        """Return the records of all lines that can be read.

        Args:
            most_bytes: read only so many bytes at the end of the file, and no half line there.
        """
        records = []
        for line in _complete_lines(path, most_bytes):
            try:
                records.append(self._adapter.validate_json(line))
            except ValidationError:
                continue
        return records

    def keep(self, path: Path, wanted: Callable[[R], bool]) -> None:
        """Drop lines whose records are not `wanted`, and a half-written line, atomically."""
        if not path.exists():
            return
        partial = path.with_name(f".{path.name}.partial")
        with partial.open("wb") as file:
            for line in _complete_lines(path):
                if wanted(self.parse(line, path)):
                    file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    def follow(self, path: Path, *, from_end: bool = False) -> "Tail[R]":
        """Return a reader of the records that are added to `path`.

        Args:
            from_end: skip the records that already exist.
        """
        return Tail(self, path, _size(path) if from_end else 0)

    def parse(self, line: bytes, path: Path) -> R:
        """
        Args:
            path: file of the line, for the error message.

        Raises:
            ValueError: it is not valid JSON, has a newer format, or is not this kind of record.
        """
        try:
            return self._adapter.validate_json(line)
        except ValidationError as error:
            raise ValueError(
                f"{path} has a line that cannot be read: {_reason(error)}. The line begins with "
                f"{line[:60].decode(errors='replace')!r}"
            ) from error


class Tail(Generic[R]):
    """Follows a growing file from the line that starts at byte `position`.

    A file that is replaced, as by `keep`, is read from its beginning.
    """

    def __init__(self, kind: JsonLines[R], path: Path, position: int) -> None:
        self._kind, self._path, self._position = kind, path, position
        self._file = path.stat().st_ino if path.exists() else None
        self.from_start = False
        """True if the last call of `new_records` read the file from its beginning."""

    def new_records(self) -> list[R]:
        """Return the records of the lines that were completed since the last call."""
        self.from_start = False
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            found = os.fstat(file.fileno()).st_ino
            if self._file not in (None, found):
                self._position = 0
            self._file = found
            self.from_start = self._position == 0
            file.seek(self._position)
            complete, newline, _ = file.read().rpartition(b"\n")
        self._position += len(complete) + len(newline)
        return [self._kind.parse(line, self._path) for line in complete.split(b"\n") if line]


def _complete_lines(path: Path, most_bytes: int | None = None) -> Iterator[bytes]:
    if not path.exists():
        return iter(())
    with path.open("rb") as file:
        if most_bytes is not None and file.seek(0, os.SEEK_END) > most_bytes:
            file.seek(-most_bytes, os.SEEK_END)
            file.readline()  # its beginning may be cut off
        else:
            file.seek(0)
        content = file.read()
    return filter(None, content.rpartition(b"\n")[0].split(b"\n"))


def _end_of_lines(file: RawIOBase, size: int) -> int:
    """Return the length of the complete lines within the first `size` bytes of a growing `file`."""
    if size:
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            return (file.read(size) or b"").rfind(b"\n") + 1
    return size


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _reason(error: ValidationError) -> str:
    """Return all errors on one line."""
    problems = []
    for problem in error.errors(include_url=False, include_input=False):
        where = ".".join(map(str, problem["loc"]))
        message = in_words(problem)
        problems.append(f"{where}: {message}" if where else message)
    return "; ".join(problems)
