"""TODO docstring."""

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from zeroflow.config import Config
from zeroflow.data import slices, synthetic
from zeroflow.data.corpus import CorpusConfig, local_text_bytes
from zeroflow.data.packing import PackingName
from zeroflow.data.part_facts import Layout, SplitCounts
from zeroflow.reuse import StageResult

PLAN = "plan.json"


BUILDS = "builds.jsonl"
"""A line for each part that was built here: how long it took."""


SYNTHETIC_BLOCKS = 8


CHARACTERS_PER_TOKEN = 4


class ShardConfig(Config):
    """How documents are held out, packed and stored, and how much of them is needed."""

    seq_len: int = Field(ge=2)
    """Tokens of context. A row has one more, as targets are shifted by one."""

    train_rows: PositiveInt
    """Rows that the run trains on."""

    validation_rows: PositiveInt
    """Rows that the run validates on, of documents of which no token is trained on."""

    validation_fraction: float = Field(0.02, gt=0, lt=1)
    """Share of the documents that is kept for validation."""

    token_type: Literal["int32", "uint16"] = "int32"
    """Integer type on disk; uint16 takes half the space, for vocabularies up to 65,536."""

    packing: PackingName = "best-fit"
    """How documents are put into rows."""

    @property
    def layout(self) -> Layout:
        return Layout(
            row_tokens=self.seq_len + 1,
            token_type=self.token_type,
            packing=self.packing,
            validation_fraction=self.validation_fraction,
        )


class ShardSet(StageResult):
    """The parts of a set that a run reads."""

    path: Path
    parts: PositiveInt
    """The first so many are read, however many there are."""

    row_tokens: PositiveInt
    end_of_text: NonNegativeInt
    train: SplitCounts
    validation: SplitCounts
    empty_documents: NonNegativeInt
    duplicates: NonNegativeInt
    bad_lines: NonNegativeInt
    entropy: float | None
    """Nats per token that no model can go below, where the source's entropy is known."""

    @property
    def documents(self) -> int:
        return self.train.documents + self.validation.documents

    @property
    def validation_bytes_per_token(self) -> float | None:
        """UTF-8 bytes per token of the validation documents; None for synthetic data."""
        if not self.validation.text_bytes:
            return None
        return self.validation.text_bytes / self.validation.document_tokens

    @property
    def part_paths(self) -> list[Path]:
        return [part_path(self.path, number) for number in range(self.parts)]


def part_path(path: Path, number: int) -> Path:
    return path / f"part-{number:05d}"


def build_times(path: Path) -> list[dict[str, Any]]:
    """What `builds.jsonl` notes: `part`, `seconds`, `tokens`, `text_bytes`."""
    file = path / BUILDS
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    times = []
    for line in lines:
        with suppress(ValueError):  # half a line, of a process that was killed
            times.append(json.loads(line))
    return times


def expected_bytes(config: ShardConfig, corpus: CorpusConfig) -> int:
    """What the rows that `config` asks for are likely to take: whole parts, or all there is."""
    part = slices.SLICE_BYTES / CHARACTERS_PER_TOKEN
    if corpus.data_mode == "synthetic":
        part = SYNTHETIC_BLOCKS * synthetic.BLOCK / synthetic.END_PROBABILITY
    held_out, row = config.validation_fraction, config.layout.row_tokens
    train = config.train_rows * row / (part * (1 - held_out))
    validation = config.validation_rows * row / (part * held_out)
    asked_for = math.ceil(max(train, validation)) * part
    there = local_text_bytes(corpus) / CHARACTERS_PER_TOKEN
    return int(min(asked_for, there) * np.dtype(config.token_type).itemsize)


def row_bytes(shards: ShardSet) -> int:
    """Size on disk of the rows of all parts that are read."""
    return sum(file.stat().st_size for part in shards.part_paths for file in part.glob("*.arrow"))
