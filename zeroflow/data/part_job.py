"""The job of building a part of a shard set, and its result."""

from pathlib import Path

from pydantic import NonNegativeInt

from zeroflow.config import Config
from zeroflow.data.corpus import CorpusConfig
from zeroflow.data.shards import Layout, PartFacts
from zeroflow.data.slices import Slice
from zeroflow.data.tokenizer import Tokenizer


class PartJob(Config):
    """All that the bytes of a part depend on, and the directory that it becomes."""

    path: Path
    piece: Slice
    corpus: CorpusConfig
    tokenizer: Tokenizer
    layout: Layout
    held_out_below: float
    """Documents whose `holdout_positions` is lower go to validation."""

    seed: NonNegativeInt
    """Seed of synthetic data."""

    earlier: tuple[Path, ...] = ()
    """Parts whose texts count as duplicates here."""


class BuiltPart(Config):
    facts: PartFacts
    seconds: float
    """0 for a part that existed already."""
