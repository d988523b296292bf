"""builds.jsonl of a shard set: build time of each part that was built on this machine."""

import time
from pathlib import Path

from pydantic import NonNegativeFloat, NonNegativeInt

from zeroflow.data.part_job import BuiltPart
from zeroflow.records import JsonLines, Record

FILE = "builds.jsonl"

_MOST_BYTES = 2**18
"""Number of bytes at the end of the file that are read: a few thousand lines."""


class BuildTime(Record):
    """A line of builds.jsonl."""

    part: NonNegativeInt
    time: float
    """Seconds since 1970."""

    seconds: NonNegativeFloat
    tokens: NonNegativeInt
    text_bytes: NonNegativeInt


BUILD_TIMES: JsonLines[BuildTime] = JsonLines(BuildTime)


def note_build(path: Path, number: int, built: BuiltPart) -> None:
    """Record that part `number` of the set at `path` was built, unless it existed already."""
    if not built.seconds:
        return
    both = built.facts.train + built.facts.validation
    build_time = BuildTime(
        part=number,
        time=time.time(),
        seconds=built.seconds,
        tokens=both.document_tokens,
        text_bytes=both.text_bytes,
    )
    BUILD_TIMES.append(path / FILE, build_time)


def last_build_times(path: Path) -> list[BuildTime]:
    """Return the last lines of the set at `path`; a line that a killed process left is skipped."""
    return BUILD_TIMES.readable(path / FILE, most_bytes=_MOST_BYTES)
