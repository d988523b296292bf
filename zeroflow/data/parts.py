"""One part of a shard set: a slice of the corpus, tokenised, packed and written.

A part depends on its slice and the settings alone, on no other part. So parts may be built in any
order, by any number of processes at once, and a killed build loses no more than the one at hand.
"""

import errno
import hashlib
import logging
import os
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from zeroflow import artifacts
from zeroflow.data import readers, synthetic
from zeroflow.data.columns import DocumentBatch, DocumentColumns, end_to_end, sound_ids
from zeroflow.data.corpus import read_slice, split_positions
from zeroflow.data.packing import Ids, Tokens
from zeroflow.data.part_facts import DOCUMENTS, SPLITS, BuiltPart, PartFacts, PartJob
from zeroflow.data.readers import Tally
from zeroflow.data.split_writer import SCHEMA, FileWriter, SplitWriter

log = logging.getLogger(__name__)


_AHEAD = 3


T = TypeVar("T")


def existing(path: Path) -> PartFacts | None:
    """The facts of a part that is there and whole."""
    if not path.exists():
        return None
    try:
        return PartFacts.model_validate(artifacts.verify(path)["facts"])
    except artifacts.DamagedArtifact:
        return None  # `build` sets it aside under the lock


def build_part(job: PartJob) -> BuiltPart:
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
    with_hashes = job.corpus.deduplicate and job.tokenizer.path is not None
    known = _SeenTexts(job.earlier) if with_hashes else None
    with (
        FileWriter() as files,
        pa.OSFile(str(folder / DOCUMENTS), "wb") as sink,  # which is closed even on a full disk
        pq.ParquetWriter(sink, SCHEMA, compression="zstd") as table,
    ):
        writers = {split: SplitWriter(folder, split, job, table, files) for split in SPLITS}
        for batch in _tokenized(job, tally):
            if known:
                new = known.add(batch.documents.hashes)
                duplicates += len(new) - int(new.sum())
                batch = batch.only(new)
            documents = batch.documents
            places = split_positions(documents.ids.to_pylist())[documents.named]
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


def _tokenized(job: PartJob, tally: Tally) -> Iterator[DocumentBatch]:
    if job.tokenizer.path is None:
        yield from _synthetic(job)
        return
    encoder = job.tokenizer.load_encoder()
    for read in _ahead(read_slice(job.corpus, job.piece, tally)):
        ids, lengths = encoder.encode(read.texts)
        _check(job, ids, lengths, read)
        documents = DocumentColumns(
            read.ids,
            read.urls,
            np.arange(len(lengths)),
            read.text_bytes,
            _hashes(read.texts if job.corpus.deduplicate else (), len(lengths)),
            lengths + 1,
        )
        batch = DocumentBatch(documents, ids, np.cumsum(lengths) - lengths)
        if not lengths.all():  # text that the tokenizer makes nothing of
            tally.empty += int((lengths == 0).sum())
            batch = batch.only(lengths > 0)
        yield batch


def _check(job: PartJob, ids: Tokens, lengths: Ids, read: readers.Batch) -> None:
    end_of_text, vocab_size = job.tokenizer.end_of_text, job.tokenizer.vocab_size
    highest = ids.max(initial=0)
    if highest < vocab_size and (highest < end_of_text or not (ids == end_of_text).any()):
        return
    place = int(((ids >= vocab_size) | (ids == end_of_text)).argmax())
    number = int(np.searchsorted(np.cumsum(lengths), place, side="right"))
    document = sound_ids(read.ids[number : number + 1])[0].as_py()
    if ids[place] == end_of_text:
        raise ValueError(
            f"document {document} spells out the token that ends documents, and this "
            "tokenizer cannot tell the two apart: name another with --end-of-text, or use "
            "another tokenizer"
        )
    raise ValueError(
        f"{job.tokenizer.path} gave id {ids[place]} for document {document}, but its "
        f"vocabulary has {vocab_size} tokens: its tokenizer.json is wrong"
    )


def _synthetic(job: PartJob) -> Iterator[DocumentBatch]:
    assert job.piece.stop is not None
    for block in range(job.piece.start, job.piece.stop):
        made = synthetic.documents(job.tokenizer.vocab_size, job.seed, block)
        lengths = np.array([len(tokens) for tokens in made.tokens], dtype=np.int64)
        nothing = np.zeros(len(lengths), dtype=np.int64)
        documents = DocumentColumns(
            readers.binary([name.encode() for name in made.ids]),
            readers.strings([""] * len(lengths)),
            np.arange(len(lengths)),
            nothing,
            nothing.astype(np.uint64),
            lengths,
        )
        yield end_to_end(documents, [tokens[:-1] for tokens in made.tokens])


def _hashes(texts: Sequence[str], count: int) -> npt.NDArray[np.uint64]:
    if not texts:
        return np.zeros(count, dtype=np.uint64)
    digests = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(b"".join(digests), dtype=np.uint64)


class _SeenTexts:
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
