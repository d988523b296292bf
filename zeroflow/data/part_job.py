"""The job of building a part of a shard set, and its result."""

from pathlib import Path

from pydantic import NonNegativeInt

from zeroflow.config import Config
from zeroflow.data.corpus import CorpusConfig
from zeroflow.data.holdout import Holdout
from zeroflow.data.shards import Layout, PartFacts
from zeroflow.data.slices import Slice
from zeroflow.data.tokenizer import Tokenizer


class PartJob(Config):
    """Everything that the bytes of a part depend on, and the directory to write."""

    path: Path
    piece: Slice
    corpus: CorpusConfig
    tokenizer: Tokenizer
    layout: Layout
    holdout: Holdout

    seed: NonNegativeInt
    """Seed of synthetic data."""

    claim: str = ""
    """Mark of the claim under which the part is built, see `claims`; empty if under a lock."""

    earlier: tuple[Path, ...] = ()
    """Earlier parts. A text of this part that also occurs in one of them is a duplicate."""


class BuiltPart(Config):
    facts: PartFacts
    seconds: float
    """Build time; 0 for a part that existed already."""
