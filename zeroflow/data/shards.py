"""Shard sets: rows of tokens on disk, their layout and description.

A shard set is a directory `<cache>/shards/<name>-<fingerprint>/` with

    plan.json        settings, source, files of the corpus, and the slices of the first parts
    slices-00001024.json ...  the slices of the other parts; pages named by their first slice
    counts-00000.arrow ...  counts of 512 parts each, so that a large set opens quickly
    builds.jsonl     a line with the build time of each part that was built here
    part-00000/ ...  one part for each slice, complete or absent:
        train-00000.arrow ...       training rows
        validation-00000.arrow ...  held-out rows, which share no token with train
        documents.parquet           position of each document
        manifest.json               counts, and size and sha256 of every file

Each Arrow file is one record batch with one column `tokens`, a non-null, uncompressed
`FixedSizeList` of `row_tokens` ids, so pyarrow can map it into memory and read any row directly.
Every document ends with the end-of-text id, which otherwise occurs only as padding after another
one. `document_table` describes documents.parquet.

A run reads as many of the first parts as it needs for its rows. The fingerprint covers everything
that the bytes depend on, but not the length of a run: a longer run adds parts to the same set.
"""

import math
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from zeroflow import artifacts
from zeroflow.artifacts import FileRecord
from zeroflow.config import Config
from zeroflow.data import slices
from zeroflow.data.corpus import CorpusConfig
from zeroflow.data.packing import PackingName
from zeroflow.data.returned_text import ReturnedText
from zeroflow.data.slices import bytes_per_token, local_text_bytes
from zeroflow.data.synthetic import PART_TOKENS
from zeroflow.reuse import StageResult

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")

TokenType = Literal["int32", "uint16"]


class Layout(Config):
    """Settings for holding out, packing and storing documents on which the bytes depend."""

    row_tokens: int = Field(ge=2)
    token_type: TokenType
    packing: PackingName
    validation_fraction: float


class ShardConfig(Config):
    """Settings for holding out, packing and storing documents, and the numbers of rows needed."""

    seq_len: int = Field(ge=2)
    """Tokens of context. A row has one more, because targets are shifted by one."""

    train_rows: PositiveInt
    """Number of rows that the run trains on."""

    validation_rows: PositiveInt
    """Number of rows that the run validates on. Their tokens are not used for training."""

    validation_fraction: float = Field(0.02, gt=0, lt=1)
    """Fraction of the text that is held out for validation; see `holdout`."""

    token_type: TokenType = "int32"
    """Integer type on disk; uint16 takes half the space, for vocabularies up to 65,536."""

    packing: PackingName = "best-fit"
    """Method of packing documents into rows."""

    @property
    def layout(self) -> Layout:
        return Layout(
            row_tokens=self.seq_len + 1,
            token_type=self.token_type,
            packing=self.packing,
            validation_fraction=self.validation_fraction,
        )


class SplitCounts(Config):
    """Counts of one split, for a part or a whole set."""

    rows: NonNegativeInt = 0
    documents: NonNegativeInt = 0
    document_tokens: NonNegativeInt = 0
    """Tokens of all documents, including their end-of-text tokens."""

    padding_tokens: NonNegativeInt = 0
    cut_documents: NonNegativeInt = 0
    """Number of documents that are split over several rows."""

    text_bytes: NonNegativeInt = 0
    """UTF-8 bytes of all documents; 0 for synthetic data."""

    def __add__(self, other: "SplitCounts") -> "SplitCounts":
        sums = {
            name: getattr(self, name) + getattr(other, name) for name in SplitCounts.model_fields
        }
        return SplitCounts(**sums)


class PartFacts(Config):
    """Counts of a part."""

    train: SplitCounts
    validation: SplitCounts
    empty_documents: NonNegativeInt
    duplicates: NonNegativeInt
    bad_lines: NonNegativeInt
    bad_places: tuple[str, ...]
    """Places of the first bad lines, each with the fault."""

    held_out_ends: NonNegativeInt = Field(0, exclude_if=lambda ends: ends == 0)
    """Number of held-out documents that are the end of one to train on. Parts of earlier versions
    do not record it."""


class PartManifest(Config):
    """manifest.json of a part."""

    facts: PartFacts
    returned: ReturnedText | None = None
    """A sample of its text, encoded and decoded again. None for synthetic data, and in the parts of
    earlier versions."""

    files: dict[str, FileRecord] = Field(default_factory=dict)
    """Added by `artifacts.seal`."""

    @classmethod
    def read(cls, part: Path) -> Self:
        """
        Raises:
            DamagedArtifact: the manifest is missing or damaged.
        """
        return cls.model_validate(artifacts.read_signed(part / artifacts.MANIFEST))


class ShardSet(StageResult):
    """The parts of a set that a run reads."""

    path: Path
    parts: PositiveInt
    """Number of parts that are read: the first ones, even if more exist."""

    row_tokens: PositiveInt
    end_of_text: NonNegativeInt
    train: SplitCounts
    validation: SplitCounts
    empty_documents: NonNegativeInt
    duplicates: NonNegativeInt
    bad_lines: NonNegativeInt
    held_out_ends: NonNegativeInt = 0
    """Number of held-out documents that are the end of one to train on."""

    entropy: float | None
    """Mean loss of the known source of synthetic data on the training rows, in nats per token."""

    @property
    def documents(self) -> int:
        """Number of documents; one whose end is held out is in both splits, and counts once."""
        return self.train.documents + self.validation.documents - self.held_out_ends

    @property
    def part_paths(self) -> list[Path]:
        return [self.part(number) for number in range(self.parts)]

    def part(self, number: int) -> Path:
        return part_path(self.path, number)

    def some_parts(self, most: int) -> list[int]:
        """Return the numbers of at most `most` parts, spread evenly from the first to the last."""
        return sorted(set(np.linspace(0, self.parts - 1, most).astype(int).tolist()))


def part_path(path: Path, number: int) -> Path:
    """The directory of a part of the set at `path`."""
    return path / f"part-{number:05d}"


def rows_path(part: Path, split: Split, number: int) -> Path:
    """The Arrow file with rows of a part."""
    return part / f"{split}-{number:05d}.arrow"


def part_tokens(corpus: CorpusConfig, vocab_size: int) -> float:
    """Approximate number of tokens of a part."""
    return slices.SLICE_BYTES / bytes_per_token(vocab_size) if corpus.is_text else PART_TOKENS


def expected_bytes(config: ShardConfig, corpus: CorpusConfig, text: float) -> int:
    """Predict the disk space of the rows: a whole number of parts, or the whole corpus.

    Args:
        text: bytes of text per token.
    """
    part = slices.SLICE_BYTES / text if corpus.is_text else PART_TOKENS
    held_out = 0.0 if corpus.validation else config.validation_fraction
    row = config.layout.row_tokens
    parts = math.ceil(config.train_rows * row / (part * (1 - held_out)))
    if held_out:
        parts = max(parts, math.ceil(config.validation_rows * row / (part * held_out)))
    tokens = min(parts * part, _available_bytes(corpus) / text)
    if corpus.validation:  # all of its files are built
        named = _available_bytes(corpus.validation)
        tokens += 0 if math.isinf(named) else named / text
    return int(tokens * np.dtype(config.token_type).itemsize)


def _available_bytes(corpus: CorpusConfig) -> float:
    try:
        return local_text_bytes(corpus)
    except ValueError:  # the text of a complete run may be missing
        return math.inf
