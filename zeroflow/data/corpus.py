"""Streams of documents by name: FineWeb-Edu, own files, the sample every machine has, synthetic.

`resolve` turns what a user asked for into what the bytes depend on, once; `documents` reads it.
"""

import glob
import hashlib
import io
import json
import logging
import lzma
import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, Self, cast

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import model_validator

from zeroflow.config import Config
from zeroflow.data import hub

log = logging.getLogger(__name__)

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"

_READ_ROWS = 1000
_SUFFIXES = (".txt", ".jsonl", ".parquet")
_COMPRESSED = (".gz", ".bz2", ".zst", ".lz4", ".xz")
# What the decompressors, the Parquet reader and UTF-8 raise; none of them names the file
_UNREADABLE = (OSError, EOFError, lzma.LZMAError, pa.ArrowException, UnicodeDecodeError)


class Document(NamedTuple):
    id: str
    text: str
    url: str = ""


class CorpusConfig(Config):
    """Where the text comes from."""

    data_mode: Literal["auto", "fineweb", "files", "sample", "synthetic"] = "auto"
    """fineweb: FineWeb-Edu from the Hugging Face Hub. files: your own, see data_path. sample:
    source files of Python's standard library, on every machine. synthetic: generated token ids.
    auto: fineweb when the hub answers within a few seconds, otherwise sample."""

    fineweb_subset: str = "sample-10BT"
    """Configuration of FineWeb-Edu, such as sample-10BT, sample-100BT or CC-MAIN-2024-10."""

    data_path: tuple[str, ...] = ()
    """Files or globs of .txt (a document each), .jsonl or .parquet, also compressed (.gz .bz2
    .zst .lz4 .xz)."""

    text_column: str = "text"
    """Field of .jsonl lines or column of .parquet files that holds the text."""

    allow_synthetic_fallback: bool = False
    """Fall back to synthetic, loudly, when FineWeb-Edu cannot be reached."""

    data_revision: str | None = None
    """Commit of the dataset on the hub, or the digest of the files; found once, then recorded."""

    @model_validator(mode="after")
    def _paths_belong_to_files(self) -> Self:
        if self.data_mode == "files" and not self.data_path:
            raise ValueError("data_mode files needs data_path: name files or globs")
        if self.data_path and self.data_mode != "files":
            raise ValueError(
                f"data_path is read in data_mode files only, not in {self.data_mode}: "
                "add --data-mode files"
            )
        if self.allow_synthetic_fallback and self.data_mode in ("files", "sample"):
            raise ValueError(
                f"allow_synthetic_fallback belongs to fineweb; {self.data_mode} needs no hub"
            )
        return self

    @property
    def name(self) -> str:
        """Short readable name for directories, tags and reports."""
        return {"fineweb": f"fineweb-edu-{self.fineweb_subset}"}.get(self.data_mode, self.data_mode)


class Resolved(NamedTuple):
    corpus: CorpusConfig
    reason: str


def resolve(config: CorpusConfig) -> Resolved:
    """Settle `auto` and the revision.

    Raises:
        hub.HubError: fineweb was asked for and the hub refused or was out of reach.
        ValueError: files were asked for and none matches, or they are not those of
            `data_revision`.
    """
    if config.data_mode in ("files", "sample"):
        return Resolved(_pin_files(config), "asked for")
    if config.data_mode == "synthetic":
        return Resolved(config, "asked for")
    auto = config.data_mode == "auto"
    try:
        return Resolved(_pin_fineweb(config), "the hub answers" if auto else "asked for")
    except hub.HubError as error:
        if config.allow_synthetic_fallback:
            fallback = config.replace(data_mode="synthetic")
            return Resolved(fallback, f"SYNTHETIC FALLBACK, no real text: {error}")
        if auto:
            sample = _pin_files(config.replace(data_mode="sample"))
            return Resolved(sample, f"FineWeb-Edu is out of reach: {error.cause}")
        raise error.with_remedies(
            "`hf auth login` if it asks for an account",
            "`--data-mode sample` to work without the hub",
            "`--allow-synthetic-fallback` to train on synthetic data instead",
        ) from error


def identity(config: CorpusConfig) -> dict[str, Any]:
    """What the documents of a resolved text corpus depend on."""
    facts: dict[str, Any] = {"source": config.data_mode, "revision": config.data_revision}
    if config.data_mode == "fineweb":
        facts |= {"dataset": FINEWEB_EDU, "subset": config.fineweb_subset}
    if config.data_mode == "files":
        facts |= {"text_column": config.text_column}
    return facts


def documents(config: CorpusConfig) -> Iterator[Document]:
    """The documents of a resolved text corpus, always in the same order; empty ones left out.

    Raises:
        ValueError: a file does not hold what its name promises; names file and place.
        hub.HubError: the hub failed in mid-stream.
    """
    read = {"fineweb": _fineweb, "files": _files, "sample": _sample}[config.data_mode]
    return (document for document in read(config) if document.text)


def held_out(document_id: str) -> float:
    """Place of a document in [0, 1), from its id alone; validation takes the lowest."""
    digest = hashlib.sha256(document_id.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8]) / 2**64


# FineWeb-Edu


def _pin_fineweb(config: CorpusConfig) -> CorpusConfig:
    revision = config.data_revision or hub.dataset_revision(FINEWEB_EDU)
    return config.replace(data_mode="fineweb", data_revision=revision)


def _fineweb(config: CorpusConfig) -> Iterator[Document]:
    assert config.data_revision, "resolve() pins the revision"
    tables = hub.stream(
        FINEWEB_EDU,
        config.fineweb_subset,
        revision=config.data_revision,
        columns=["id", "text", "url"],
        rows=_READ_ROWS,
    )
    for table in tables:
        for row in table.to_pylist():
            yield Document(row["id"], row["text"] or "", row["url"] or "")


# Files


def _pin_files(config: CorpusConfig) -> CorpusConfig:
    """Set the revision to a digest of names and contents."""
    paths = _sample_paths() if config.data_mode == "sample" else _matching(config.data_path)
    digest = hashlib.sha256()
    for name, path in paths:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{name}\n{content}\n".encode())
    revision = digest.hexdigest()[:16]
    if config.data_revision not in (None, revision):
        raise ValueError(
            f"the files of {config.name} have changed: their digest is {revision}, the run was "
            f"started with {config.data_revision}. Restore them, or use another --run-name"
        )
    return config.replace(data_revision=revision)


def _matching(patterns: tuple[str, ...]) -> list[tuple[str, Path]]:
    """Name and path of every file, sorted by name; names start below the common folder."""
    paths: set[Path] = set()
    for pattern in patterns:
        found = [Path(p) for p in glob.glob(str(Path(pattern).expanduser()), recursive=True)]
        if not (files := [path.resolve() for path in found if path.is_file()]):
            raise ValueError(f"--data-path {pattern} matches no file in {Path.cwd()}")
        paths.update(files)
    for path in paths:
        _kind(path)
    common = Path(os.path.commonpath([path.parent for path in paths]))
    return sorted((path.relative_to(common).as_posix(), path) for path in paths)


def _kind(path: Path) -> str:
    suffixes = path.suffixes
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes = suffixes[:-1]
    if not suffixes or suffixes[-1] not in _SUFFIXES:
        raise ValueError(
            f"{path}: cannot tell what it holds; known are {', '.join(_SUFFIXES)}, "
            f"each also with {', '.join(_COMPRESSED)}"
        )
    return suffixes[-1]


def _files(config: CorpusConfig) -> Iterator[Document]:
    readers = {".txt": _read_text, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    for name, path in _matching(config.data_path):
        try:
            yield from readers[_kind(path)](name, path, config.text_column)
        except _UNREADABLE as error:
            raise ValueError(f"{path} cannot be read: {error}") from error


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".xz":
        return cast(IO[bytes], lzma.open(path))
    return pa.input_stream(str(path), compression="detect")


def _read_text(name: str, path: Path, column: str) -> Iterator[Document]:
    with _open(path) as file:
        yield Document(name, file.read().decode("utf-8"))


def _read_jsonl(name: str, path: Path, column: str) -> Iterator[Document]:
    with _open(path) as file:
        for number, line in enumerate(io.TextIOWrapper(file, encoding="utf-8"), start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                fields = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{place} is not JSON: {error}") from error
            if not isinstance(fields, dict) or not isinstance(fields.get(column), str):
                found = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
                raise ValueError(
                    f"{place} has no text in field {column!r}, only {found}: set --text-column"
                )
            document_id = fields.get("id")
            url = fields.get("url")
            yield Document(
                document_id if isinstance(document_id, str) else f"{name}:{number}",
                fields[column],
                url if isinstance(url, str) else "",
            )


def _read_parquet(name: str, path: Path, column: str) -> Iterator[Document]:
    with _open(path) as stream:
        # Parquet is read from its end, which a compressed stream cannot reach
        source = pa.BufferReader(stream.read()) if path.suffix in _COMPRESSED else str(path)
        with pq.ParquetFile(source, memory_map=True) as file:
            present = file.schema_arrow.names
            if column not in present:
                raise ValueError(
                    f"{path} has no column {column!r}, only {present}: set --text-column"
                )
            columns = [column, *(c for c in ("id", "url") if c in present and c != column)]
            number = 0
            for batch in file.iter_batches(batch_size=_READ_ROWS, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    text = row[column] or ""
                    if not isinstance(text, str):
                        raise ValueError(
                            f"{path}, row {number} has {type(text).__name__} in column {column!r}, "
                            "no text: set --text-column"
                        )
                    document_id = str(row.get("id") or f"{name}:{number}")
                    yield Document(document_id, text, str(row.get("url") or ""))


# Sample


def _sample_paths() -> list[tuple[str, Path]]:
    library = Path(sysconfig.get_path("stdlib"))
    found = (
        (path.relative_to(library).as_posix(), path)
        for path in library.rglob("*.py")
        if not {"site-packages", "dist-packages"}.intersection(path.parts)
    )
    # Keyed order: neighbours in the alphabet are about one subject, a short run needs them all
    return sorted(found, key=lambda item: hashlib.sha256(item[0].encode()).digest())


def _sample(config: CorpusConfig) -> Iterator[Document]:
    for name, path in _sample_paths():
        try:
            yield Document(name, path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue  # the library's tests hold a few files that are wrong on purpose


def first_bytes(stream: Iterable[Document], limit: int) -> Iterator[str]:
    """Texts of documents that are not held out, until `limit` bytes have been passed on."""
    passed = 0
    for document in stream:
        if passed >= limit:
            return
        passed += len(document.text.encode("utf-8", "surrogatepass"))
        yield document.text
