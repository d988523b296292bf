"""builds.jsonl of a shard set: how long each part took that was built on this machine."""

import time
from pathlib import Path

from pydantic import NonNegativeFloat, NonNegativeInt, ValidationError

from zeroflow import records
from zeroflow.config import Config
from zeroflow.data.part_job import BuiltPart

FILE = "builds.jsonl"


class BuildTime(Config):
    """A line of builds.jsonl."""

    part: NonNegativeInt
    time: float
    """Seconds since 1970."""

    seconds: NonNegativeFloat
    tokens: NonNegativeInt
    text_bytes: NonNegativeInt


def note_build(path: Path, number: int, built: BuiltPart) -> None:
    """Note that part `number` of the set at `path` was built, unless it existed already."""
    if not built.seconds:
        return
    both = built.facts.train + built.facts.validation
    line = BuildTime(
        part=number,
        time=time.time(),
        seconds=built.seconds,
        tokens=both.document_tokens,
        text_bytes=both.text_bytes,
    )
    records.append(path / FILE, line.model_dump())


def read_build_times(path: Path) -> list[BuildTime]:
    """The lines of the set at `path`; a line that a killed process left broken is skipped."""
    file = path / FILE
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    times = []
    for line in lines:
        try:
            times.append(BuildTime.model_validate_json(line))
        except ValidationError:
            continue
    return times
