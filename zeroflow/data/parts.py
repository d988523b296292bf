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
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
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


class _Batch(NamedTuple):
    """Tokenised documents, in columns."""

    ids: pa.BinaryArray
    urls: pa.StringArray
    text_bytes: Ids
    hashes: npt.NDArray[np.uint64]
    tokens: list[Tokens]
    """Of each document, without its end of text."""

    lengths: Ids
    """Tokens of each document, with its end of text."""

    def only(self, chosen: npt.NDArray[np.bool_]) -> "_Batch":
        if chosen.all():
            return self
        places = np.flatnonzero(chosen)
        taken = _numbers(places, pa.int64())
        return _Batch(
            self.ids.take(taken),
            self.urls.take(taken),
            self.text_bytes[places],
            self.hashes[places],
            [self.tokens[place] for place in places.tolist()],
            self.lengths[places],
        )


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
        artifacts.seal(partial, {"facts": _write(partial, job).model_dump(mode="json")})

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


def _write(folder: Path, job: PartJob) -> PartFacts:
    tally, duplicates = Tally(), 0
    with_hashes = job.corpus.deduplicate and job.tokens.path is not None
    known = _Known(job.earlier) if with_hashes else None
    with pq.ParquetWriter(folder / DOCUMENTS, _SCHEMA, compression="zstd") as table:
        writers = {split: _SplitWriter(folder, split, job, table) for split in SPLITS}
        for batch in _tokenized(job, tally):
            if known:
                new = known.add(batch.hashes)
                duplicates += len(new) - int(new.sum())
                batch = batch.only(new)
            held_out = corpus.held_out(batch.ids.to_pylist()) < job.held_out_below
            writers["train"].add(batch.only(~held_out))
            few = batch.only(held_out)
            # they wait long for a window, and would keep the tokens of all others
            writers["validation"].add(few._replace(tokens=[ids.copy() for ids in few.tokens]))
        counts = {split: writer.finish() for split, writer in writers.items()}
    return PartFacts(
        **counts,
        empty_documents=tally.empty,
        duplicates=duplicates,
        bad_lines=tally.bad,
        bad_places=tuple(tally.places),
    )


def _tokenized(job: PartJob, tally: Tally) -> Iterator[_Batch]:
    if job.tokens.path is None:
        yield from _synthetic(job)
        return
    encoder = tokenizer.encoder(job.tokens)
    for read in _ahead(corpus.read(job.corpus, job.piece, tally)):
        ids, lengths = encoder.encode(read.texts)
        _check(job, ids, lengths, read)
        ends = np.cumsum(lengths)
        bounds = zip((ends - lengths).tolist(), ends.tolist(), strict=True)
        batch = _Batch(
            read.ids,
            read.urls,
            read.text_bytes,
            _hashes(read.texts if job.corpus.deduplicate else (), len(lengths)),
            [ids[begin:end] for begin, end in bounds],
            lengths + 1,
        )
        if not lengths.all():  # text that the tokenizer makes nothing of
            tally.empty += int((lengths == 0).sum())
            batch = batch.only(lengths > 0)
        yield batch


def _check(job: PartJob, ids: Tokens, lengths: Ids, read: readers.Batch) -> None:
    end_of_text, vocab_size = job.tokens.end_of_text, job.tokens.vocab_size
    if ids.max(initial=0) < vocab_size and not (ids == end_of_text).any():
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
        yield _Batch(
            readers.binary([name.encode() for name in made.ids]),
            pa.repeat("", len(lengths)),
            nothing,
            nothing.astype(np.uint64),
            [tokens[:-1] for tokens in made.tokens],
            lengths,
        )


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


def _numbers(values: npt.NDArray[Any], kind: pa.DataType) -> pa.Array:
    buffer = pa.py_buffer(np.ascontiguousarray(values, dtype=str(kind)))
    return pa.Array.from_buffers(kind, len(values), [None, buffer])


def _sound(ids: pa.BinaryArray) -> pa.StringArray:
    try:
        return ids.cast(pa.string())
    except pa.ArrowInvalid:
        return readers.strings(i.decode("utf-8", "surrogatepass") for i in ids.to_pylist())


class _SplitWriter:
    """Packs the documents of one split, window by window, and writes its rows and its table."""

    def __init__(self, folder: Path, split: Split, job: PartJob, table: pq.ParquetWriter) -> None:
        self._folder, self._split, self._table = folder, split, table
        self._layout, self._fill = job.layout, job.tokens.end_of_text
        self._pack = packing.PACKINGS[job.layout.packing]
        self._shard_rows = max(1, _SHARD_TOKENS // job.layout.row_tokens)
        # a window of documents up to a row long leaves hardly any room in its rows
        self._rows = self._empty(self._shard_rows + 2 * _WINDOW_TOKENS[1] // job.layout.row_tokens)
        self._filled = self._files = 0
        self._window: list[_Batch] = []
        self._documents = self._tokens = 0
        self._counts = SplitCounts()

    def add(self, batch: _Batch) -> None:
        if not len(batch.lengths):
            return
        self._window.append(batch)
        self._documents += len(batch.lengths)
        self._tokens += int(batch.lengths.sum())
        enough, many = _WINDOW_TOKENS
        if (self._documents >= _WINDOW_DOCUMENTS and self._tokens >= enough) or (
            self._tokens >= many
        ):
            self._close_window()

    def finish(self) -> SplitCounts:
        if self._window:
            self._close_window()
        if self._filled:
            self._write(self._filled)
        return self._counts

    def _close_window(self) -> None:
        columns = zip(*self._window, strict=True)
        self._window, self._documents, self._tokens = [], 0, 0
        ids, urls, text_bytes, hashes, tokens, lengths = columns
        window = _Batch(
            pa.concat_arrays(ids),
            pa.concat_arrays(urls),
            np.concatenate(text_bytes),
            np.concatenate(hashes),
            list(chain.from_iterable(tokens)),
            np.concatenate(lengths),
        )
        pieces = self._pack(window.lengths, self._layout.row_tokens)
        self._tabulate(window, pieces)
        tokens_held = int(window.lengths.sum())
        self._counts += SplitCounts(
            rows=pieces.rows,
            documents=len(window.lengths),
            document_tokens=tokens_held,
            padding_tokens=pieces.rows * self._layout.row_tokens - tokens_held,
            cut_documents=len(np.unique(pieces.document[pieces.start > 0])),
            text_bytes=int(window.text_bytes.sum()),
        )
        packing.lay_out(window.tokens, pieces, self._room(pieces.rows))
        while self._filled >= self._shard_rows:
            self._write(self._shard_rows)

    def _tabulate(self, window: _Batch, pieces: Pieces) -> None:
        """Write the lines of the table for a window whose rows come next."""
        ids = _sound(window.ids)
        longest = max(pc.max(pc.binary_length(names)).as_py() for names in (ids, window.urls))
        at_once = max(1, _MOST_NAME_BYTES // max(1, longest))  # every piece repeats them
        for begin in range(0, len(pieces.document), at_once):
            some = slice(begin, begin + at_once)
            document = pieces.document[some]
            named = _numbers(document, pa.int64())
            columns = [
                ids.take(named),
                window.urls.take(named),
                pa.repeat(self._split, len(document)),
                _numbers(pieces.row[some] + self._counts.rows, pa.int64()),
                _numbers(pieces.offset[some], pa.int32()),
                _numbers(pieces.start[some], pa.int64()),
                _numbers(pieces.tokens[some], pa.int32()),
                _numbers(window.text_bytes[document], pa.int64()),
                _numbers(window.hashes[document], pa.uint64()),
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
        """Memory from the system, taken page by page as it is filled, and given back at the end.

        The allocator would keep such large pieces, in one arena for each thread.
        """
        width, kind = self._layout.row_tokens, np.dtype(self._layout.token_type)
        size = rows * width * kind.itemsize
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if huge_pages := getattr(mmap, "MADV_HUGEPAGE", None):  # of Linux: fewer are to be taken
            memory.madvise(huge_pages)
        return np.frombuffer(memory, dtype=kind).reshape(rows, width)

    def _write(self, rows: int) -> None:
        """Write the first rows to a file; those behind them move up."""
        item = pa.field("item", pa.type_for_alias(self._layout.token_type), nullable=False)
        flat = _numbers(self._rows[:rows].reshape(-1), item.type)
        list_type = pa.list_(item, self._layout.row_tokens)
        column = pa.FixedSizeListArray.from_arrays(flat, type=list_type)
        schema = pa.schema([pa.field("tokens", list_type, nullable=False)])
        file = self._folder / f"{self._split}-{self._files:05d}.arrow"
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(pa.record_batch([column], schema=schema))
        self._files += 1
        self._filled -= rows
        self._rows[: self._filled] = self._rows[rows : rows + self._filled].copy()
