"""Streams of documents by name: FineWeb-Edu and other datasets, own files, a sample, synthetic.

`resolve` turns what a user asked for into what the bytes depend on, once. A resolved corpus is a
list of files; `plan` cuts it into slices of about equal size, each of which `read` reads alone,
whatever came before it.
"""

import glob
import hashlib
import logging
import math
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from pydantic import NonNegativeInt, model_validator

from zeroflow.config import Config
from zeroflow.data import hub, readers, slices
from zeroflow.data.readers import Batch, Document, Source, Tally, is_compressed, kind
from zeroflow.data.slices import Planned, Slice, SourceFile

log = logging.getLogger(__name__)

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"

_COMPRESSION = 3
"""Text bytes for a byte on disk, assumed where a file is compressed."""


class CorpusConfig(Config):
    """Where the text comes from."""

    data_mode: Literal["auto", "fineweb", "hub", "files", "sample", "synthetic"] = "auto"
    """fineweb: FineWeb-Edu from the Hugging Face Hub. hub: another dataset there, see dataset.
    files: your own, see data_path. sample: source files of Python's standard library, on every
    machine. synthetic: generated token ids. auto: fineweb when the hub answers within a few
    seconds, otherwise sample."""

    fineweb_subset: str = "sample-10BT"
    """Configuration of FineWeb-Edu, such as sample-10BT, sample-100BT or CC-MAIN-2024-10."""

    dataset: str | None = None
    """Name of a dataset on the hub, for data_mode hub; its files are .parquet, .jsonl or .txt."""

    dataset_config: str | None = None
    """Configuration of that dataset. Default: its own."""

    data_path: tuple[str, ...] = ()
    """Files or globs of .txt (a document each), .jsonl or .parquet, also compressed (.gz .bz2
    .zst .lz4 .xz)."""

    text_column: str = "text"
    """Field of .jsonl lines or column of .parquet files that holds the text."""

    bad_lines_limit: NonNegativeInt = 0
    """Lines of .jsonl files without JSON or text that are left out, counted and told; one more
    ends the run."""

    deduplicate: bool = False
    """Leave out documents whose text has come before, byte for byte."""

    allow_synthetic_fallback: bool = False
    """Fall back from fineweb to synthetic, loudly, when FineWeb-Edu cannot be reached; auto has
    the sample for that."""

    data_revision: str | None = None
    """Commit of the dataset on the hub, or the digest of the files; found once, then recorded."""

    @model_validator(mode="after")
    def _settings_belong_to_the_mode(self) -> Self:
        if self.data_mode == "files" and not self.data_path:
            raise ValueError("data_mode files needs data_path: name files or globs")
        if self.data_path and self.data_mode != "files":
            raise ValueError(
                f"data_path is read in data_mode files only, not in {self.data_mode}: "
                "add --data-mode files"
            )
        if self.data_mode == "hub" and not self.dataset:
            raise ValueError("data_mode hub needs dataset: name one, as owner/name")
        if (self.dataset or self.dataset_config) and self.data_mode != "hub":
            raise ValueError(
                f"dataset is read in data_mode hub only, not in {self.data_mode}: "
                "add --data-mode hub"
            )
        return self

    @property
    def name(self) -> str:
        """Short readable name for directories, tags and reports."""
        if self.data_mode == "fineweb":
            return f"fineweb-edu-{self.fineweb_subset}"
        if self.data_mode == "hub":
            parts = (self.dataset_name.rsplit("/", 1)[-1], self.dataset_config)
            return "-".join(part for part in parts if part).lower()
        return self.data_mode

    @property
    def dataset_name(self) -> str:
        """On the hub."""
        return self.dataset or FINEWEB_EDU

    @property
    def subset(self) -> str | None:
        return self.fineweb_subset if self.data_mode == "fineweb" else self.dataset_config


class ResolvedCorpus(NamedTuple):
    corpus: CorpusConfig
    reason: str


def resolve_corpus(corpus: CorpusConfig) -> ResolvedCorpus:
    """Settle `auto` and the revision.

    Raises:
        hub.HubError: the hub was asked for and refused or was out of reach.
        ValueError: files were asked for and none matches, or they are not those of
            `data_revision`.
    """
    if corpus.data_mode in ("files", "sample"):
        return ResolvedCorpus(_pin_files(corpus), "asked for")
    if corpus.data_mode == "synthetic":
        return ResolvedCorpus(corpus, "asked for")
    auto = corpus.data_mode == "auto"
    try:
        return ResolvedCorpus(_pin_dataset(corpus), "the hub answers" if auto else "asked for")
    except hub.HubError as error:
        if corpus.allow_synthetic_fallback and not auto:
            fallback = CorpusConfig(data_mode="synthetic", allow_synthetic_fallback=True)
            return ResolvedCorpus(fallback, f"SYNTHETIC FALLBACK, no real text: {error}")
        if auto:
            sample = CorpusConfig(data_mode="sample", deduplicate=corpus.deduplicate)
            sample = _pin_files(sample)
            return ResolvedCorpus(sample, f"FineWeb-Edu is out of reach: {error.cause}")
        remedies = ["`hf auth login` if it asks for an account"]
        remedies += ["`--data-mode sample` to work without the hub"]
        if corpus.data_mode == "fineweb":
            remedies += ["`--allow-synthetic-fallback` to train on synthetic data instead"]
        raise error.with_remedies(*remedies) from error


def corpus_identity(corpus: CorpusConfig) -> dict[str, Any]:
    """What the documents of a resolved text corpus depend on."""
    facts: dict[str, Any] = {"source": corpus.data_mode, "revision": corpus.data_revision}
    if _on_the_hub(corpus):
        facts |= {"dataset": corpus.dataset_name, "subset": corpus.subset}
    if corpus.data_mode != "sample":
        facts |= {"text_column": corpus.text_column}
    return facts


def file_digests(corpus: CorpusConfig) -> dict[str, str]:
    """Of each local file of a resolved text corpus, by its name, as when the revision was found."""
    if _on_the_hub(corpus):
        return {}
    paths = _paths(corpus).items()
    return {name: _pinned[path].sha256[:12] for name, path in paths if path in _pinned}


def list_files(corpus: CorpusConfig) -> list[SourceFile]:
    """The files of a resolved text corpus, in the order in which they are read.

    Raises:
        hub.HubError: the hub refused or failed.
        ValueError: the dataset has no such configuration, or files of an unknown kind.
    """
    if _on_the_hub(corpus):
        assert corpus.data_revision, "resolve() pins the revision"
        found = hub.dataset_files(corpus.dataset_name, corpus.subset, revision=corpus.data_revision)
        listed = [SourceFile(name=file.name, size=file.size) for file in found]
    else:
        paths = _paths(corpus)
        listed = [SourceFile(name=n, size=path.stat().st_size) for n, path in paths.items()]
    for file in listed:
        kind(file.name)
    return listed


def plan_slices(corpus: CorpusConfig, listed: list[SourceFile], first: int) -> Planned:
    """The slices that begin with file number `first` of those `listed`.

    Large files are cut, at row groups or lines; what cannot be cut, a compressed file, is a slice
    whatever its size. Smaller ones are taken together.

    Raises:
        hub.HubError: the hub refused or failed.
        ValueError: a Parquet file is damaged.
    """
    if (cut := _cut(corpus, listed[first])) is not None:
        return Planned(cut, first + 1)
    together: list[SourceFile] = []
    held = 0
    for file in listed[first:]:
        if together and (held >= slices.SLICE_BYTES or _divisible(file)):
            break
        together.append(file)
        held += _text_bytes(file)
    return Planned([Slice(files=tuple(together))], first + len(together))


def read_slice(corpus: CorpusConfig, piece: Slice, tally: Tally) -> Iterator[Batch]:
    """The documents of a slice, always in the same order and batches; empty ones left out.

    Raises:
        ValueError: a file does not hold what its name promises, or more than `bad_lines_limit`
            lines are bad; names file and place.
        hub.HubError: the hub failed in mid-stream.
    """
    return readers.regrouped(_batches(corpus, piece, tally))


def _batches(corpus: CorpusConfig, piece: Slice, tally: Tally) -> Iterator[Batch]:
    for file in piece.files:
        source = _source(corpus, file)
        try:
            _require_unchanged(corpus, file)
            yield from readers.read(source, piece.start, piece.stop, tally)
        except readers.UNREADABLE as error:
            if isinstance(error, UnicodeDecodeError) and corpus.data_mode == "sample":
                continue  # the library's tests hold a few files that are wrong on purpose
            _require_unchanged(corpus, file)
            raise ValueError(f"{source.place} cannot be read: {error}") from error
        except ValueError:
            _require_unchanged(corpus, file)
            raise
        _require_unchanged(corpus, file)


def read_documents(corpus: CorpusConfig) -> Iterator[Document]:
    """All documents of a resolved text corpus, one after another."""
    listed, first = list_files(corpus), 0
    while first < len(listed):
        planned, first = plan_slices(corpus, listed, first)
        for piece in planned:
            for batch in read_slice(corpus, piece, Tally()):
                ids = (i.decode("utf-8", "surrogatepass") for i in batch.ids.to_pylist())
                yield from map(Document, ids, batch.texts, batch.urls.to_pylist())


def split_positions(ids: Iterable[bytes]) -> npt.NDArray[np.float64]:
    """Place of each document in [0, 1), from its id alone; validation takes the lowest."""
    digests = b"".join(hashlib.sha256(i).digest()[:8] for i in ids)
    return np.frombuffer(digests, ">u8") / 2.0**64


def first_bytes(stream: Iterable[Document], limit: int) -> Iterator[str]:
    """Texts of documents until `limit` bytes have been passed on."""
    passed = 0
    for document in stream:
        if passed >= limit:
            return
        passed += len(document.text.encode("utf-8", "surrogatepass"))
        yield document.text


# Files and their slices


def _on_the_hub(corpus: CorpusConfig) -> bool:
    return corpus.data_mode in ("fineweb", "hub")


def _pin_dataset(corpus: CorpusConfig) -> CorpusConfig:
    revision = corpus.data_revision or "main"
    if not re.fullmatch("[0-9a-f]{40}", revision):  # a branch goes on, a commit stays
        revision = hub.dataset_revision(corpus.dataset_name, revision)
    mode = "fineweb" if corpus.data_mode == "auto" else corpus.data_mode
    return corpus.replace(data_mode=mode, data_revision=revision)


def _pin_files(corpus: CorpusConfig) -> CorpusConfig:
    """Set the revision to a digest of names and contents."""
    _paths.cache_clear()  # files may have come since
    digest = hashlib.sha256()
    for name, path in _paths(corpus).items():
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{name}\n{content}\n".encode())
        _pinned[path] = _Pinned(content, _stamp(path))
    revision = digest.hexdigest()[:16]
    if corpus.data_revision not in (None, revision):
        raise ValueError(
            f"the files of {corpus.name} have changed: their digest is {revision}, the run was "
            f"started with {corpus.data_revision}. Restore them, or use another --run-name"
        )
    return corpus.replace(data_revision=revision)


class _Pinned(NamedTuple):
    sha256: str
    stamp: tuple[int, int]


_pinned: dict[Path, _Pinned] = {}
"""Each local file as it was when its content was made part of a revision, in this process."""


def _stamp(path: Path) -> tuple[int, int]:
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns


def _require_unchanged(corpus: CorpusConfig, file: SourceFile) -> None:
    """A local file has to be what it was when the revision was found.

    Also once it has been read: what was read may be of another content than the revision says.
    """
    if _on_the_hub(corpus):
        return
    path = _paths(corpus)[file.name]
    now, pinned = _stamp(path), _pinned.get(path)
    if now[0] != file.size or (pinned and now != pinned.stamp):
        raise ValueError(f"{path} has changed since the run began: run the same command again")


@lru_cache(maxsize=4)
def _paths(corpus: CorpusConfig) -> dict[str, Path]:
    """Path of every local file by its name in the corpus, in the order in which they are read."""
    return _sample_paths() if corpus.data_mode == "sample" else _matching(corpus.data_path)


def _sample_paths() -> dict[str, Path]:
    library = Path(sysconfig.get_path("stdlib"))
    found = (
        (path.relative_to(library).as_posix(), path)
        for path in library.rglob("*.py")
        if not {"site-packages", "dist-packages"}.intersection(path.parts)
    )
    # Keyed order: neighbours in the alphabet are about one subject, a short run needs them all
    return dict(sorted(found, key=lambda item: hashlib.sha256(item[0].encode()).digest()))


def _matching(patterns: tuple[str, ...]) -> dict[str, Path]:
    """Sorted by name; names start below the common folder."""
    paths: set[Path] = set()
    for pattern in patterns:
        plain = Path(pattern).expanduser()
        found = [plain] if plain.exists() else map(Path, glob.glob(str(plain), recursive=True))
        if not (matched := [path.resolve() for path in found if path.is_file()]):
            why = "is a folder: name its files, as in" if plain.is_dir() else "matches no file in"
            where = plain / "*.jsonl" if plain.is_dir() else Path.cwd()
            raise ValueError(f"--data-path {pattern} {why} {where}")
        paths.update(matched)
    for path in paths:
        kind(str(path))
        if not _is_utf8(str(path)):
            raise ValueError(
                f"--data-path: the name of {os.fsencode(path)!r} is not UTF-8: rename it"
            )
    common = Path(os.path.commonpath([path.parent for path in paths]))
    return dict(sorted((path.relative_to(common).as_posix(), path) for path in paths))


def _is_utf8(text: str) -> bool:
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


def _text_bytes(file: SourceFile) -> int:
    """What it holds, about."""
    dense = is_compressed(file.name) or kind(file.name) == ".parquet"
    return file.size * (_COMPRESSION if dense else 1)


def local_text_bytes(corpus: CorpusConfig) -> float:
    """All the text there is, about; infinite where the files are not here to be looked at."""
    if corpus.data_mode not in ("files", "sample"):
        return math.inf
    return sum(map(_text_bytes, list_files(corpus)))


def _divisible(file: SourceFile) -> bool:
    large = _text_bytes(file) > slices.SLICE_BYTES
    return large and not is_compressed(file.name) and kind(file.name) != ".txt"


def _cut(corpus: CorpusConfig, file: SourceFile) -> list[Slice] | None:
    """The slices of a large file; None for one that is not cut."""
    if not _divisible(file):
        return None
    if kind(file.name) == ".parquet":
        cuts = _row_group_cuts(corpus, file)
    else:
        cuts = [*range(0, file.size, slices.SLICE_BYTES), file.size]
    return [Slice(files=(file,), start=start, stop=stop) for start, stop in pairwise(cuts)]


def _row_group_cuts(corpus: CorpusConfig, file: SourceFile) -> list[int]:
    source = _source(corpus, file)
    try:
        _require_unchanged(corpus, file)
        sizes = readers.row_group_bytes(source)
    except readers.UNREADABLE as error:
        raise ValueError(f"{source.place} cannot be read: {error}") from error
    cuts, taken = [0], 0
    for number, size in enumerate(sizes, start=1):
        taken += size
        if taken >= slices.SLICE_BYTES or number == len(sizes):
            cuts.append(number)
            taken = 0
    return cuts


def _source(corpus: CorpusConfig, file: SourceFile) -> Source:
    remote = _on_the_hub(corpus)
    return Source(
        name=file.name,
        size=file.size,
        path=None if remote else _paths(corpus)[file.name],
        dataset=corpus.dataset_name if remote else "",
        revision=corpus.data_revision or "",
        text_column=corpus.text_column,
        bad_lines_limit=corpus.bad_lines_limit,
    )
