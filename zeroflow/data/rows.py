"""Access to the rows of a shard set."""

from functools import lru_cache
from pathlib import Path

import numpy as np

from zeroflow.data import part_counts
from zeroflow.data.arrays import Int64Array, RowArray
from zeroflow.data.local_copies import LocalCopies
from zeroflow.data.shard_file import ShardFile
from zeroflow.data.shards import ShardSet, Split, rows_path

_OPEN_FILES = 128
"""Maximum number of open files of a split; a large set has more files than a process may open."""


class Rows:
    """The rows of one split; `rows[ids]` reads only these rows, (len(ids), row_tokens) integers."""

    def __init__(self, shards: ShardSet, split: Split, *, local: Path | None = None) -> None:
        """
        Args:
            local: folder on a local disk for copies of the files; None for no copies.

        Raises:
            DamagedArtifact: a part is missing or damaged.
        """
        counts = part_counts.of(shards)
        rows, each = counts.column(f"{split}_rows"), counts.column(f"{split}_file_rows")
        self._ends = np.cumsum(rows)
        self._starts, self._file_rows = self._ends - rows, each
        if not len(self):
            raise FileNotFoundError(f"{shards.path} has no shard of split {split}")
        self.end_of_text = shards.end_of_text
        copies = LocalCopies(shards.path, local) if local else None

        # Not a method: it would keep the files open until the next garbage collection
        @lru_cache(_OPEN_FILES)
        def file(part: int, number: int) -> ShardFile:
            path = rows_path(shards.part(part), split, number)
            return ShardFile(copies.of(path) if copies else path)

        self._file = file
        first = self._file(int(np.argmax(rows > 0)), 0)
        self.row_tokens, self._type = first.row_tokens, first.dtype

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, ids: Int64Array) -> RowArray:
        """
        Raises:
            IndexError: there is no such row.
            DamagedArtifact: a file is missing or damaged.
        """
        if np.ndim(ids) != 1:
            raise IndexError("rows are read by a list of their numbers, such as rows[np.arange(3)]")
        ids = np.asarray(ids)
        if len(ids) and not 0 <= ids.min() <= ids.max() < len(self):
            raise IndexError(
                f"there is no row {ids.min() if ids.min() < 0 else ids.max()}: rows are numbered "
                f"from 0 to {len(self) - 1:,}"
            )
        parts = np.searchsorted(self._ends, ids, side="right")
        files, places = np.divmod(ids - self._starts[parts], self._file_rows[parts])
        out = np.empty((len(ids), self.row_tokens), dtype=self._type)
        found = zip(parts.tolist(), files.tolist(), places.tolist(), out, strict=True)
        for part, file, place, row in found:
            self._file(part, file).read_into(place, row)
        return out
