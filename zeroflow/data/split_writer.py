"""TODO docstring."""

import mmap
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from zeroflow import artifacts
from zeroflow.data import packing, readers
from zeroflow.data.columns import DocumentBatch, DocumentColumns, concatenated, sound_ids
from zeroflow.data.packing import Pieces
from zeroflow.data.part_facts import PartJob, Split, SplitCounts

_SHARD_TOKENS = 2**22


_WINDOW_DOCUMENTS = 2000


_WINDOW_TOKENS = (2**20, 2**21)
"""A window of documents is packed once it holds so many documents and the first number of tokens,
or the second."""


_MOST_NAME_BYTES = 2**30
"""Of the ids, or the URLs, of lines that are written at once: Arrow's offsets end at 2**31."""


_IPC_FRAME_BYTES = 2**12
"""More than an Arrow file has beside its batch: schema and footer."""


SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("url", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("offset", pa.int32(), nullable=False),
        pa.field("start", pa.int64(), nullable=False),
        pa.field("tokens", pa.int32(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("text_hash", pa.uint64(), nullable=False),
    ]
)


class FileWriter:
    """Writes files, and finds what a manifest says of them, beside other work.

    Its thread ends with the program: Ctrl-C does not wait for a disk.
    """

    def __init__(self) -> None:
        self._written: dict[str, Future[dict[str, Any]]] = {}
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)

    def add(self, file: Path, content: memoryview) -> Future[dict[str, Any]]:
        """The future ends when the content is needed no more; its error is an OSError."""
        future = self._written[file.name] = Future()

        def write() -> None:
            try:
                future.set_result(artifacts.write_recorded(file, content))
            except BaseException as error:
                future.set_exception(error)

        self._work.put(write)
        return future

    def recorded(self) -> dict[str, dict[str, Any]]:
        """What the manifest says of the files, by name.

        Raises:
            OSError: the disk did not take one.
        """
        return {name: future.result() for name, future in self._written.items()}

    def _run(self) -> None:
        while (write := self._work.get()) is not None:
            write()

    def __enter__(self) -> "FileWriter":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._work.put(None)
        self._thread.join()


class _Buffers(threading.local):
    """What a thread lays rows out in, part after part.

    It is the system's, which hands it out page by page as it is filled, and has it back when the
    thread ends: the allocator would keep such large pieces.
    """

    def __init__(self) -> None:
        self._kept: dict[str, mmap.mmap] = {}

    def take(self, purpose: str, size: int) -> mmap.mmap:
        """At least so many bytes, with whatever is in them; the same ones for the same purpose."""
        kept = self._kept.get(purpose)
        if kept is None or len(kept) < size:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            kept = self._kept[purpose] = mmap.mmap(-1, size, flags=flags)
        return kept


_memory = _Buffers()


class SplitWriter:
    """Packs the documents of one split, window by window, and writes its rows and its table."""

    def __init__(
        self,
        folder: Path,
        split: Split,
        job: PartJob,
        table: pq.ParquetWriter,
        files: "FileWriter",
    ) -> None:
        self._recorder = files
        self._folder, self._split, self._table = folder, split, table
        self._layout, self._fill = job.layout, job.tokenizer.end_of_text
        self._pack = packing.PACKINGS[job.layout.packing]
        self._shard_rows = max(1, _SHARD_TOKENS // job.layout.row_tokens)
        # a window of documents up to a row long leaves hardly any room in its rows
        self._rows = self._empty(self._shard_rows + 2 * _WINDOW_TOKENS[1] // job.layout.row_tokens)
        self._written: Future[dict[str, Any]] | None = None
        self._filled = self._files = 0
        self._window: list[DocumentBatch] = []
        self._documents_held = self._tokens_held = 0
        self._counts = SplitCounts()

    def add(self, batch: DocumentBatch) -> None:
        lengths = batch.documents.lengths
        if not len(lengths):
            return
        self._window.append(batch)
        self._documents_held += len(lengths)
        self._tokens_held += int(lengths.sum())
        enough, many = _WINDOW_TOKENS
        if (self._documents_held >= _WINDOW_DOCUMENTS and self._tokens_held >= enough) or (
            self._tokens_held >= many
        ):
            self._close_window()

    def finish(self) -> SplitCounts:
        if self._window:
            self._close_window()
        if self._filled:
            self._write(self._filled)
        return self._counts

    def _close_window(self) -> None:
        documents = concatenated([batch.documents for batch in self._window])
        pieces = self._pack(documents.lengths, self._layout.row_tokens)
        self._tabulate(documents, pieces)
        self._counts += SplitCounts(
            rows=pieces.rows,
            documents=self._documents_held,
            document_tokens=self._tokens_held,
            padding_tokens=pieces.rows * self._layout.row_tokens - self._tokens_held,
            cut_documents=np.count_nonzero(np.bincount(pieces.document[pieces.start > 0])),
            text_bytes=int(documents.text_bytes.sum()),
        )
        rows, before = self._room(pieces.rows), 0
        for batch in self._window:
            some = pieces.of(before, before + len(batch.begins))
            packing.lay_out(batch.tokens, batch.begins, batch.ends, some, rows)
            before += len(batch.begins)
        self._window, self._documents_held, self._tokens_held = [], 0, 0
        while self._filled >= self._shard_rows:
            self._write(self._shard_rows)

    def _tabulate(self, documents: DocumentColumns, pieces: Pieces) -> None:
        """Write the lines of the table for a window whose rows come next."""
        ids, urls = sound_ids(documents.ids), documents.urls
        sizes = [readers.byte_lengths(names)[documents.named] for names in (ids, urls)]
        longest = int(np.max(sizes))
        at_once = max(1, _MOST_NAME_BYTES // max(1, longest))  # every piece repeats them
        for begin in range(0, len(pieces.document), at_once):
            some = slice(begin, begin + at_once)
            document = pieces.document[some]
            named = readers.numbers(documents.named[document], pa.int64())
            columns = [
                ids.take(named),
                urls.take(named),
                readers.strings([self._split] * len(document)),
                readers.numbers(pieces.row[some] + self._counts.rows, pa.int64()),
                readers.numbers(pieces.offset[some], pa.int32()),
                readers.numbers(pieces.start[some], pa.int64()),
                readers.numbers(pieces.tokens[some], pa.int32()),
                readers.numbers(documents.text_bytes[document], pa.int64()),
                readers.numbers(documents.hashes[document], pa.uint64()),
            ]
            self._table.write_batch(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))

    def _room(self, rows: int) -> packing.Rows:
        """So many rows behind those that are filled, full of ends of text."""
        end = self._filled + rows
        if end > len(self._rows):
            larger = self._empty(end)
            larger[: self._filled] = self._rows[: self._filled]
            self._rows = larger
        room = self._rows[self._filled : end]
        room[:] = self._fill
        self._filled = end
        return room

    def _empty(self, rows: int) -> packing.Rows:
        width, kind = self._layout.row_tokens, np.dtype(self._layout.token_type)
        memory = _memory.take(f"{self._split} rows", rows * width * kind.itemsize)
        return np.frombuffer(memory, kind, rows * width).reshape(rows, width)

    def _in_memory(self, batch: pa.RecordBatch) -> memoryview:
        """A file with that batch, until the next one."""
        size = pa.ipc.get_record_batch_size(batch) + _IPC_FRAME_BYTES
        memory = _memory.take(f"{self._split} file", size)
        with pa.FixedSizeBufferWriter(pa.py_buffer(memory)) as sink:
            with pa.ipc.new_file(sink, batch.schema) as writer:
                writer.write_batch(batch)
            return memoryview(memory)[: sink.tell()]

    def _write(self, rows: int) -> None:
        """Write the first rows to a file; those behind them move up."""
        item = pa.field("item", pa.type_for_alias(self._layout.token_type), nullable=False)
        flat = readers.numbers(self._rows[:rows].reshape(-1), item.type)
        list_type = pa.list_(item, self._layout.row_tokens)
        column = pa.FixedSizeListArray.from_arrays(flat, type=list_type)
        schema = pa.schema([pa.field("tokens", list_type, nullable=False)])
        file = self._folder / f"{self._split}-{self._files:05d}.arrow"
        if self._written:
            self._written.result()  # the memory of its content is taken next
        content = self._in_memory(pa.record_batch([column], schema=schema))
        self._written = self._recorder.add(file, content)
        self._files += 1
        self._filled -= rows
        self._rows[: self._filled] = self._rows[rows : rows + self._filled].copy()
