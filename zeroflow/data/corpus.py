"""Streams of documents by name: FineWeb-Edu and other datasets, own files, a sample, synthetic.

`resolve` turns what a user asked for into what the bytes depend on, once. A resolved corpus is a
list of files; `plan` cuts it into slices of about equal size, each of which `read` reads alone,
whatever came before it.
"""

import codecs
import glob
import hashlib
import io
import json
import logging
import lzma
import math
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, pairwise
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, Self, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import NonNegativeInt, model_validator

from zeroflow.config import Config
from zeroflow.data import hub
from zeroflow.data.hub import HubFile

log = logging.getLogger(__name__)

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"

SLICE_BYTES = 2**25
"""Text in a slice, about: what a killed build loses at most."""

_READ_ROWS = 1000
_READ_BYTES = 2**20
_SUFFIXES = (".txt", ".jsonl", ".parquet")
_ALSO = {".json": ".jsonl", ".ndjson": ".jsonl", ".py": ".txt"}  # .py of the sample
_COMPRESSED = (".gz", ".bz2", ".zst", ".lz4", ".xz")
_COMPRESSION = 3
"""Text bytes for a byte on disk, assumed where a file is compressed."""

_STRINGS = (pa.string(), pa.large_string(), pa.string_view())
_PLACES = 10
# What the decompressors, the Parquet reader and UTF-8 raise; none of them names the file
_UNREADABLE = (OSError, EOFError, lzma.LZMAError, pa.ArrowException, UnicodeDecodeError)


class Document(NamedTuple):
    id: str
    text: str
    url: str = ""


class Batch(NamedTuple):
    """Some documents, none of them empty, in columns."""

    ids: pa.BinaryArray
    """UTF-8, but for the lone surrogates that an id from JSON can hold."""

    urls: pa.StringArray
    texts: list[str]
    """Without surrogates."""

    text_bytes: npt.NDArray[np.int64]
    """Of each text in UTF-8."""


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


class SourceFile(Config):
    """A file of a corpus."""

    name: str
    """Within the corpus, the same on every machine."""

    size: NonNegativeInt
    """Bytes, as they are stored."""


class Slice(Config):
    """A piece of a corpus that is read alone."""

    files: tuple[SourceFile, ...] = ()
    """Whole files; a part of the only one where `stop` is set. None for synthetic data."""

    start: NonNegativeInt = 0
    """First row group of a .parquet file, first byte of a .jsonl file, first synthetic block."""

    stop: NonNegativeInt | None = None
    """One after the last."""


class Planned(NamedTuple):
    slices: list[Slice]
    next_file: int
    """Number of the first file that comes after them."""


@dataclass
class Tally:
    """What was left out in reading."""

    empty: int = 0
    bad: int = 0
    places: list[str] = field(default_factory=list)
    """Where the first bad lines are, and why they are bad."""


class Resolved(NamedTuple):
    corpus: CorpusConfig
    reason: str


def resolve(config: CorpusConfig) -> Resolved:
    """Settle `auto` and the revision.

    Raises:
        hub.HubError: the hub was asked for and refused or was out of reach.
        ValueError: files were asked for and none matches, or they are not those of
            `data_revision`.
    """
    if config.data_mode in ("files", "sample"):
        return Resolved(_pin_files(config), "asked for")
    if config.data_mode == "synthetic":
        return Resolved(config, "asked for")
    auto = config.data_mode == "auto"
    try:
        return Resolved(_pin_dataset(config), "the hub answers" if auto else "asked for")
    except hub.HubError as error:
        if config.allow_synthetic_fallback and not auto:
            fallback = CorpusConfig(data_mode="synthetic", allow_synthetic_fallback=True)
            return Resolved(fallback, f"SYNTHETIC FALLBACK, no real text: {error}")
        if auto:
            sample = CorpusConfig(data_mode="sample", deduplicate=config.deduplicate)
            sample = _pin_files(sample)
            return Resolved(sample, f"FineWeb-Edu is out of reach: {error.cause}")
        remedies = ["`hf auth login` if it asks for an account"]
        remedies += ["`--data-mode sample` to work without the hub"]
        if config.data_mode == "fineweb":
            remedies += ["`--allow-synthetic-fallback` to train on synthetic data instead"]
        raise error.with_remedies(*remedies) from error


def identity(config: CorpusConfig) -> dict[str, Any]:
    """What the documents of a resolved text corpus depend on."""
    facts: dict[str, Any] = {"source": config.data_mode, "revision": config.data_revision}
    if _on_the_hub(config):
        facts |= {"dataset": config.dataset_name, "subset": config.subset}
    if config.data_mode != "sample":
        facts |= {"text_column": config.text_column}
    return facts


def digests(config: CorpusConfig) -> dict[str, str]:
    """Of each local file of a resolved text corpus, by its name, as when the revision was found."""
    if _on_the_hub(config):
        return {}
    paths = _paths(config).items()
    return {name: _pinned[path].sha256[:12] for name, path in paths if path in _pinned}


def files(config: CorpusConfig) -> list[SourceFile]:
    """The files of a resolved text corpus, in the order in which they are read.

    Raises:
        hub.HubError: the hub refused or failed.
        ValueError: the dataset has no such configuration, or files of an unknown kind.
    """
    if _on_the_hub(config):
        assert config.data_revision, "resolve() pins the revision"
        found = hub.dataset_files(config.dataset_name, config.subset, revision=config.data_revision)
        listed = [SourceFile(name=file.name, size=file.size) for file in found]
    else:
        paths = _paths(config)
        listed = [SourceFile(name=n, size=path.stat().st_size) for n, path in paths.items()]
    for file in listed:
        _kind(file.name)
    return listed


def plan(config: CorpusConfig, listed: list[SourceFile], first: int) -> Planned:
    """The slices that begin with file number `first` of those `listed`.

    Large files are cut, at row groups or lines; what cannot be cut, a compressed file, is a slice
    whatever its size. Smaller ones are taken together.

    Raises:
        hub.HubError: the hub refused or failed.
        ValueError: a Parquet file is damaged.
    """
    if (cut := _cut(config, listed[first])) is not None:
        return Planned(cut, first + 1)
    together: list[SourceFile] = []
    held = 0
    for file in listed[first:]:
        if together and (held >= SLICE_BYTES or _divisible(file)):
            break
        together.append(file)
        held += _text_bytes(file)
    return Planned([Slice(files=tuple(together))], first + len(together))


def read(config: CorpusConfig, piece: Slice, tally: Tally) -> Iterator[Batch]:
    """The documents of a slice, always in the same order and batches; empty ones left out.

    Raises:
        ValueError: a file does not hold what its name promises, or more than `bad_lines_limit`
            lines are bad; names file and place.
        hub.HubError: the hub failed in mid-stream.
    """
    waiting: list[Batch] = []
    load = _Load()
    for chunk in _chunks(config, piece, tally):
        begin = 0
        for end, text in enumerate(chunk.texts, start=1):
            if load.full_with(text):
                yield _joined([*waiting, _cut_out(chunk, begin, end)])
                waiting, begin = [], end
        if begin < len(chunk.texts):
            waiting.append(_cut_out(chunk, begin, len(chunk.texts)))
    if waiting:
        yield _joined(waiting)


class _Load:
    """Of a batch that is being filled."""

    def __init__(self) -> None:
        self._documents = self._characters = 0

    def full_with(self, text: str) -> bool:
        """Whether the batch ends with this text; then the next one begins."""
        self._documents += 1
        self._characters += len(text)
        full = self._documents >= _READ_ROWS or self._characters >= _READ_BYTES
        if full:
            self._documents = self._characters = 0
        return full


def _cut_out(batch: Batch, begin: int, end: int) -> Batch:
    return Batch(
        batch.ids[begin:end],
        batch.urls[begin:end],
        batch.texts[begin:end],
        batch.text_bytes[begin:end],
    )


def _joined(batches: list[Batch]) -> Batch:
    ids, urls, texts, text_bytes = zip(*batches, strict=True)
    return Batch(
        pa.concat_arrays(ids),
        pa.concat_arrays(urls),
        list(chain.from_iterable(texts)),
        np.concatenate(text_bytes),
    )


def _chunks(config: CorpusConfig, piece: Slice, tally: Tally) -> Iterator[Batch]:
    for file in piece.files:
        try:
            yield from _READERS[_kind(file.name)](config, file, piece, tally)
        except _UNREADABLE as error:
            if isinstance(error, UnicodeDecodeError) and config.data_mode == "sample":
                continue  # the library's tests hold a few files that are wrong on purpose
            _require_unchanged(config, file)
            raise ValueError(f"{_place(config, file)} cannot be read: {error}") from error
        except ValueError:
            _require_unchanged(config, file)
            raise
        _require_unchanged(config, file)


def documents(config: CorpusConfig) -> Iterator[Document]:
    """All documents of a resolved text corpus, one after another."""
    listed, first = files(config), 0
    while first < len(listed):
        slices, first = plan(config, listed, first)
        for piece in slices:
            for batch in read(config, piece, Tally()):
                ids = (i.decode("utf-8", "surrogatepass") for i in batch.ids.to_pylist())
                yield from map(Document, ids, batch.texts, batch.urls.to_pylist())


def held_out(ids: Iterable[bytes]) -> npt.NDArray[np.float64]:
    """Place of each document in [0, 1), from its id alone; validation takes the lowest."""
    digests = b"".join(hashlib.sha256(i).digest()[:8] for i in ids)
    return np.frombuffer(digests, ">u8") / 2.0**64


def sound_text(text: str) -> tuple[str, int]:
    """`text` without surrogates, and its bytes in UTF-8.

    JSON can hold half of a UTF-16 pair, which is no character: U+FFFD takes its place.
    """
    try:
        return text, len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError:
        sound = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return sound, len(sound.encode())


def binary(values: Sequence[bytes]) -> pa.BinaryArray:
    """What pa.array gives too, but that imports pandas, which takes a third of a second."""
    offsets = np.zeros(len(values) + 1, dtype=np.int32)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(values))]
    return pa.Array.from_buffers(pa.binary(), len(values), buffers)


def strings(values: Iterable[str]) -> pa.StringArray:
    """Without surrogates."""
    return binary([sound_text(value)[0].encode() for value in values]).view(pa.string())


def first_bytes(stream: Iterable[Document], limit: int) -> Iterator[str]:
    """Texts of documents until `limit` bytes have been passed on."""
    passed = 0
    for document in stream:
        if passed >= limit:
            return
        passed += len(document.text.encode("utf-8", "surrogatepass"))
        yield document.text


# Files and their slices


def _on_the_hub(config: CorpusConfig) -> bool:
    return config.data_mode in ("fineweb", "hub")


def _pin_dataset(config: CorpusConfig) -> CorpusConfig:
    revision = config.data_revision or "main"
    if not re.fullmatch("[0-9a-f]{40}", revision):  # a branch goes on, a commit stays
        revision = hub.dataset_revision(config.dataset_name, revision)
    mode = "fineweb" if config.data_mode == "auto" else config.data_mode
    return config.replace(data_mode=mode, data_revision=revision)


def _pin_files(config: CorpusConfig) -> CorpusConfig:
    """Set the revision to a digest of names and contents."""
    _paths.cache_clear()  # files may have come since
    digest = hashlib.sha256()
    for name, path in _paths(config).items():
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{name}\n{content}\n".encode())
        _pinned[path] = _Pinned(content, _stamp(path))
    revision = digest.hexdigest()[:16]
    if config.data_revision not in (None, revision):
        raise ValueError(
            f"the files of {config.name} have changed: their digest is {revision}, the run was "
            f"started with {config.data_revision}. Restore them, or use another --run-name"
        )
    return config.replace(data_revision=revision)


class _Pinned(NamedTuple):
    sha256: str
    stamp: tuple[int, int]


_pinned: dict[Path, _Pinned] = {}
"""Each local file as it was when its content was made part of a revision, in this process."""


def _stamp(path: Path) -> tuple[int, int]:
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns


def _unchanged(config: CorpusConfig, file: SourceFile) -> Path:
    """The path of a local file, which has to be what it was when the revision was found."""
    path = _paths(config)[file.name]
    now, pinned = _stamp(path), _pinned.get(path)
    if now[0] != file.size or (pinned and now != pinned.stamp):
        raise ValueError(f"{path} has changed since the run began: run the same command again")
    return path


def _require_unchanged(config: CorpusConfig, file: SourceFile) -> None:
    """Once it has been read: what was read may be of another content than the revision says."""
    if not _on_the_hub(config):
        _unchanged(config, file)


@lru_cache(maxsize=4)
def _paths(config: CorpusConfig) -> dict[str, Path]:
    """Path of every local file by its name in the corpus, in the order in which they are read."""
    return _sample_paths() if config.data_mode == "sample" else _matching(config.data_path)


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
        _kind(str(path))
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


def _kind(name: str) -> str:
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes = suffixes[:-1]
    kind = _ALSO.get(suffixes[-1], suffixes[-1]) if suffixes else ""
    if kind not in _SUFFIXES:
        raise ValueError(
            f"{name}: cannot tell what it holds; known are {', '.join(_SUFFIXES)}, "
            f"each also with {', '.join(_COMPRESSED)}"
        )
    return kind


def _is_compressed(file: SourceFile) -> bool:
    return Path(file.name).suffix.lower() in _COMPRESSED


def _text_bytes(file: SourceFile) -> int:
    """What it holds, about."""
    dense = _is_compressed(file) or _kind(file.name) == ".parquet"
    return file.size * (_COMPRESSION if dense else 1)


def local_text_bytes(config: CorpusConfig) -> float:
    """All the text there is, about; infinite where the files are not here to be looked at."""
    if config.data_mode not in ("files", "sample"):
        return math.inf
    return sum(map(_text_bytes, files(config)))


def _divisible(file: SourceFile) -> bool:
    large = _text_bytes(file) > SLICE_BYTES
    return large and not _is_compressed(file) and _kind(file.name) != ".txt"


def _cut(config: CorpusConfig, file: SourceFile) -> list[Slice] | None:
    """The slices of a large file; None for one that is not cut."""
    if not _divisible(file):
        return None
    if _kind(file.name) == ".parquet":
        cuts = _row_group_cuts(config, file)
    else:
        cuts = [*range(0, file.size, SLICE_BYTES), file.size]
    return [Slice(files=(file,), start=start, stop=stop) for start, stop in pairwise(cuts)]


def _row_group_cuts(config: CorpusConfig, file: SourceFile) -> list[int]:
    try:
        with _parquet(config, file) as opened:
            footer = opened.metadata
            groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
            column = _present(config, file, opened)
            sizes = [_column_bytes(group, column) for group in groups]
    except _UNREADABLE as error:
        raise ValueError(f"{_place(config, file)} cannot be read: {error}") from error
    cuts, taken = [0], 0
    for number, size in enumerate(sizes, start=1):
        taken += size
        if taken >= SLICE_BYTES or number == len(sizes):
            cuts.append(number)
            taken = 0
    return cuts


def _column_bytes(group: pq.RowGroupMetaData, name: str) -> int:
    columns = (group.column(number) for number in range(group.num_columns))
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema == name)


# Reading


def _place(config: CorpusConfig, file: SourceFile) -> str:
    """The file as a person finds it."""
    if _on_the_hub(config):
        return f"{config.dataset_name}, {file.name}"
    return str(_paths(config)[file.name])


def _open(config: CorpusConfig, file: SourceFile) -> IO[bytes]:
    """The file's stored bytes."""
    if _on_the_hub(config):
        assert config.data_revision, "resolve() pins the revision"
        remote = HubFile(name=file.name, size=file.size)
        return cast(
            IO[bytes], hub.open_file(config.dataset_name, remote, revision=config.data_revision)
        )
    return _unchanged(config, file).open("rb")


def _decompressed(config: CorpusConfig, file: SourceFile) -> IO[bytes]:
    stored = _open(config, file)
    suffix = Path(file.name).suffix.lower()
    if suffix == ".xz":
        return io.BufferedReader(_XzStreams(stored), _READ_BYTES)
    if suffix in _COMPRESSED:
        codec = {".gz": "gzip", ".zst": "zstd"}.get(suffix, suffix[1:])
        stream = pa.CompressedInputStream(pa.PythonFile(stored, mode="r"), codec)
        return cast(IO[bytes], io.BufferedReader(stream, _READ_BYTES))
    return stored


class _XzStreams(io.RawIOBase):
    """What `lzma.open` reads, which ends in silence where a stream behind the first is damaged.

    Source: https://tukaani.org/xz/xz-file-format.txt, section 2: streams and zeros between them.
    """

    def __init__(self, stored: IO[bytes]) -> None:
        self._stored, self._decoder, self._input = stored, lzma.LZMADecompressor(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data:
            if self._decoder.eof and not self._next_stream():
                return 0
            if self._decoder.needs_input and not self._input:
                self._input = self._stored.read(_READ_BYTES)
                if not self._input:
                    raise EOFError("it ends in the middle of a compressed stream")
            data = self._decoder.decompress(self._input, len(buffer))
            self._input = b""
        buffer[: len(data)] = data
        return len(data)

    def _next_stream(self) -> bool:
        self._input = self._decoder.unused_data.lstrip(b"\0")
        while not self._input:
            if not (stored := self._stored.read(_READ_BYTES)):
                return False
            self._input = stored.lstrip(b"\0")
        self._decoder = lzma.LZMADecompressor()
        return True

    def close(self) -> None:
        self._stored.close()
        super().close()


def _read_text(
    config: CorpusConfig, file: SourceFile, piece: Slice, tally: Tally
) -> Iterator[Batch]:
    with _decompressed(config, file) as stream:
        document = Document(file.name, stream.read().decode("utf-8-sig"))
    if document.text:
        yield _columns([document])
    else:
        tally.empty += 1


def _read_jsonl(
    config: CorpusConfig, file: SourceFile, piece: Slice, tally: Tally
) -> Iterator[Batch]:
    some: list[Document] = []
    load = _Load()
    for document in _lines(config, file, piece, tally):
        if not document.text:
            tally.empty += 1
            continue
        some.append(document)
        if load.full_with(document.text):
            yield _columns(some)
            some = []
    if some:
        yield _columns(some)


def _columns(some: list[Document]) -> Batch:
    ids = binary([document.id.encode("utf-8", "surrogatepass") for document in some])
    sound = [sound_text(document.text) for document in some]
    return Batch(
        ids,
        strings(document.url for document in some),
        [text for text, _ in sound],
        np.array([size for _, size in sound], dtype=np.int64),
    )


def _lines(
    config: CorpusConfig, file: SourceFile, piece: Slice, tally: Tally
) -> Iterator[Document]:
    """Lines that begin within the slice; a document without an id is named by its first byte."""
    with _decompressed(config, file) as stream:
        position, number = piece.start, 0
        if position:
            stream.seek(position - 1)
            position += len(stream.readline()) - 1  # the rest of a line that the slice before owns
        while piece.stop is None or position < piece.stop:
            if not (line := stream.readline()):
                return
            begin, number, position = position, number + 1, position + len(line)
            if not (content := line.removeprefix(codecs.BOM_UTF8).strip()):
                continue
            try:
                yield _from_line(config, file, content, begin)
            except (ValueError, RecursionError) as error:
                where = f"line {number}" if not piece.start else f"the line at byte {begin}"
                _count_bad(config, tally, f"{_place(config, file)}, {where} {error}")


def _from_line(config: CorpusConfig, file: SourceFile, line: bytes, position: int) -> Document:
    column = config.text_column
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from error
    if isinstance(fields, dict) and fields.get(column, "") is None:
        return Document(file.name, "")  # as in Parquet files, null is an empty document
    if not isinstance(fields, dict) or not isinstance(fields.get(column), str):
        found = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
        raise ValueError(f"has no text in field {column!r}, only {found}: set --text-column")
    document_id, url = fields.get("id"), fields.get("url")
    return Document(
        str(document_id) if _names(document_id) else f"{file.name}@{position}",
        fields[column],
        url if isinstance(url, str) else "",
    )


def _names(document_id: object) -> bool:
    return isinstance(document_id, str | int) and document_id != ""


def _count_bad(config: CorpusConfig, tally: Tally, place: str) -> None:
    tally.bad += 1
    if len(tally.places) < _PLACES:
        tally.places.append(place)
    if tally.bad > config.bad_lines_limit:
        allowed = f" ({tally.bad} bad lines, --bad-lines-limit {config.bad_lines_limit})"
        raise ValueError(place + (allowed if config.bad_lines_limit else ""))


@lru_cache(maxsize=4)
def _footer(config: CorpusConfig, file: SourceFile) -> pq.FileMetaData:
    """Of a file on the hub, which has about a megabyte of it and is opened for every slice."""
    return pq.read_metadata(pa.PythonFile(_open(config, file), mode="r"))


def _parquet(config: CorpusConfig, file: SourceFile) -> pq.ParquetFile:
    source: Any
    footer = None
    if _is_compressed(file):
        # Parquet is read from its end, which a compressed stream cannot reach
        with _decompressed(config, file) as stream:
            source = pa.BufferReader(stream.read())
    elif _on_the_hub(config):
        source, footer = pa.PythonFile(_open(config, file), mode="r"), _footer(config, file)
    else:
        source = str(_unchanged(config, file))
    return pq.ParquetFile(
        source,
        metadata=footer,
        memory_map=False,  # a file that is cut meanwhile would end the process
        pre_buffer=_on_the_hub(config),
        page_checksum_verification=True,
    )


def _present(config: CorpusConfig, file: SourceFile, opened: pq.ParquetFile) -> str:
    """The text column, which has to be there."""
    present = opened.schema_arrow.names
    if present.count(config.text_column) != 1:
        raise ValueError(
            f"{_place(config, file)} has no one column {config.text_column!r}, but {present}: "
            "set --text-column"
        )
    kind = opened.schema_arrow.field(config.text_column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if kind not in _STRINGS:
        raise ValueError(
            f"{_place(config, file)} has {kind} in column {config.text_column!r}, no text: "
            "set --text-column"
        )
    return config.text_column


def _also_present(config: CorpusConfig, file: SourceFile, opened: pq.ParquetFile) -> list[str]:
    """Those of the columns for ids and URLs that are there, beside the text's."""
    present = opened.schema_arrow.names
    for name in ("id", "url"):
        if present.count(name) > 1:
            raise ValueError(
                f"{_place(config, file)} has {present.count(name)} columns {name!r}: leave one"
            )
    return [c for c in ("id", "url") if c in present and c != config.text_column]


def _read_parquet(
    config: CorpusConfig, file: SourceFile, piece: Slice, tally: Tally
) -> Iterator[Batch]:
    with _parquet(config, file) as opened:
        column = _present(config, file, opened)
        columns = [column, *_also_present(config, file, opened)]
        footer = opened.metadata
        stop = footer.num_row_groups if piece.stop is None else piece.stop
        groups = range(piece.start, stop)
        number = sum(footer.row_group(group).num_rows for group in range(piece.start))
        rows = sum(footer.row_group(group).num_rows for group in groups)
        size = sum(_column_bytes(footer.row_group(group), column) for group in groups)
        # long documents are read a few at a time: eight batches are on their way at once
        at_once = max(1, min(_READ_ROWS, _READ_BYTES * rows // max(1, size)))
        for batch in opened.iter_batches(at_once, row_groups=groups, columns=columns):
            texts, ids, urls = (
                _as_strings(batch.column(name)) if name in columns else pa.repeat("", len(batch))
                for name in (column, "id", "url")
            )
            if pc.any(pc.equal(ids, "")).as_py():
                named = enumerate(ids.to_pylist(), start=number + 1)
                ids = strings(name or f"{file.name}:{place}" for place, name in named)
            number += len(batch)
            text_bytes = pc.binary_length(texts).to_numpy().astype(np.int64)
            if not text_bytes.all():
                full = pc.not_equal(texts, "")
                texts, ids, urls = (values.filter(full) for values in (texts, ids, urls))
                tally.empty += len(batch) - len(texts)
                text_bytes = text_bytes[text_bytes > 0]
            for values in (ids, urls):
                values.validate(full=True)  # that it is UTF-8, which Parquet files only claim
            yield Batch(ids.cast(pa.binary()), urls, texts.to_pylist(), text_bytes)


def _as_strings(values: pa.Array) -> pa.StringArray:
    """Null is empty; a number is as Python writes it."""
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if kind in _STRINGS:
        texts = values.cast(pa.string())
        return texts.fill_null("") if texts.null_count else texts
    return strings("" if value is None else str(value) for value in values.to_pylist())


_READERS = {".txt": _read_text, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
