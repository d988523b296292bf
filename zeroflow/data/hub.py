"""The Hugging Face Hub: revisions, lists of files, and files that are read on demand.

This module makes all requests itself, because the timeouts of the hub's libraries range from none
to half an hour, their exceptions change between versions, and after a lost connection `datasets`
reads a file again from its start.
"""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, urlsplit

from zeroflow.data.hub_errors import HubError
from zeroflow.data.hub_requests import QUESTION, READING, Effort, Patience, answer, body, persist

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

READ_AHEAD_BYTES = 2**20
"""Bytes to request when a small read continues where the last one ended."""

SKIP_BYTES = 16 * 2**20
"""Maximum number of bytes that are discarded if a server answers a range with the whole file."""

_PIECE_BYTES = 64 * 2**20
"""Bytes of a downloaded file that are in memory at once."""

_PEEK_BYTES = 8192
"""Number of bytes that `readline` looks at in advance."""

# Files in which the `datasets` library finds the files of each subset
_DESCRIPTIONS = ("README.md", ".huggingface.yaml", "dataset_infos.json")


class HubFile(NamedTuple):
    name: str
    """Path within the repository."""

    size: int
    """Bytes."""


def dataset_revision(name: str, revision: str = "main", *, patience: Patience = QUESTION) -> str:
    """The commit that a branch or tag of a dataset points to.

    Raises:
        HubError: the hub refused or could not be reached; raised within a few seconds.
    """
    return _commit("dataset", name, revision, patience)


def model_revision(
    name: str, revision: str | None, *, probe: str, patience: Patience = QUESTION
) -> str:
    """The commit of a model repository, after a check that its file `probe` can be read.

    Raises:
        HubError: the hub refused or could not be reached; raised within a few seconds.
    """
    commit = _commit("model", name, revision or "main", patience)
    url = _file_url("model", name, commit, probe)

    def read_a_byte(effort: Effort) -> None:
        with answer(url, name, effort, missing_is_fine=True, Range="bytes=0-0"):
            pass

    persist(name, patience, read_a_byte)
    return commit


def download(
    name: str,
    revision: str | None,
    wanted: Callable[[str], bool],
    folder: Path,
    *,
    patience: Patience = READING,
) -> None:
    """Fetch the files of a model repository into `folder`.

    Args:
        wanted: returns True if the file with this path in the repository should be fetched.

    Raises:
        HubError: the hub refused or failed.
    """
    revision = revision or "main"
    for file in _tree("model", name, revision, patience):
        if wanted(file.name):
            path = folder / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            with (
                _RemoteFile("model", name, file, revision, patience) as remote,
                path.open("wb") as local,
            ):
                while piece := remote.read(_PIECE_BYTES):
                    local.write(piece)


def dataset_files(
    dataset: str, subset: str | None, *, revision: str, patience: Patience = READING
) -> list[HubFile]:
    """The files of the train split of a subset, in the dataset's own order.

    Raises:
        HubError: the hub refused or failed.
        ValueError: the dataset has no such subset, or the subset has no train split.
    """
    files = {file.name: file for file in _tree("dataset", dataset, revision, patience)}
    with TemporaryDirectory() as temporary:
        # The `datasets` library has the rules, but its network code has its own timeouts and
        # errors. So it is given a local folder with empty files of the same names
        folder = Path(temporary).resolve()
        for file in files.values():
            path = folder / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            if file.name in _DESCRIPTIONS:
                with _RemoteFile("dataset", dataset, file, revision, patience) as remote:
                    path.write_bytes(remote.read())
        return [files[name] for name in _train_split(folder, dataset, subset)]


def open_file(
    dataset: str, file: HubFile, *, revision: str, patience: Patience = READING
) -> io.RawIOBase:
    """Return a file of a dataset that is read over the network on demand, without a request.

    A read makes one request for exactly its bytes, which suits Parquet: pass the file to
    `pyarrow.parquet.ParquetFile(..., pre_buffer=True)`. Consecutive small reads, such as lines,
    share requests of `READ_AHEAD_BYTES`.

    Raises:
        HubError: raised by reads: the hub refused or failed, or the file has changed.
    """
    return _RemoteFile("dataset", dataset, file, revision, patience)


def _commit(kind: str, name: str, revision: str, patience: Patience) -> str:
    path = f"{kind}s/{name}/revision/{quote(revision, safe='')}?expand=sha"
    facts, _ = _ask(path, name, patience)
    if not isinstance(facts, dict) or not facts.get("sha"):
        raise HubError(name, "the hub's answer contains no commit", transient=True)
    return str(facts["sha"])


def _tree(kind: str, name: str, revision: str, patience: Patience) -> list[HubFile]:
    """Every file of a repository."""
    path = f"{kind}s/{name}/tree/{quote(revision, safe='')}"
    files = []
    query = "recursive=true"
    while query:
        entries, following = _ask(f"{path}?{query}", f"{name}: list of files", patience)
        try:
            files += [HubFile(e["path"], e["size"]) for e in entries if e["type"] == "file"]
        except (TypeError, KeyError) as error:
            cause = "the hub's answer is not a list of files"
            raise HubError(name, cause, transient=True) from error
        query = urlsplit(following).query
    for file in files:
        if file.name.startswith("/") or ".." in PurePosixPath(file.name).parts:
            raise HubError(
                name, f"lists a file outside the repository: {file.name}", transient=False
            )
    return files


def _ask(path: str, subject: str, patience: Patience) -> tuple[Any, str]:
    """Return the hub's answer, and the address of the next page; "" after the last page."""
    from huggingface_hub import constants

    def attempt(effort: Effort) -> tuple[Any, str]:
        with answer(f"{constants.ENDPOINT}/api/{path}", subject, effort) as response:
            content = b"".join(body(response, subject, effort))
            try:
                return json.loads(content), response.links.get("next", {}).get("url", "")
            except ValueError as error:
                cause = f"the answer is not JSON ({len(content):,} bytes)"
                raise HubError(subject, cause, transient=True) from error

    return persist(subject, patience, attempt)


def _train_split(folder: Path, dataset: str, subset: str | None) -> list[str]:
    """Names of the files that `datasets` finds for a subset's train split in a folder."""
    from datasets import (
        get_dataset_config_names,
        get_dataset_default_config_name,
        load_dataset_builder,
    )

    place = str(folder)
    try:
        subsets = get_dataset_config_names(place)
        chosen = subset or get_dataset_default_config_name(place)
        if chosen not in subsets:
            known = ", ".join(subsets[:8]) + (", ..." if len(subsets) > 8 else "")
            flag = "--fineweb-subset, or --dataset-config of another dataset"
            fault = f"has no subset {chosen}, only" if chosen else "has several subsets,"
            raise ValueError(f"{dataset} {fault} {known}: set {flag}")
        splits = load_dataset_builder(place, chosen, cache_dir=place).config.data_files
    except FileNotFoundError as error:  # raised for a folder without files of a known kind
        text = str(error).replace(place, dataset)
        raise ValueError(f"{dataset}: its files do not form a dataset: {text}") from error
    if "train" not in splits:
        known = ", ".join(map(str, splits))
        raise ValueError(f"{dataset}, {chosen}: has no train split, only {known}")
    return [Path(path).relative_to(folder).as_posix() for path in splits["train"]]


class _RemoteFile(io.RawIOBase):
    """A file of a dataset on the hub, see `open_file`."""

    def __init__(
        self, kind: str, repository: str, file: HubFile, revision: str, patience: Patience
    ) -> None:
        self.name = f"{repository}/{file.name}"
        self._url = _file_url(kind, repository, revision, file.name)
        self._size = file.size
        self._patience = patience
        self._etag = ""
        self._position = 0
        self._ahead = b""  # bytes of the last request, unless it was large
        self._ahead_at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if origin + offset < 0:
            raise ValueError(f"{self.name}: cannot seek to {origin + offset}")
        self._position = origin + offset
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        """All requested bytes; fewer only at the end of the file."""
        data = self._bytes(self._size if size is None or size < 0 else self._position + size)
        self._position += len(data)
        return data

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def peek(self, size: int = 0, /) -> bytes:
        """Return the next bytes without changing the position, for `readline`."""
        return self._bytes(self._position + _PEEK_BYTES)

    def _bytes(self, end: int) -> bytes:
        """The bytes from the current position to `end`."""
        if self.closed:
            raise ValueError(f"{self.name} is closed")
        first, end = self._position, min(end, self._size)
        if first >= end:
            return b""
        offset = first - self._ahead_at
        had = self._ahead[offset : offset + end - first] if offset >= 0 else b""
        start = first + len(had)
        if start == end:
            return had
        stop = end
        if start == self._ahead_at + len(self._ahead):
            stop = min(max(end, start + READ_AHEAD_BYTES), self._size)
        got = self._fetch(start, stop)
        much = len(got) > READ_AHEAD_BYTES
        self._ahead, self._ahead_at = (b"", stop) if much else (had + got, first)
        return had + got[: end - start] if had or stop > end else got

    def _fetch(self, first: int, end: int) -> bytes:
        subject = f"{self.name}, bytes {first:,} to {end:,} of {self._size:,}"
        got = bytearray()

        def attempt(effort: Effort) -> None:
            start = first + len(got)
            with answer(self._url, subject, effort, Range=f"bytes={start}-{end - 1}") as response:
                skip = self._bytes_before(start, response, subject)
                for chunk in body(response, subject, effort):
                    got.extend(chunk[skip:])
                    skip = max(skip - len(chunk), 0)
                    effort.kept = len(got)
                    if len(got) > end - first:  # the server sends more than the requested range
                        del got[end - first :]
                        return
            if len(got) < end - first:
                cause = f"the answer ended after {len(got):,} of {end - first:,} bytes"
                raise HubError(subject, cause, transient=True)

        persist(subject, self._patience, attempt)
        return bytes(got)

    def _bytes_before(self, start: int, response: Any, subject: str) -> int:
        """Check that the answer belongs to this file; return how many bytes precede byte `start`.

        Raises:
            HubError: the file has changed, or the answer is not the range that was requested.
        """
        etag = _etag(response)
        if self._etag and etag and etag != self._etag:
            cause = f"the file has changed since it was opened (ETag {etag}, was {self._etag})"
            raise HubError(subject, cause, transient=False)
        whole = response.status_code == 200
        said = response.headers.get("Content-Length" if whole else "Content-Range", "")
        size = said if whole else said.rpartition("/")[2]
        if size.isdigit() and int(size) != self._size:
            cause = f"the file has changed since it was listed ({int(size):,} bytes)"
            raise HubError(subject, cause, transient=False)
        if whole and start > SKIP_BYTES:
            cause = "the server answers a range with the whole file (200 instead of 206)"
            raise HubError(subject, cause, transient=False)
        if not whole and not re.match(rf"bytes {start}-", said):
            cause = f"the answer contains other bytes than requested ({said or 'no Content-Range'})"
            raise HubError(subject, cause, transient=True)
        self._etag = etag or self._etag
        return start if whole else 0


def _file_url(kind: str, repository: str, revision: str, name: str) -> str:
    from huggingface_hub import hf_hub_url

    return hf_hub_url(repository, name, repo_type=kind, revision=revision)


def _etag(response: Any) -> str:
    """Return the ETag that the hub gives the file; the storage it redirects to has another one."""
    for each in [*response.history, response]:
        if linked := each.headers.get("X-Linked-ETag"):
            return linked.removeprefix("W/").strip('"')
    return response.headers.get("ETag", "").removeprefix("W/").strip('"')
