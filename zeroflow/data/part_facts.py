"""TODO docstring."""

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt

from zeroflow.config import Config
from zeroflow.data.corpus import CorpusConfig, Slice
from zeroflow.data.packing import PackingName
from zeroflow.data.tokenizer import Tokenizer

Split = Literal["train", "validation"]


SPLITS: tuple[Split, ...] = ("train", "validation")


DOCUMENTS = "documents.parquet"


class Layout(Config):
    """How documents are held out, packed and stored."""

    row_tokens: int = Field(ge=2)
    token_type: Literal["int32", "uint16"]
    packing: PackingName
    validation_fraction: float


class PartJob(Config):
    """What the bytes of a part depend on, and the directory it becomes."""

    path: Path
    piece: Slice
    corpus: CorpusConfig
    tokenizer: Tokenizer
    layout: Layout
    held_out_below: float
    """Documents whose `corpus.held_out` is lower go to validation."""

    seed: NonNegativeInt
    """Of synthetic data."""

    earlier: tuple[Path, ...] = ()
    """Parts whose texts are duplicates here."""


class SplitCounts(Config):
    """What a split holds; sums over parts are counts of a set."""

    rows: NonNegativeInt = 0
    documents: NonNegativeInt = 0
    document_tokens: NonNegativeInt = 0
    """The end of text of every document included."""

    padding_tokens: NonNegativeInt = 0
    cut_documents: NonNegativeInt = 0
    """Documents that lie in more than one row."""

    text_bytes: NonNegativeInt = 0
    """UTF-8; 0 for documents that never were text."""

    def __add__(self, other: "SplitCounts") -> "SplitCounts":
        sums = {
            name: getattr(self, name) + getattr(other, name) for name in SplitCounts.model_fields
        }
        return SplitCounts(**sums)


class PartFacts(Config):
    """What a part's manifest says of it."""

    train: SplitCounts
    validation: SplitCounts
    empty_documents: NonNegativeInt
    duplicates: NonNegativeInt
    bad_lines: NonNegativeInt
    bad_places: tuple[str, ...]
    """Where the first of them are, and why they are bad."""


class BuiltPart(Config):
    facts: PartFacts
    seconds: float
    """0 for a part that was there."""
