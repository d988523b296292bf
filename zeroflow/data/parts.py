"""One part of a shard set: a slice of the corpus, tokenised, packed and written.

A part depends on its slice and the settings alone, on no other part. So parts may be built in any
order, by any number of processes at once, and a killed build loses no more than the one at hand.
"""

import errno
import hashlib
import logging
import mmap
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, NonNegativeInt

from zeroflow import artifacts
from zeroflow.config import Config
from zeroflow.data import corpus, packing, readers, synthetic, tokenizer
from zeroflow.data.corpus import CorpusConfig, Slice
from zeroflow.data.packing import Ids, PackingName, Pieces, Tokens
from zeroflow.data.readers import Tally
from zeroflow.data.tokenizer import TokenizerFiles

log = logging.getLogger(__name__)

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
DOCUMENTS = "documents.parquet"

_SHARD_TOKENS = 2**22
_WINDOW_DOCUMENTS = 2000
_WINDOW_TOKENS = (2**20, 2**21)
"""A window of documents is packed once it holds so many documents and the first number of tokens,
or the second."""

_MOST_NAME_BYTES = 2**30
"""Of the ids, or the URLs, of lines that are written at once: Arrow's offsets end at 2**31."""

_IPC_FRAME_BYTES = 2**12
"""More than an Arrow file has beside its batch: schema and footer."""

_AHEAD = 3
_SCHEMA = pa.schema(
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

T = TypeVar("T")


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
    tokens: TokenizerFiles
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


class _Documents(NamedTuple):
    """What is known of documents, in columns; the first two may be of others as well."""

    ids: pa.BinaryArray
    urls: pa.StringArray
    named: Ids
    """Place of each document in those two."""

    text_bytes: Ids
    hashes: npt.NDArray[np.uint64]
    lengths: Ids
    """Tokens of each, with its end of text."""

    def only(self, chosen: npt.NDArray[np.bool_]) -> "_Documents":
        return self._replace(
            named=self.named[chosen],
            text_bytes=self.text_bytes[chosen],
            hashes=self.hashes[chosen],
            lengths=self.lengths[chosen],
        )


def _joined(several: Sequence[_Documents]) -> _Documents:
    ids, urls, named, *columns = zip(*several, strict=True)
    sizes = [len(column) for column in ids]
    moves = np.cumsum(sizes) - sizes
    moved = [places + move for places, move in zip(named, moves, strict=True)]
    return _Documents(
        pa.concat_arrays(ids), pa.concat_arrays(urls), *map(np.concatenate, [moved, *columns])
    )


class _Batch(NamedTuple):
    """Tokenised documents."""

    documents: _Documents
    tokens: Tokens
    """Documents end to end, without their ends of text; some may be of others."""

    begins: Ids
    """Place of the first token of each document."""

    @property
    def ends(self) -> Ids:
        return self.begins + self.documents.lengths - 1

    def only(self, chosen: npt.NDArray[np.bool_]) -> "_Batch":
        if chosen.all():
            return self
        return _Batch(self.documents.only(chosen), self.tokens, self.begins[chosen])

    def alone(self) -> "_Batch":
        """The same documents, in columns that hold no others."""
        named = readers.numbers(self.documents.named, pa.int64())
        documents = self.documents._replace(
            ids=self.documents.ids.take(named),
            urls=self.documents.urls.take(named),
            named=np.arange(len(named)),
        )
        bounds = zip(self.begins.tolist(), self.ends.tolist(), strict=True)
        return _end_to_end(documents, [self.tokens[begin:end] for begin, end in bounds])


def _end_to_end(documents: _Documents, tokens: Sequence[Tokens]) -> _Batch:
    lengths = documents.lengths - 1
    stream = np.concatenate([*tokens, np.empty(0, np.int32)])
    return _Batch(documents, stream, np.cumsum(lengths) - lengths)


def existing(path: Path) -> PartFacts | None:
    """The facts of a part that is there and whole."""
    if not path.exists():
        return None
    try:
        return PartFacts.model_validate(artifacts.verify(path)["facts"])
    except artifacts.DamagedArtifact:
        return None  # `build` sets it aside under the lock


def build(job: PartJob) -> BuiltPart:
    """Have the part, writing it unless it is there and whole.

    Raises:
        ValueError: the corpus, or the tokenizer, is not what it promises.
        hub.HubError: the hub failed.
        OSError: the disk is full, among others.
    """
    start = time.perf_counter()

    def write(partial: Path) -> None:
        facts, recorded = _write(partial, job)
        artifacts.seal(partial, {"facts": facts.model_dump(mode="json")}, recorded)

    try:
        reused = artifacts.build_once(job.path, write)
    except OSError as error:
        if error.errno in artifacts.NO_ROOM:
            raise OSError(
                errno.ENOSPC,
                f"no space is left in {job.path.parent} for another part "
                f"({os.strerror(error.errno)}): free some, or name another --cache-dir; the parts "
                "that are complete are kept",
            ) from error
        raise
    facts = PartFacts.model_validate(artifacts.read_json(job.path / artifacts.MANIFEST)["facts"])
    seconds = 0.0 if reused else time.perf_counter() - start
    if not reused:
        tokens = facts.train.document_tokens + facts.validation.document_tokens
        log.info("%s: %s tokens in %.1f s", job.path.name, f"{tokens:,}", seconds)
    return BuiltPart(facts=facts, seconds=seconds)


def documents(path: Path) -> pa.Table:
    """The table of a part: a line for each piece of a document."""
    return pq.read_table(path / DOCUMENTS)


def _write(folder: Path, job: PartJob) -> tuple[PartFacts, dict[str, dict[str, Any]]]:
    """The facts of a part, and what its manifest says of the files of rows."""
    tally, duplicates = Tally(), 0
    with_hashes = job.corpus.deduplicate and job.tokens.path is not None
    known = _Known(job.earlier) if with_hashes else None
    with (
        _Recorder() as files,
        pa.OSFile(str(folder / DOCUMENTS), "wb") as sink,  # which is closed even on a full disk
        pq.ParquetWriter(sink, _SCHEMA, compression="zstd") as table,
    ):
        writers = {split: _SplitWriter(folder, split, job, table, files) for split in SPLITS}
        for batch in _tokenized(job, tally):
            if known:
                new = known.add(batch.documents.hashes)
                duplicates += len(new) - int(new.sum())
                batch = batch.only(new)
            documents = batch.documents
            places = corpus.held_out(documents.ids.to_pylist())[documents.named]
            held_out = places < job.held_out_below
            writers["train"].add(batch.only(~held_out))
            # the few wait long for a window, and would keep all others
            writers["validation"].add(batch.only(held_out).alone())
        counts = {split: writer.finish() for split, writer in writers.items()}
    facts = PartFacts(
        **counts,
        empty_documents=tally.empty,
        duplicates=duplicates,
        bad_lines=tally.bad,
        bad_places=tuple(tally.places),
    )
    return facts, files.recorded()


def _tokenized(job: PartJob, tally: Tally) -> Iterator[_Batch]:
    if job.tokens.path is None:
        yield from _synthetic(job)
        return
    encoder = tokenizer.encoder(job.tokens)
    for read in _ahead(corpus.read(job.corpus, job.piece, tally)):
        ids, lengths = encoder.encode(read.texts)
        _check(job, ids, lengths, read)
        documents = _Documents(
            read.ids,
            read.urls,
            np.arange(len(lengths)),
            read.text_bytes,
            _hashes(read.texts if job.corpus.deduplicate else (), len(lengths)),
            lengths + 1,
        )
        batch = _Batch(documents, ids, np.cumsum(lengths) - lengths)
        if not lengths.all():  # text that the tokenizer makes nothing of
            tally.empty += int((lengths == 0).sum())
            batch = batch.only(lengths > 0)
        yield batch


def _check(job: PartJob, ids: Tokens, lengths: Ids, read: readers.Batch) -> None:
    end_of_text, vocab_size = job.tokens.end_of_text, job.tokens.vocab_size
    highest = ids.max(initial=0)
    if highest < vocab_size and (highest < end_of_text or not (ids == end_of_text).any()):
        return
    place = int(((ids >= vocab_size) | (ids == end_of_text)).argmax())
    number = int(np.searchsorted(np.cumsum(lengths), place, side="right"))
    document = _sound(read.ids[number : number + 1])[0].as_py()
    if ids[place] == end_of_text:
        raise ValueError(
            f"document {document} spells out the token that ends documents, and this "
            "tokenizer cannot tell the two apart: name another with --end-of-text, or use "
            "another tokenizer"
        )
    raise ValueError(
        f"{job.tokens.path} gave id {ids[place]} for document {document}, but its "
        f"vocabulary has {vocab_size} tokens: its tokenizer.json is wrong"
    )


def _synthetic(job: PartJob) -> Iterator[_Batch]:
    assert job.piece.stop is not None
    for block in range(job.piece.start, job.piece.stop):
        made = synthetic.documents(job.tokens.vocab_size, job.seed, block)
        lengths = np.array([len(tokens) for tokens in made.tokens], dtype=np.int64)
        nothing = np.zeros(len(lengths), dtype=np.int64)
        documents = _Documents(
            readers.binary([name.encode() for name in made.ids]),
            readers.strings([""] * len(lengths)),
            np.arange(len(lengths)),
            nothing,
            nothing.astype(np.uint64),
            lengths,
        )
        yield _end_to_end(documents, [tokens[:-1] for tokens in made.tokens])


def _hashes(texts: Sequence[str], count: int) -> npt.NDArray[np.uint64]:
    if not texts:
        return np.zeros(count, dtype=np.uint64)
    digests = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(b"".join(digests), dtype=np.uint64)


class _Known:
    """Hashes of texts that have come before."""

    def __init__(self, earlier: Iterable[Path]) -> None:
        columns = [
            pq.read_table(path / DOCUMENTS, columns=["text_hash"]).column(0).to_numpy()
            for path in earlier
        ]
        self._earlier = np.unique(np.concatenate([*columns, np.empty(0, np.uint64)]))
        self._here: set[int] = set()

    def add(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Which of them are new."""
        new = ~np.isin(hashes, self._earlier)
        for place in np.flatnonzero(new).tolist():
            value = int(hashes[place])
            new[place] = value not in self._here
            self._here.add(value)
        return new


def _ahead(source: Iterator[T]) -> Iterator[T]:
    """The items of `source`, made by a thread that runs a little ahead.

    So reading waits for disk or network while tokens are made and rows are packed.
    """
    ready: queue.Queue[T | BaseException | None] = queue.Queue(maxsize=_AHEAD)
    given_up = threading.Event()

    def put(item: T | BaseException | None) -> None:
        while not given_up.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def run() -> None:
        try:
            for item in source:
                put(item)
                if given_up.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)

    threading.Thread(target=run, name="ahead", daemon=True).start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        given_up.set()


def _sound(ids: pa.BinaryArray) -> pa.StringArray:
    try:
        return ids.cast(pa.string())
    except pa.ArrowInvalid:
        return readers.strings(i.decode("utf-8", "surrogatepass") for i in ids.to_pylist())


class _Recorder:
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

    def __enter__(self) -> "_Recorder":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._work.put(None)
        self._thread.join()


class _Memory(threading.local):
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


_memory = _Memory()


class _SplitWriter:
    """Packs the documents of one split, window by window, and writes its rows and its table."""

    def __init__(
        self,
        folder: Path,
        split: Split,
        job: PartJob,
        table: pq.ParquetWriter,
        files: "_Recorder",
    ) -> None:
        self._recorder = files
        self._folder, self._split, self._table = folder, split, table
        self._layout, self._fill = job.layout, job.tokens.end_of_text
        self._pack = packing.PACKINGS[job.layout.packing]
        self._shard_rows = max(1, _SHARD_TOKENS // job.layout.row_tokens)
        # a window of documents up to a row long leaves hardly any room in its rows
        self._rows = self._empty(self._shard_rows + 2 * _WINDOW_TOKENS[1] // job.layout.row_tokens)
        self._written: Future[dict[str, Any]] | None = None
        self._filled = self._files = 0
        self._window: list[_Batch] = []
        self._documents_held = self._tokens_held = 0
        self._counts = SplitCounts()

    def add(self, batch: _Batch) -> None:
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
        documents = _joined([batch.documents for batch in self._window])
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

    def _tabulate(self, documents: _Documents, pieces: Pieces) -> None:
        """Write the lines of the table for a window whose rows come next."""
        ids, urls = _sound(documents.ids), documents.urls
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
            self._table.write_batch(pa.RecordBatch.from_arrays(columns, schema=_SCHEMA))

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
