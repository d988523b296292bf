"""Slices of a corpus: pieces of about equal size that are read, and rebuilt, one by one."""

from typing import NamedTuple

from pydantic import NonNegativeInt

from zeroflow.config import Config

SLICE_BYTES = 2**25
"""Text in a slice, about: what a killed build loses at most."""


class SourceFile(Config):
    """A file of a corpus."""

    name: str
    """Within the corpus, the same on every machine."""

    size: NonNegativeInt
    """Bytes, as they are stored."""


class Slice(Config):
    """A piece of a corpus that is read alone."""

    files: tuple[SourceFile, ...] = ()
    """Whole files; a part of the only one where `stop` is set. None for synthetic data."""

    start: NonNegativeInt = 0
    """First row group of a .parquet file, first byte of a .jsonl file, first synthetic block."""

    stop: NonNegativeInt | None = None
    """One after the last."""


class Planned(NamedTuple):
    slices: list[Slice]
    next_file: int
    """Number of the first file that comes after them."""
