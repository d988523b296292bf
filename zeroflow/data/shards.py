"""Rows of tokens on disk: Arrow IPC files with a manifest, and their memory-mapped reader.

A shard set is a directory with

    train-00000.arrow ...      rows to train on
    validation-00000.arrow ... rows of documents that no training row contains
    documents.parquet          every document: id, url, split, row, offset, tokens, bytes
    manifest.json              settings, source, tokenizer, counts, sha256 of every file

Each Arrow file is one record batch with one column `tokens`, a non-null, uncompressed
`FixedSizeList` of `row_tokens` ids: plain pyarrow maps it into memory and reads any row at once.
`row` and `offset` in documents.parquet are the place of the document's first token in its split;
documents follow each other without a gap, over the ends of rows and files.
"""

import logging
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, NonNegativeInt, PositiveInt

from zeroflow import artifacts
from zeroflow.config import Config
from zeroflow.data import corpus, synthetic, tokenizer
from zeroflow.data.corpus import CorpusConfig
from zeroflow.data.packing import Concatenation, Tokenized
from zeroflow.data.tokenizer import TokenizerFiles

log = logging.getLogger(__name__)

Split = Literal["train", "validation"]

_FORMAT = 1
_SHARD_TOKENS = 2**24
_LEAST_TRAIN_TOKENS = 2**21
_LEAST_VALIDATION_TOKENS = 2**16
"""Built even if a short run needs fewer: its rows are then of many documents, and runs of
different lengths share their shards."""

_FIRST_WINDOW = 1000
"""Documents looked at before validation is known to have any."""


class ShardConfig(Config):
    """How tokens are packed and held out."""

    seq_len: int = Field(ge=2)
    """Tokens of context. A row has one more, as targets are shifted by one."""

    train_rows: PositiveInt
    """Rows that the run trains on."""

    validation_rows: PositiveInt
    """Rows that the run validates on, of documents of which no token is trained on."""

    validation_fraction: float = Field(0.02, gt=0, lt=1)
    """Share of the documents that is kept for validation; the first of them are used."""

    token_type: Literal["int32", "uint16"] = "int32"
    """Integer type on disk; uint16 takes half the space, for vocabularies up to 65,536."""

    @property
    def row_tokens(self) -> int:
        return self.seq_len + 1


class ShardSet(Config):
    """A complete directory of shards."""

    path: Path
    reused: bool
    train_rows: PositiveInt
    validation_rows: PositiveInt
    row_tokens: int
    documents: int
    validation_bytes_per_token: float | None
    """UTF-8 bytes per token of the validation documents; None for synthetic data."""

    entropy: float | None
    """Nats per token that no model can go below, where the source's entropy is known."""


def build(
    config: ShardConfig,
    text: CorpusConfig,
    tokens: TokenizerFiles,
    cache: Path,
    *,
    seed: NonNegativeInt = 0,
) -> ShardSet:
    """Have rows of the resolved corpus `text` under `<cache>/shards/`, built only if need be.

    A corpus that ends earlier gives the rows it has.

    Args:
        seed: of synthetic data.

    Raises:
        ValueError: ids do not fit the integer type, or the corpus is too small to hold out a
            document and fill a row.
    """
    highest = np.iinfo(config.token_type).max
    if tokens.vocab_size - 1 > highest:
        raise ValueError(
            f"{tokens.name} has {tokens.vocab_size} tokens, more than {config.token_type} holds "
            f"(ids up to {highest}): use --token-type int32"
        )
    identity = {
        "format": _FORMAT,
        "corpus": _identity(text, tokens, seed),
        "tokenizer": tokens.fingerprint,
        "packing": "concatenate",
        "row_tokens": config.row_tokens,
        "token_type": config.token_type,
        "train_rows": max(config.train_rows, _LEAST_TRAIN_TOKENS // config.row_tokens),
        "validation_rows": max(
            config.validation_rows, _LEAST_VALIDATION_TOKENS // config.row_tokens
        ),
        "validation_fraction": config.validation_fraction,
    }
    name = f"{text.name}-{config.seq_len}-{artifacts.fingerprint(identity)}"
    path = cache / "shards" / name

    def write(partial: Path) -> None:
        log.info(
            "building %d + %d rows of %d tokens from %s",
            identity["train_rows"],
            identity["validation_rows"],
            config.row_tokens,
            text.name,
        )
        documents = _documents(text, tokens, seed)
        writers = _write(partial, documents, identity, highest_id=tokens.vocab_size - 1)
        counts = {split: writer.counts() for split, writer in writers.items()}
        facts = {"identity": identity, "source": text.model_dump(mode="json"), "splits": counts}
        entropy = synthetic.entropy_rate(tokens.vocab_size) if tokens.path is None else None
        artifacts.seal(partial, facts | {"tokenizer": tokens.name, "entropy": entropy})

    reused = artifacts.build_once(path, write)
    shards = describe(path, reused=reused)
    log.info(
        "shards %s: %d + %d rows of %d tokens from %d documents: %s",
        "reused" if reused else "built",
        shards.train_rows,
        shards.validation_rows,
        shards.row_tokens,
        shards.documents,
        path,
    )
    return shards


def describe(path: Path, *, reused: bool = True) -> ShardSet:
    """The description of a shard directory, from its manifest."""
    manifest = artifacts.read_json(path / artifacts.MANIFEST)
    train, validation = (manifest["splits"][split] for split in ("train", "validation"))
    with_text = validation["text_bytes"] > 0
    return ShardSet(
        path=path,
        reused=reused,
        train_rows=train["rows"],
        validation_rows=validation["rows"],
        row_tokens=manifest["identity"]["row_tokens"],
        documents=train["documents"] + validation["documents"],
        validation_bytes_per_token=(
            validation["text_bytes"] / validation["document_tokens"] if with_text else None
        ),
        entropy=manifest["entropy"],
    )


class Rows:
    """The rows of one split, memory-mapped: `rows[ids]` gives (len(ids), row_tokens) integers."""

    def __init__(self, path: Path, split: Split) -> None:
        files = sorted(path.glob(f"{split}-*.arrow"))
        if not files:
            raise FileNotFoundError(f"{path} holds no shard of split {split}")
        self._shards = [_map(file) for file in files]
        self._ends = np.cumsum([len(shard) for shard in self._shards])

    @property
    def row_tokens(self) -> int:
        return self._shards[0].shape[1]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.integer[Any]]:
        shard_ids = np.searchsorted(self._ends, ids, side="right")
        starts = self._ends - [len(shard) for shard in self._shards]
        rows = zip(shard_ids, ids, strict=True)
        return np.stack([self._shards[s][i - starts[s]] for s, i in rows])


def _map(file: Path) -> npt.NDArray[np.integer[Any]]:
    """The (rows, row_tokens) array of one Arrow file, without a copy."""
    column = pa.ipc.open_file(pa.memory_map(str(file))).get_batch(0).column(0)
    flat = column.flatten().to_numpy(zero_copy_only=True)
    return flat.reshape(-1, column.type.list_size)


class _SplitWriter:
    """Collects the rows of one split and writes a file whenever a shard's worth has come."""

    def __init__(self, folder: Path, split: Split, target_rows: int, identity: dict[str, Any]):
        self._folder, self.split, self._target = folder, split, target_rows
        self._packing = Concatenation(identity["row_tokens"])
        self._type = pa.type_for_alias(identity["token_type"])
        self._shard_rows = max(1, _SHARD_TOKENS // self._packing.row_tokens)
        self._rows = self._files = 0
        self._documents = self._document_tokens = self._text_bytes = 0

    @property
    def full(self) -> bool:
        return self._packing.rows >= self._target

    @property
    def has_row(self) -> bool:
        return self._packing.rows > 0

    def add(self, document: Tokenized) -> dict[str, Any]:
        """Append `document`; its line in documents.parquet."""
        place = self._packing.add(document.tokens)
        self._documents += 1
        self._document_tokens += len(document.tokens)
        self._text_bytes += document.text_bytes
        # a document may be longer than all that is wanted
        while self._packing.waiting >= self._shard_rows and self._rows < self._target:
            self._write(self._shard_rows)
        return {
            "id": document.id,
            "url": document.url,
            "split": self.split,
            "row": place.row,
            "offset": place.offset,
            "tokens": len(document.tokens),
            "bytes": document.text_bytes,
        }

    def finish(self) -> None:
        if left := min(self._packing.waiting, self._target - self._rows):
            self._write(left)

    def counts(self) -> dict[str, int]:
        return {
            "rows": self._rows,
            "tokens": self._rows * self._packing.row_tokens,
            "documents": self._documents,
            "document_tokens": self._document_tokens,
            "text_bytes": self._text_bytes,
        }

    def _write(self, rows: int) -> None:
        tokens = self._packing.take(min(rows, self._target - self._rows))
        item = pa.field("item", self._type, nullable=False)
        flat = pa.array(tokens.reshape(-1), type=self._type)
        column = pa.FixedSizeListArray.from_arrays(flat, type=pa.list_(item, tokens.shape[1]))
        schema = pa.schema([pa.field("tokens", column.type, nullable=False)])
        file = self._folder / f"{self.split}-{self._files:05d}.arrow"
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(pa.record_batch([column], schema=schema))
        self._rows += len(tokens)
        self._files += 1


_DOCUMENT_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("url", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("offset", pa.int32(), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
    ]
)


def _write(
    folder: Path, documents: Iterator[Tokenized], identity: dict[str, Any], *, highest_id: int
) -> dict[Split, _SplitWriter]:
    train = _SplitWriter(folder, "train", identity["train_rows"], identity)
    validation = _SplitWriter(folder, "validation", identity["validation_rows"], identity)
    lines: list[dict[str, Any]] = []
    table = folder / "documents.parquet"
    with pq.ParquetWriter(table, _DOCUMENT_SCHEMA, compression="zstd") as documents_table:

        def flush() -> None:
            documents_table.write_table(pa.Table.from_pylist(lines, schema=_DOCUMENT_SCHEMA))
            lines.clear()

        for document, held_out in _split(documents, identity):
            assert document.tokens.max() <= highest_id and document.tokens.min() >= 0
            writer = validation if held_out else train
            if not writer.full:
                lines.append(writer.add(document))
            if train.full and validation.full:
                break
            if len(lines) >= 10_000:
                flush()
        flush()
    for writer in (train, validation):
        writer.finish()
        if not writer.has_row:
            raise ValueError(
                f"the corpus is too small: its {writer.counts()['documents']} documents for "
                f"{writer.split} have {writer.counts()['document_tokens']} tokens, less than one "
                f"row of {identity['row_tokens']}. Give more documents (whole ones are held out "
                "for validation) or lower --seq-len"
            )
    return {"train": train, "validation": validation}


class _Assigned(NamedTuple):
    document: Tokenized
    held_out: bool


def _split(documents: Iterator[Tokenized], identity: dict[str, Any]) -> Iterator[_Assigned]:
    """Assign whole documents to validation by a hash of their id.

    Documents with the lowest hashes of the first window go to validation even above the fraction,
    until they fill a row, and the highest never does: a corpus of a few documents can be held out
    from as well.
    """
    window = list(islice(documents, _FIRST_WINDOW))
    order = sorted(window, key=lambda document: corpus.held_out(document.id))
    limit, filled = identity["validation_fraction"], 0
    for document in order[:-1]:
        if filled >= identity["row_tokens"]:
            break
        filled += len(document.tokens)
        limit = max(limit, np.nextafter(corpus.held_out(document.id), 1))
    if window:
        limit = min(limit, corpus.held_out(order[-1].id))
    for document in chain(window, documents):
        yield _Assigned(document, corpus.held_out(document.id) < limit)


def _identity(text: CorpusConfig, tokens: TokenizerFiles, seed: int) -> dict[str, Any]:
    if text.data_mode == "synthetic":
        return {"source": "synthetic", "seed": seed, "vocab_size": tokens.vocab_size}
    return corpus.identity(text)


def _documents(text: CorpusConfig, tokens: TokenizerFiles, seed: int) -> Iterator[Tokenized]:
    if text.data_mode == "synthetic":
        return synthetic.documents(tokens.vocab_size, seed)
    return tokenizer.encode(tokens, corpus.documents(text))
