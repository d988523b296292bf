"""Counts of the parts of a shard set, stored in pages.

A page has the counts of 512 complete parts: `counts-00000.arrow` those of parts 0 to 511, and so
on. With pages, a set of a million parts is opened without reading a file in each of its folders. A
page is computed from its parts, so it may be deleted, and any process may write it.
"""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa

from zeroflow import artifacts
from zeroflow.artifacts import DamagedArtifact
from zeroflow.data import arrays
from zeroflow.data.arrays import Int64Array
from zeroflow.data.shard_file import ShardFile
from zeroflow.data.shards import (
    SPLITS,
    PartFacts,
    PartManifest,
    ShardSet,
    Split,
    SplitCounts,
    part_path,
    rows_path,
)

log = logging.getLogger(__name__)

PAGE_PARTS = 512
"""Number of parts of a page. After a killed build, up to this many parts, about 17 GB, are verified
again."""

_FORMAT, _WITHOUT_ENDS = "2", "1"
"""Versions of the file's format; the second, of earlier versions, lacks the last column. Pages of
other versions count as damaged."""

_LEFT_OUT = ("empty_documents", "duplicates", "bad_lines")
_STORED = ("train_file_rows", "validation_file_rows", "row_bytes")
"""Number of rows in each file of a split except the last, and total size of the files."""

COLUMNS = (
    *(f"{split}_{name}" for split in SPLITS for name in SplitCounts.model_fields),
    *_LEFT_OUT,
    *_STORED,
    "held_out_ends",
)
_PLACE = {name: place for place, name in enumerate(COLUMNS)}


class PartCounts:
    """Counts of parts 0, 1, ...; adding a part takes constant time on average."""

    def __init__(self, table: Int64Array) -> None:
        """
        Args:
            table: one line with `COLUMNS` for each part.
        """
        self._table, self._parts = table, len(table)
        self._total = table.sum(axis=0)

    @classmethod
    def none(cls) -> Self:
        return cls(np.zeros((0, len(COLUMNS)), np.int64))

    def __len__(self) -> int:
        return self._parts

    def extend(self, lines: Int64Array) -> None:
        end = self._parts + len(lines)
        if end > len(self._table):
            grown = np.zeros((max(end, 2 * len(self._table)), len(COLUMNS)), np.int64)
            grown[: self._parts] = self._table[: self._parts]
            self._table = grown
        self._table[self._parts : end] = lines
        self._parts = end
        self._total += lines.sum(axis=0)

    def append(self, facts: PartFacts) -> None:
        self.extend(_line(facts)[None])

    def column(self, name: str) -> Int64Array:
        return self._table[: self._parts, _PLACE[name]]

    def total(self, name: str) -> int:
        return int(self._total[_PLACE[name]])

    def split(self, split: Split) -> SplitCounts:
        """The sum over all parts."""
        names = SplitCounts.model_fields
        return SplitCounts(**{name: self.total(f"{split}_{name}") for name in names})


def pages(path: Path, parts: int | None = None) -> Int64Array:
    """Return the lines of the pages of the set at `path`, up to the first part without a page.

    Args:
        parts: read only the lines of these first parts; None for all.
    """
    found: list[Int64Array] = []
    while parts is None or len(found) * PAGE_PARTS < parts:
        page = _page_path(path, len(found))
        try:
            found.append(_read(page))
        except FileNotFoundError:
            break
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            log.warning("%s cannot be read (%s): reading its parts one by one", page, error)
            break
    return np.concatenate([*found, np.zeros((0, len(COLUMNS)), np.int64)])[:parts]


def write_page(path: Path, number: int) -> None:
    """Write page `number` of the set at `path`, whose parts are complete."""
    first = number * PAGE_PARTS
    lines = np.stack([stored(path, part) for part in range(first, first + PAGE_PARTS)])
    columns = [arrays.numbers(column, pa.int64()) for column in lines.T]
    facts = {"format": _FORMAT, "sha256": hashlib.sha256(lines.tobytes()).hexdigest()}
    schema = pa.schema([pa.field(name, pa.int64(), nullable=False) for name in COLUMNS], facts)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
    artifacts.write_bytes(_page_path(path, number), memoryview(sink.getvalue()))


def of(shards: ShardSet) -> PartCounts:
    """Return the counts of all parts of a set; parts without a page are read one by one.

    Raises:
        DamagedArtifact: a part is missing or damaged.
    """
    lines = pages(shards.path, shards.parts)
    others = [stored(shards.path, number) for number in range(len(lines), shards.parts)]
    return PartCounts(np.concatenate([lines, *(line[None] for line in others)]))


def row_bytes(shards: ShardSet) -> int:
    """Disk space of the rows of all parts that a run reads."""
    return of(shards).total("row_bytes")


def stored(path: Path, number: int) -> Int64Array:
    """Return the line of a part, from its manifest and the headers of its first files.

    Raises:
        DamagedArtifact: the part is missing or damaged.
    """
    part = part_path(path, number)
    manifest = PartManifest.read(part)
    line = _line(manifest.facts)
    for split in SPLITS:
        if line[_PLACE[f"{split}_rows"]]:
            line[_PLACE[f"{split}_file_rows"]] = ShardFile(rows_path(part, split, 0)).rows
    files = manifest.files.items()
    line[_PLACE["row_bytes"]] = sum(file.bytes for name, file in files if name.endswith(".arrow"))
    return line


def _line(facts: PartFacts) -> Int64Array:
    """The line of a part without the columns about its files."""
    counts: Sequence[int] = [
        *(getattr(getattr(facts, s), name) for s in SPLITS for name in SplitCounts.model_fields),
        *(getattr(facts, name) for name in _LEFT_OUT),
        *(0 for _ in _STORED),
        facts.held_out_ends,
    ]
    return np.array(counts, np.int64)


def _read(page: Path) -> Int64Array:
    """
    Raises:
        FileNotFoundError: there is no such page.
        DamagedArtifact: it was changed, or is of another version.
    """
    with pa.ipc.open_file(pa.py_buffer(page.read_bytes())) as reader:
        batch, facts = reader.get_batch(0), reader.schema.metadata or {}
    older = facts.get(b"format") == _WITHOUT_ENDS.encode()
    if not older and facts.get(b"format") != _FORMAT.encode():
        raise DamagedArtifact("it has another format")
    names = COLUMNS[:-1] if older else COLUMNS
    lines = np.stack([batch.column(name).to_numpy() for name in names], axis=1)
    sha256 = hashlib.sha256(np.ascontiguousarray(lines).tobytes()).hexdigest()
    if len(lines) != PAGE_PARTS or facts.get(b"sha256") != sha256.encode():
        raise DamagedArtifact("its content was changed")
    return np.pad(lines, ((0, 0), (0, 1))) if older else lines


def _page_path(path: Path, number: int) -> Path:
    return path / f"counts-{number:05d}.arrow"
