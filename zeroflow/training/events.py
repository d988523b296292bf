"""JSON lines that one process appends and another follows.

`metrics.jsonl` holds an object for every logged step and validation, each once. `events.jsonl` is
the history of the processes, never shortened: started, metrics, saved, stopped, failed, done.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
ALIVE = "alive"
"""An empty file, touched whenever something was finished."""

Line = dict[str, Any]


def append(path: Path, line: Line) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


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
        return [json.loads(line) for line in complete.splitlines() if line.strip()]


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
