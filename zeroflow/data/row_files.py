"""Writes the rows of a split to Arrow files: the shards."""

import mmap
import threading
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pyarrow as pa

from zeroflow.artifacts import FileRecord
from zeroflow.data import arrays
from zeroflow.data.arrays import RowArray
from zeroflow.data.file_writer import FileWriter
from zeroflow.data.shards import Layout, Split, rows_path

SHARD_TOKENS = 2**22
"""Number of tokens in a file: 16 MB of int32, which are laid out in memory before being written."""

_IPC_FRAME_BYTES = 2**12
"""Upper limit on the size of an Arrow file's schema and footer."""


class _Buffers(threading.local):
    """The memory in which a thread lays out rows; it is reused for every part.

    It is mapped directly from the system, which provides pages when they are filled and takes them
    back when the thread ends. An allocator would keep such large blocks.
    """

    def __init__(self) -> None:
        self._kept: dict[str, mmap.mmap] = {}

    def take(self, purpose: str, size: int) -> mmap.mmap:
        """Return at least `size` bytes with arbitrary content; the same memory for each purpose."""
        kept = self._kept.get(purpose)
        if kept is None or len(kept) < size:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            kept = self._kept[purpose] = mmap.mmap(-1, size, flags=flags)
        return kept


_buffers = _Buffers()


class RowFiles:
    """Collects the rows of a split, and writes a file for every `SHARD_TOKENS` of them."""

    def __init__(
        self, part: Path, split: Split, layout: Layout, writer: FileWriter, *, spare_rows: int
    ) -> None:
        """
        Args:
            spare_rows: room for more rows than a file has. If `append` needs more, it copies all.
        """
        self._part, self._split, self._layout, self._writer = part, split, layout, writer
        self._file_rows = max(1, SHARD_TOKENS // layout.row_tokens)
        self._rows = self._buffer(self._file_rows + spare_rows)
        self._filled = self._files = 0
        self._written: Future[FileRecord] | None = None

    def append(self, rows: int, *, fill: int) -> RowArray:
        """Append rows filled with `fill`; the caller overwrites them before the next call."""
        end = self._filled + rows
        if end > len(self._rows):
            larger = self._buffer(end)
            larger[: self._filled] = self._rows[: self._filled]
            self._rows = larger
        appended = self._rows[self._filled : end]
        appended[:] = fill
        self._filled = end
        return appended

    def write_full_files(self) -> None:
        while self._filled >= self._file_rows:
            self._write(self._file_rows)

    def write_rest(self) -> None:
        if self._filled:
            self._write(self._filled)

    def _write(self, rows: int) -> None:
        """Write the first `rows` to a file, and move the rest to the front."""
        item = pa.field("item", pa.type_for_alias(self._layout.token_type), nullable=False)
        flat = arrays.numbers(self._rows[:rows].reshape(-1), item.type)
        list_type = pa.list_(item, self._layout.row_tokens)
        column = pa.FixedSizeListArray.from_arrays(flat, type=list_type)
        schema = pa.schema([pa.field("tokens", list_type, nullable=False)])
        if self._written:
            self._written.result()  # wait: the next file is laid out in the same memory
        content = self._serialize(pa.record_batch([column], schema=schema))
        file = rows_path(self._part, self._split, self._files)
        self._written = self._writer.add(file, content)
        self._files += 1
        self._filled -= rows
        self._rows[: self._filled] = self._rows[rows : rows + self._filled].copy()

    def _serialize(self, batch: pa.RecordBatch) -> memoryview:
        """Return the content of an Arrow file with `batch`, valid until the next call.

        The file itself is written without Arrow: an interrupt would be raised in Python code that
        Arrow calls.
        """
        size = pa.ipc.get_record_batch_size(batch) + _IPC_FRAME_BYTES
        memory = _buffers.take(f"{self._split} file", size)
        with pa.FixedSizeBufferWriter(pa.py_buffer(memory)) as sink:
            with pa.ipc.new_file(sink, batch.schema) as writer:
                writer.write_batch(batch)
            return memoryview(memory)[: sink.tell()]

    def _buffer(self, rows: int) -> RowArray:
        width, kind = self._layout.row_tokens, np.dtype(self._layout.token_type)
        memory = _buffers.take(f"{self._split} rows", rows * width * kind.itemsize)
        return np.frombuffer(memory, kind, rows * width).reshape(rows, width)
