"""The Hugging Face Hub: what we ask of it, and its failures in one sentence each.

Every request is our own. The waits of the hub's libraries range from none to half an hour, their
exceptions change with their versions, and `datasets` reads a file again from its start.
"""

import email.utils
import io
import json
import logging
import random
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar
from urllib.parse import quote, urlsplit

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How long one request may take, all its tries together."""

    seconds: float
    """From the first try to the last, which may still take its time: a request for n bytes ends
    within `seconds + 2 * stall_seconds + window_seconds + n / slow_bytes_per_second`."""

    tries: int
    """In a row that brought no byte."""

    stall_seconds: float
    """How long an answer may take to begin, and each of its bytes to follow."""

    slow_bytes_per_second: float = 32 * 1024
    """An answer slower than this is given up, and asked for again from where it was."""

    window_seconds: float = 10.0
    """How long an answer may be slow."""

    first_wait_seconds: float = 0.5
    """Between the first try and the second, less a random half; doubles with every try."""

    longest_wait_seconds: float = 15.0
    """Where the doubling ends. What the hub asks for in Retry-After is waited for as it is, or,
    where that is more than what is left of `seconds`, not at all."""


ANSWER_SECONDS = 5.0
"""How long the hub may take for a question about a repository."""

QUESTION = Patience(ANSWER_SECONDS, tries=3, stall_seconds=ANSWER_SECONDS, first_wait_seconds=0.25)
"""For what decides whether to do without the hub: somebody waits for it."""

READING = Patience(120.0, tries=20, stall_seconds=20.0)
"""For what a run cannot do without: outlasts a restart of the hub or of a router."""

READ_AHEAD_BYTES = 2**20
"""Asked for when a small read goes on where the last one ended."""

SKIP_BYTES = 16 * 2**20
"""Read in vain, at most, from a server that answers a range with the whole file."""

_PEEK_BYTES = 8192
_WORTH_A_LINE_SECONDS = 1.0

# From these the `datasets` library learns how a repository's files make up its subsets
_DESCRIPTIONS = ("README.md", ".huggingface.yaml", "dataset_infos.json")


class HubError(RuntimeError):
    """The hub refused, or could not be reached."""

    def __init__(
        self,
        subject: str,
        cause: str,
        *,
        transient: bool,
        remedies: tuple[str, ...] = (),
        retry_after: float | None = None,
    ) -> None:
        self.subject, self.cause, self.transient = subject, cause, transient
        """`transient`: the same call may succeed later."""
        self.remedies = remedies
        self.retry_after = retry_after
        """Seconds after which the hub wants to be asked again, if it said so."""
        ways = "".join(f"\n  - {remedy}" for remedy in remedies)
        super().__init__(f"{subject}: {cause}" + (f". What can be done:{ways}" if ways else ""))

    def __reduce__(self) -> Any:
        """Through a pickle, as from a Dask worker, which knows positional arguments only."""
        return partial(
            type(self),
            transient=self.transient,
            remedies=self.remedies,
            retry_after=self.retry_after,
        ), (self.subject, self.cause)

    def with_remedies(self, *remedies: str) -> Self:
        return type(self)(
            self.subject,
            self.cause,
            transient=self.transient,
            remedies=remedies,
            retry_after=self.retry_after,
        )


class HubFile(NamedTuple):
    name: str
    """Path within the repository."""

    size: int
    """Bytes."""


def dataset_revision(name: str, revision: str = "main", *, patience: Patience = QUESTION) -> str:
    """The commit that a branch or tag of a dataset is at.

    Raises:
        HubError: within a few seconds.
    """
    return _commit("dataset", name, revision, patience)


def model_revision(
    name: str, revision: str | None, *, probe: str, patience: Patience = QUESTION
) -> str:
    """The commit of a model repository, once it is known that it gives us its file `probe`.

    Raises:
        HubError: within a few seconds.
    """
    commit = _commit("model", name, revision or "main", patience)
    url = _file_url("model", name, commit, probe)

    def read_a_byte(effort: _Effort) -> None:
        with _answer(url, name, effort, missing_is_fine=True, Range="bytes=0-0"):
            pass

    _persist(name, patience, read_a_byte)
    return commit


def download(
    name: str,
    revision: str | None,
    patterns: list[str],
    folder: Path,
    *,
    patience: Patience = READING,
) -> None:
    """Fetch the files of a model repository that match `patterns` into `folder`.

    Raises:
        HubError: the hub refused or failed.
    """
    revision = revision or "main"
    for file in _tree("model", name, revision, patience):
        if any(fnmatch(file.name, pattern) for pattern in patterns):
            path = folder / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            with _RemoteFile("model", name, file, revision, patience) as remote:
                path.write_bytes(remote.read())


def dataset_files(
    dataset: str, subset: str | None, *, revision: str, patience: Patience = READING
) -> list[HubFile]:
    """The files of the train split of a subset, in the dataset's own order.

    Raises:
        HubError: the hub refused or failed.
        ValueError: the dataset has no such subset, or that has no train split.
    """
    files = {file.name: file for file in _tree("dataset", dataset, revision, patience)}
    with TemporaryDirectory() as temporary:
        # `datasets` knows the rules, and fails at the network in ways of its own: it is shown
        # the repository as a folder of empty files
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
    """A file of a dataset that is read over the network as it is needed; makes no request yet.

    A read is one request for exactly its bytes, as Parquet wants it: give it to
    `pyarrow.parquet.ParquetFile(..., pre_buffer=True)`. Small reads that follow one another, and
    lines, share requests of `READ_AHEAD_BYTES`.

    Raises:
        HubError: from its reads: the hub refused or failed, or the file has changed.
    """
    return _RemoteFile("dataset", dataset, file, revision, patience)


# What we ask


def _commit(kind: str, name: str, revision: str, patience: Patience) -> str:
    path = f"{kind}s/{name}/revision/{quote(revision, safe='')}?expand=sha"
    facts, _ = _ask(path, name, patience)
    if not isinstance(facts, dict) or not facts.get("sha"):
        raise HubError(name, "the hub's answer names no commit", transient=True)
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
            cause = "what the hub answers is no list of files"
            raise HubError(name, cause, transient=True) from error
        query = urlsplit(following).query
    for file in files:
        if file.name.startswith("/") or ".." in PurePosixPath(file.name).parts:
            raise HubError(name, f"lists a file outside itself: {file.name}", transient=False)
    return files


def _ask(path: str, subject: str, patience: Patience) -> tuple[Any, str]:
    """The hub's answer to a question, and the address of its next page or an empty string."""
    from huggingface_hub import constants

    def attempt(effort: _Effort) -> tuple[Any, str]:
        with _answer(f"{constants.ENDPOINT}/api/{path}", subject, effort) as response:
            body = b"".join(_body(response, subject, effort))
            try:
                return json.loads(body), response.links.get("next", {}).get("url", "")
            except ValueError as error:
                cause = f"{len(body):,} bytes that are no JSON came for an answer"
                raise HubError(subject, cause, transient=True) from error

    return _persist(subject, patience, attempt)


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
    except FileNotFoundError as error:  # what it says of a folder without files that it knows
        text = str(error).replace(place, dataset)
        raise ValueError(f"{dataset}: its files make no dataset: {text}") from error
    if "train" not in splits:
        known = ", ".join(map(str, splits))
        raise ValueError(f"{dataset}, {chosen}: has no train split, only {known}")
    return [Path(path).relative_to(folder).as_posix() for path in splits["train"]]


class _RemoteFile(io.RawIOBase):
    """See `open_file`."""

    def __init__(
        self, kind: str, repository: str, file: HubFile, revision: str, patience: Patience
    ) -> None:
        self.name = f"{repository}/{file.name}"
        self._url = _file_url(kind, repository, revision, file.name)
        self._size = file.size
        self._patience = patience
        self._etag = ""
        self._position = 0
        self._ahead = b""  # what the last request brought, unless that was much
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
        """All of the bytes asked for, fewer only at the end of the file."""
        data = self._bytes(self._size if size is None or size < 0 else self._position + size)
        self._position += len(data)
        return data

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def peek(self, size: int = 0, /) -> bytes:
        """The next bytes, without moving on; what makes `readline` take more than one at a time."""
        return self._bytes(self._position + _PEEK_BYTES)

    def _bytes(self, end: int) -> bytes:
        """From the current position to `end`."""
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

        def attempt(effort: _Effort) -> None:
            start = first + len(got)
            with _answer(self._url, subject, effort, Range=f"bytes={start}-{end - 1}") as response:
                skip = self._bytes_before(start, response, subject)
                for chunk in _body(response, subject, effort):
                    got.extend(chunk[skip:])
                    skip = max(skip - len(chunk), 0)
                    effort.kept = len(got)
                    if len(got) > end - first:  # of the whole file, whose rest may be long
                        del got[end - first :]
                        return
            if len(got) < end - first:
                cause = f"the answer ended after {len(got):,} of {end - first:,} bytes"
                raise HubError(subject, cause, transient=True)

        _persist(subject, self._patience, attempt)
        return bytes(got)

    def _bytes_before(self, start: int, response: Any, subject: str) -> int:
        """How much of an answer comes before byte `start`, once it is known to be of this file."""
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
            cause = "the server answers a range with the whole file (200 in place of 206)"
            raise HubError(subject, cause, transient=False)
        if not whole and not re.match(rf"bytes {start}-", said):
            cause = f"other bytes came than were asked for ({said or 'no Content-Range'})"
            raise HubError(subject, cause, transient=True)
        self._etag = etag or self._etag
        return start if whole else 0


def _file_url(kind: str, repository: str, revision: str, name: str) -> str:
    from huggingface_hub import hf_hub_url

    return hf_hub_url(repository, name, repo_type=kind, revision=revision)


def _etag(response: Any) -> str:
    """What names the contents; the hub says it where it sends on to a storage that has others."""
    for answer in [*response.history, response]:
        if linked := answer.headers.get("X-Linked-ETag"):
            return linked.removeprefix("W/").strip('"')
    return response.headers.get("ETag", "").removeprefix("W/").strip('"')


# How we ask


class _Effort:
    """What a request has cost, against the patience for it.

    Bytes that are kept earn time, or a large read could not outlast many short breaks.
    """

    def __init__(self, patience: Patience) -> None:
        self.patience = patience
        self.kept = 0
        """Bytes that need not be asked for again."""
        self.tries = 0
        self._in_vain = 0
        self._kept_before = 0
        self._started = time.monotonic()

    def __str__(self) -> str:
        tries = "1 try" if self.tries == 1 else f"{self.tries} tries"
        return f"{tries} in {time.monotonic() - self._started:.1f} s"

    def left(self) -> float:
        earned = self.kept / self.patience.slow_bytes_per_second
        return self._started + self.patience.seconds + earned - time.monotonic()

    def wait_after(self, failure: HubError) -> float | None:
        """Seconds before the next try, or None for no further one."""
        self._in_vain = 1 if self.kept > self._kept_before else self._in_vain + 1
        self._kept_before = self.kept
        if not failure.transient or self._in_vain >= self.patience.tries:
            return None
        wait = failure.retry_after
        if wait is None:
            doubled = self.patience.first_wait_seconds * 2 ** (self._in_vain - 1)
            # A source of its own: others seed the shared one and count on what follows
            share = random.SystemRandom().uniform(0.5, 1)
            wait = share * min(doubled, self.patience.longest_wait_seconds)
        return wait if wait < self.left() else None


def _persist(subject: str, patience: Patience, attempt: Callable[[_Effort], T]) -> T:
    """What `attempt` returns, tried again after failures that may pass, as long as allowed."""
    effort = _Effort(patience)
    while True:
        effort.tries += 1
        try:
            return attempt(effort)
        except HubError as failure:
            wait = effort.wait_after(failure)
            if wait is None:
                raise HubError(
                    subject,
                    f"{failure.cause} ({effort})",
                    transient=failure.transient,
                    retry_after=failure.retry_after,
                ) from failure.__cause__
            if wait >= _WORTH_A_LINE_SECONDS:
                log.warning("%s: %s; next try in %.1f s", subject, failure.cause, wait)
        time.sleep(wait)


@contextmanager
def _answer(
    url: str, subject: str, effort: _Effort, *, missing_is_fine: bool = False, **headers: str
) -> Iterator[Any]:
    """The hub's answer of status 2xx, its body still to be read.

    The library's client brings the user's proxies and certificates; it sends the token to no
    other host than the first.
    """
    from huggingface_hub import constants, get_session, get_token

    limit = effort.patience.stall_seconds
    headers |= {"User-Agent": "zeroflow", "Accept-Encoding": "identity"}
    # Not `build_hf_headers`: it asks the hub for a list to name itself from, and waits for it
    if not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN and (token := get_token()):
        if not (token.isascii() and token.isprintable()):  # the client's error would show it
            raise HubError(subject, "the token is malformed: see HF_TOKEN", transient=False)
        headers["Authorization"] = f"Bearer {token}"

    def send() -> Any:
        client = get_session()
        request = client.build_request("GET", url, headers=headers, timeout=limit)
        return client.send(request, stream=True, follow_redirects=True)

    try:
        response = _within(limit, send, late=lambda response: response.close())
    except Exception as error:
        raise _explain_silence(error, subject, url, limit) from error
    try:
        missing = response.headers.get("X-Error-Code") == "EntryNotFound"
        if not (response.is_success or (missing and missing_is_fine)):
            here, there = urlsplit(url).netloc, urlsplit(str(response.url)).netloc
            storage = there if there != here else ""
            raise _from_status(int(response.status_code), response.headers, subject, storage)
        yield response
    finally:
        response.close()


def _body(response: Any, subject: str, effort: _Effort) -> Iterator[bytes]:
    """The pieces of an answer's body, as they come."""
    patience = effort.patience
    began, heard = time.monotonic(), 0
    pieces = response.iter_bytes()
    while True:
        try:
            piece = next(pieces, None)
        except Exception as error:
            url = str(response.url)
            raise _explain_silence(error, subject, url, patience.stall_seconds) from error
        if piece is None:
            return
        heard += len(piece)
        yield piece
        passed = time.monotonic() - began
        if passed >= patience.window_seconds:
            if heard < patience.slow_bytes_per_second * passed:
                cause = f"the answer trickles in ({heard / passed:,.0f} bytes/s)"
                raise HubError(subject, cause, transient=True)
            began, heard = time.monotonic(), 0


def _within(seconds: float, call: Callable[[], T], *, late: Callable[[T], None]) -> T:
    """What `call` returns in time; otherwise TimeoutError, and its result goes to `late`.

    A client's own limit covers neither the resolver nor headers that come byte by byte.
    """
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=work, daemon=True).start()
    try:
        return future.result(seconds)
    except TimeoutError:
        future.add_done_callback(lambda done: None if done.exception() else late(done.result()))
        raise


# What went wrong


def explain(error: BaseException, subject: str) -> HubError:
    """What a failure of the hub's libraries means, from status and cause rather than class.

    The classes change with the libraries' versions, and some hide a 503 behind FileNotFoundError.
    """
    for cause in _chain(error):
        response: Any = getattr(cause, "response", None)
        if hasattr(response, "status_code"):
            return _from_status(int(response.status_code), response.headers, subject)
    for cause in _chain(error):
        if isinstance(cause, OSError | TimeoutError) or "timeout" in type(cause).__name__.lower():
            return HubError(subject, f"the hub cannot be reached ({cause})", transient=True)
    text = " ".join(str(error).split())[:300]
    unreachable = any("connect" in type(c).__name__.lower() for c in _chain(error))
    cause_text = "the hub cannot be reached" if unreachable else "reading from the hub failed"
    return HubError(subject, f"{cause_text} ({type(error).__name__}: {text})", transient=True)


def _explain_silence(error: BaseException, subject: str, url: str, limit: float) -> HubError:
    """Why no answer came, or no more of it."""
    chain = list(_chain(error))
    host = urlsplit(_asked_last(chain) or url).netloc
    names = " ".join(type(cause).__name__ for cause in chain)

    def found(*classes: type[BaseException]) -> bool:
        return any(isinstance(cause, classes) for cause in chain)

    if "Offline" in names:
        return HubError(subject, "HF_HUB_OFFLINE forbids to ask the hub", transient=False)
    if "UnsupportedProtocol" in names or "InvalidURL" in names:
        return HubError(subject, f"{url} is no address ({error}): see HF_ENDPOINT", transient=False)
    if found(ssl.SSLCertVerificationError):
        return HubError(subject, f"the certificate of {host} is not trusted", transient=False)
    if found(socket.gaierror):
        cause = f"the hub cannot be reached (the name {host} is not resolved)"
    elif found(ConnectionRefusedError):
        cause = f"the hub cannot be reached ({host} refuses connections)"
    elif isinstance(error, TimeoutError):  # of `_within`, wherever the hub has sent us on to
        cause = f"no answer came within {limit:.1f} s"
    elif found(TimeoutError) or "Timeout" in names:
        cause = f"no byte came from {host} for {limit:.1f} s"
    elif found(ConnectionError) or "Protocol" in names or "ReadError" in names:
        cause = f"the connection to {host} broke off"
    else:
        return explain(error, subject)
    return HubError(subject, cause, transient=True)


def _asked_last(chain: list[BaseException]) -> str:
    """The address of the request that failed, which may be where the hub sends on to."""
    for cause in chain:
        with suppress(AttributeError, RuntimeError):  # has none, or was not told
            return str(cause.request.url)  # type: ignore[attr-defined]
    return ""


def _from_status(status: int, headers: Any, subject: str, storage: str = "") -> HubError:
    """What a status means; `storage` is the host it came from where that is not the hub."""
    code, said = headers.get("X-Error-Code", ""), headers.get("X-Error-Message", "")
    if storage and status in (401, 403, 404):
        cause = f"{storage}, where the hub keeps its files, answers {status}"
        return HubError(subject, cause, transient=False)
    if code == "GatedRepo" or status == 403:
        cause = f"gated: the hub asks for an accepted licence and a login ({status})"
        return HubError(subject, cause, transient=False)
    if status == 401 and "credentials" in said:
        return HubError(subject, "the hub does not accept the token (401)", transient=False)
    if status == 401:
        return HubError(subject, "unknown to the hub, or private (401)", transient=False)
    if status == 404:
        return HubError(subject, f"not found on the hub ({code or 404})", transient=False)
    if status == 416:
        cause = f"the file has changed since it was listed (416, {headers.get('Content-Range')})"
        return HubError(subject, cause, transient=False)
    wait = _asked_wait(status, headers)
    cause = f"{storage or 'the hub'} answers {status}"
    if status == 429:
        cause = f"{storage or 'the hub'} asks to slow down (429)"
    if wait is not None:
        cause += f" and asks to wait {wait:.0f} s"
    transient = status in (408, 429) or status >= 500
    return HubError(subject, cause, transient=transient, retry_after=wait)


def _asked_wait(status: int, headers: Any) -> float | None:
    """Seconds to wait before the next try, if the answer names them."""
    if status not in (429, 503):
        return None
    asked = headers.get("Retry-After", "").strip()
    if asked.isdigit():
        return float(asked)
    if asked:
        try:
            until = email.utils.parsedate_to_datetime(asked)
        except ValueError:
            return None
        return max(until.timestamp() - time.time(), 0.0)
    # Source: draft-ietf-httpapi-ratelimit-headers, as the hub uses it: "api";r=0;t=55
    limited = re.search(r"\br\s*=\s*0\s*;\s*t\s*=\s*(\d+)", headers.get("RateLimit", ""))
    return float(limited[1]) if limited else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
