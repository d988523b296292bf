"""Access to the rows of a shard set."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from zeroflow.data.arrays import Int64Array, RowArray
from zeroflow.data.shards import ShardSet, Split


class Rows:
    """The rows of one split, memory-mapped: `rows[ids]` gives (len(ids), row_tokens) integers."""

    def __init__(self, shards: ShardSet, split: Split) -> None:
        files = [file for path in shards.part_paths for file in sorted(path.glob(f"{split}-*"))]
        if not files:
            raise FileNotFoundError(f"{shards.path} has no shard of split {split}")
        self._shards = [_map(file) for file in files]
        self._ends = np.cumsum([len(shard) for shard in self._shards])
        self._starts = self._ends - [len(shard) for shard in self._shards]
        self.end_of_text = shards.end_of_text

    @property
    def row_tokens(self) -> int:
        return self._shards[0].shape[1]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, ids: Int64Array) -> RowArray:
        shard_ids = np.searchsorted(self._ends, ids, side="right")
        places = (ids - self._starts[shard_ids]).tolist()
        first = self._shards[0]
        out = np.empty((len(places), first.shape[1]), dtype=first.dtype)
        for i, (shard, place) in enumerate(zip(shard_ids.tolist(), places, strict=True)):
            out[i] = self._shards[shard][place]
        return out


def _map(file: Path) -> RowArray:
    """The (rows, row_tokens) array of one Arrow file, without a copy.

    The file is closed, its memory stays mapped: a large set has more files than may be open.
    """
    with pa.memory_map(str(file)) as content:
        column = pa.ipc.open_file(content).get_batch(0).column(0)
    flat = column.flatten().to_numpy(zero_copy_only=True)
    return flat.reshape(-1, column.type.list_size)
