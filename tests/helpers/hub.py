"""A small replacement of the Hugging Face Hub on loopback, and repositories for it.

    with Hub([fineweb_edu_repo(), llama_tokenizer_repo()]) as hub:
        ...  # run something with HF_ENDPOINT=hub.url

`huggingface_hub` and `datasets` read HF_ENDPOINT when they are imported, so set it before, or use a
separate process.
"""

import base64
import hashlib
import io
import json
import random
import re
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from email.message import Message
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from threading import Event, Thread
from typing import Any, Literal, Self
from urllib.parse import parse_qs, unquote

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TOKEN = "hf_test"
"""The only access token that opens gated repositories."""

BEGIN_OF_TEXT, END_OF_TEXT = "<|begin_of_text|>", "<|end_of_text|>"

# Source: the pre_tokenizer in tokenizer.json of meta-llama/Llama-3.1-8B.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Repo:
    """A repository with one revision."""

    kind: Literal["dataset", "model"]

    name: str
    """Owner and name: `meta-llama/Llama-3.1-8B`."""

    files: Mapping[str, bytes] | Path
    """Contents by path within the repository, or a folder with the files."""

    gated: bool = False
    """True if its files need `TOKEN`; its description and list of files do not, as on the Hub."""

    @cached_property
    def contents(self) -> dict[str, bytes]:
        if isinstance(self.files, Path):
            paths = sorted(path for path in self.files.rglob("*") if path.is_file())
            return {path.relative_to(self.files).as_posix(): path.read_bytes() for path in paths}
        return dict(sorted(self.files.items()))

    @cached_property
    def oids(self) -> dict[str, str]:
        """Git's hash of the contents of each file."""
        return {
            path: hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            for path, data in self.contents.items()
        }

    @cached_property
    def sha(self) -> str:
        """The revision; equal contents have equal revisions."""
        return hashlib.sha1(json.dumps(self.oids).encode()).hexdigest()

    def info(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "sha": self.sha,
            "private": False,
            "disabled": False,
            "gated": "manual" if self.gated else False,
            "lastModified": "2024-01-01T00:00:00.000Z",
            "tags": [],
            "siblings": [{"rfilename": path} for path in self.contents],
        }

    def tree(self, folder: str, *, recursive: bool) -> list[dict[str, Any]]:
        """Files and folders below `folder`; empty if there is no such folder."""
        root = PurePosixPath(folder)
        entries = {}
        for path, data in self.contents.items():
            for parent in PurePosixPath(path).parents:
                if parent != root and parent.is_relative_to(root):
                    oid = hashlib.sha1(str(parent).encode()).hexdigest()
                    entries[parent] = {"type": "directory", "oid": oid, "size": 0}
            if PurePosixPath(path).parent.is_relative_to(root):
                file = {"type": "file", "oid": self.oids[path], "size": len(data)}
                entries[PurePosixPath(path)] = file
        return [
            entry | {"path": str(path)}
            for path, entry in sorted(entries.items())
            if recursive or path.parent == root
        ]


@dataclass(frozen=True)
class Fault:
    """Fault of one answer. For a slow answer, let the hook sleep."""

    status: int | None = None
    """Status to send instead of the real answer, without a body."""

    headers: Mapping[str, str] = field(default_factory=dict)
    """Headers to add to the answer; they replace its own headers of the same name."""

    drop_after_bytes: int | None = None
    """Close the connection after this many bytes of the body; Content-Length is the full length."""

    stall_after_bytes: int | None = None
    """Stop sending after this many bytes of the body, until the hub closes."""

    truncate_to_bytes: int | None = None
    """Length of a truncated body; Content-Length agrees with it."""

    bytes_per_second: float | None = None
    """Speed of the body."""

    ignore_range: bool = False
    """Answer with the whole file, as servers do behind some proxies."""


class Hub:
    """Serves `repos` within the `with` block; at its end, open connections are closed."""

    token = TOKEN

    def __init__(self, repos: Iterable[Repo], port: int = 0) -> None:
        self.repos: dict[tuple[str, str], Repo] = {(repo.kind, repo.name): repo for repo in repos}
        self.requests: list[tuple[str, str]] = []
        """Method and path, without the query, of every request."""
        self.fault: Callable[[str, str, Message], Fault | None] | None = None
        """Called with method, path and headers (in any case) before each answer."""
        self.created: dict[str, dict[str, Any]] = {}
        """What was asked for each new repository, by its name."""
        self.page_entries = 1000
        """Maximum number of files and folders in one page of a list."""
        self._server = _Server(self, port)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    def __init__(self, hub: Hub, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.hub = hub
        self.closed = Event()
        self.connections: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        self.closed.set()
        # Otherwise a client that keeps its connection would still be served
        for connection in list(self.connections):
            with suppress(OSError):  # the client may have closed the connection first
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # Clients that stop reading half-way are part of the tests; errors in a hook are not
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@dataclass(frozen=True)
class _Answer:
    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


def _json(content: Any, headers: Mapping[str, str] | None = None) -> _Answer:
    kind = {"Content-Type": "application/json"}
    return _Answer(200, json.dumps(content).encode(), kind | dict(headers or {}))


def _error(status: int, code: str, message: str) -> _Answer:
    headers = {"X-Error-Code": code, "X-Error-Message": message}
    return _Answer(status, json.dumps({"error": message}).encode(), headers)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise each body waits 40 ms for the headers' ACK

    API = re.compile(r"/api/(dataset|model)s/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.+))?)?")
    FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
    UPLOAD = re.compile(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main")

    def do_GET(self) -> None:
        hub = self.server.hub
        path, _, query = self.path.partition("?")
        hub.requests.append((self.command, unquote(path)))
        # Always read the body, which would otherwise be read as the next request
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = hub.fault(self.command, unquote(path), self.headers) if hub.fault else None
        fault = fault or Fault()
        if fault.ignore_range:
            del self.headers["Range"]
        answer = self._answer(path, query) if fault.status is None else _Answer(fault.status)
        self._send(answer, fault)

    do_HEAD = do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing; see `Hub.requests`."""

    def _answer(self, path: str, query: str) -> _Answer:
        if self.command == "POST":
            return self._accept(path)
        if match := self.API.fullmatch(path):
            kind, name, what, revision, folder = match.groups()
        elif match := self.FILE.fullmatch(path):
            datasets, name, revision, file = match.groups()
            kind, what = "dataset" if datasets else "model", "file"
        else:
            return _Answer(404)

        repo = self.server.hub.repos.get((kind, name))
        if repo is None:
            # Without a login, the Hub does not reveal whether a repository exists
            status = 404 if "Authorization" in self.headers else 401
            return _error(status, "RepoNotFound", "Repository not found")
        if revision is not None and unquote(revision) not in ("main", repo.sha):
            return _error(404, "RevisionNotFound", f"Invalid rev id: {unquote(revision)}")
        if what == "file":
            return self._file(repo, unquote(file))
        if what == "tree":
            recursive = parse_qs(query).get("recursive", [""])[0].lower() in ("true", "1")
            entries = repo.tree(unquote(folder or ""), recursive=recursive)
            if not entries:
                return _error(404, "EntryNotFound", "Entry not found")
            first = int(parse_qs(query).get("cursor", ["0"])[0])
            end = first + self.server.hub.page_entries
            following = f"{self.server.hub.url}{path}?recursive={recursive}&cursor={end}"
            links = {"Link": f'<{following}>; rel="next"'} if end < len(entries) else {}
            return _json(entries[first:end], links)
        return _json(repo.info())

    def _accept(self, path: str) -> _Answer:
        """Answer the requests of an upload; the hub takes every file within the commit itself."""
        if path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return _error(401, "", "Invalid credentials")
        hub = self.server.hub
        if path == "/api/repos/create":
            asked = json.loads(self.body)
            name = f"{asked['organization']}/{asked['name']}"
            if ("model", name) in hub.repos:
                return _Answer(409, json.dumps({"url": f"{hub.url}/{name}"}).encode())
            hub.repos["model", name] = Repo("model", name, {})
            hub.created[name] = asked
            return _json({"url": f"{hub.url}/{name}"})
        if not (match := self.UPLOAD.fullmatch(path)):
            return _Answer(404)
        name, what = match.groups()
        if what == "preupload":
            files = json.loads(self.body)["files"]
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            return _json({"files": [{"path": file["path"], **modes} for file in files]})
        lines = [json.loads(line) for line in self.body.splitlines()]
        added = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        repo = Repo("model", name, {**hub.repos["model", name].contents, **added})
        hub.repos["model", name] = repo
        return _json({"commitUrl": f"{hub.url}/{name}/commit/{repo.sha}", "commitOid": repo.sha})

    def _file(self, repo: Repo, path: str) -> _Answer:
        if repo.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return _error(401, "GatedRepo", f"Access to {repo.name} is restricted: please log in.")
        if path not in repo.contents:
            return _error(404, "EntryNotFound", "Entry not found")
        body = repo.contents[path]
        headers = {
            "Content-Type": "application/octet-stream",
            "Accept-Ranges": "bytes",
            "ETag": f'"{repo.oids[path]}"',
            "X-Repo-Commit": repo.sha,
            "X-Linked-Etag": f'"{repo.oids[path]}"',
            "X-Linked-Size": str(len(body)),
        }
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not asked or not any(asked.groups()):
            return _Answer(200, body, headers)
        if asked[1]:
            first, last = int(asked[1]), min(int(asked[2] or len(body)), len(body) - 1)
        else:  # bytes=-N requests the last N bytes
            first, last = max(len(body) - int(asked[2]), 0), len(body) - 1
        if first > last:
            return _Answer(416, b"", headers | {"Content-Range": f"bytes */{len(body)}"})
        part = {"Content-Range": f"bytes {first}-{last}/{len(body)}"}
        return _Answer(206, body[first : last + 1], headers | part)

    def _send(self, answer: _Answer, fault: Fault) -> None:
        body = answer.body[: fault.truncate_to_bytes]
        headers = {"Content-Length": str(len(body)), **answer.headers, **fault.headers}
        self.send_response(answer.status, HTTPStatus(answer.status).phrase)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self._write(body[: fault.drop_after_bytes][: fault.stall_after_bytes], fault)
        if fault.stall_after_bytes is not None:
            self.server.closed.wait()
        if fault.drop_after_bytes is not None or fault.stall_after_bytes is not None:
            self.close_connection = True

    def _write(self, body: bytes, fault: Fault) -> None:
        if fault.bytes_per_second is None:
            self.wfile.write(body)
            return
        pause = 0.02
        piece = max(int(fault.bytes_per_second * pause), 1)
        for start in range(0, len(body), piece):
            self.wfile.write(body[start : start + piece])
            time.sleep(pause)


_SUBJECTS = ["river", "teacher", "child", "engine", "forest", "planet", "farmer", "student"]
_VERBS = ["moves", "changes", "measures", "explains", "needs", "protects", "carries", "builds"]
_QUALITIES = ["small", "old", "bright", "common", "important", "natural", "simple", "early"]
_OBJECTS = ["water", "energy", "history", "soil", "light", "number", "language", "machine"]
_PLACES = ["near the sea", "in the north", "after the war", "during winter", "at school"]
_SYLLABLES = ["ka", "ro", "mi", "ten", "sul", "ba", "ne", "lor", "vi", "dan"]


def english(rng: random.Random) -> str:
    """Return a few hundred words that a tiny model can learn: each subject has its own verbs."""
    sentences = []
    for _ in range(rng.randint(20, 40)):
        subject = rng.randrange(len(_SUBJECTS))
        verb = _VERBS[(subject + rng.randrange(2)) % len(_VERBS)]
        thing = f"the {rng.choice(_QUALITIES)} {rng.choice(_OBJECTS)}"
        name = "".join(rng.choices(_SYLLABLES, k=3)).title()
        place = rng.choice([*_PLACES, f"in {rng.randrange(1200, 2020)}", f"with {name}"])
        sentences.append(f"The {_SUBJECTS[subject]} {verb} {thing} {place}.")
    paragraphs = [" ".join(sentences[start : start + 8]) for start in range(0, len(sentences), 8)]
    return "\n\n".join(paragraphs)


def fineweb_edu_repo(documents: int = 400, files: int = 2, seed: int = 0) -> Repo:
    """A small FineWeb-Edu: `documents` in `files` files of `sample-10BT`, and 10 in `default`."""
    rng = random.Random(seed)
    cuts = [documents * file // files for file in range(files + 1)]
    samples = {
        f"sample/10BT/{file:03}_00000.parquet": _parquet(cuts[file + 1] - cuts[file], rng)
        for file in range(files)
    }
    crawl = {"data/CC-MAIN-2024-10/train-00000-of-00001.parquet": _parquet(10, rng)}
    readme = {"README.md": _FINEWEB_EDU_README.encode()}
    return Repo("dataset", "HuggingFaceFW/fineweb-edu", readme | crawl | samples)


_FINEWEB_EDU_README = """\
---
license: odc-by
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
- config_name: CC-MAIN-2024-10
  data_files:
  - split: train
    path: data/CC-MAIN-2024-10/*
---
# FineWeb-Edu
"""


def _parquet(documents: int, rng: random.Random) -> bytes:
    rows = [_row(rng) for _ in range(documents)]
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out, row_group_size=100)  # several, as in the real
    return out.getvalue()


def _row(rng: random.Random) -> dict[str, Any]:
    text = english(rng)
    score = rng.uniform(2.5, 5)
    return {
        "text": text,
        "id": f"<urn:uuid:{uuid.UUID(int=rng.getrandbits(128))}>",
        "dump": "CC-MAIN-2024-10",
        "url": f"https://example.org/{rng.getrandbits(32)}",
        "file_path": "s3://commoncrawl/crawl-data/CC-MAIN-2024-10/example.warc.gz",
        "language": "en",
        "language_score": rng.uniform(0.65, 1),
        "token_count": len(text.split()),
        "score": score,
        "int_score": round(score),
    }


def llama_tokenizer_repo(
    name: str = "meta-llama/Llama-3.1-8B", vocab_size: int = 512, gated: bool = True
) -> Repo:
    """A small tokenizer with the structure of Llama 3's: bytes, merges, two special tokens.

    Its vocabulary has exactly `vocab_size` tokens; texts of `english` have enough pairs for 1,024.
    Like Llama's, it adds `BEGIN_OF_TEXT` before every text by default.
    """
    special = [BEGIN_OF_TEXT, END_OF_TEXT]
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(0)
    tokenizer.train_from_iterator((english(rng) for _ in range(200)), trainer)
    tokenizer.add_special_tokens(special)  # after the merges: in Llama 3 they have the last ids
    assert tokenizer.get_vocab_size() == vocab_size, tokenizer.get_vocab_size()
    ids = {token: tokenizer.token_to_id(token) for token in special}
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BEGIN_OF_TEXT} $A",
                pair=f"{BEGIN_OF_TEXT} $A {BEGIN_OF_TEXT}:1 $B:1",
                special_tokens=list(ids.items()),
            ),
        ]
    )

    names = {"bos_token": BEGIN_OF_TEXT, "eos_token": END_OF_TEXT}
    tokenizer_config = names | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 131072,
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(),
        "bos_token_id": ids[BEGIN_OF_TEXT],
        "eos_token_id": ids[END_OF_TEXT],
    }
    files = {
        "config.json": json.dumps(config, indent=2).encode(),
        "special_tokens_map.json": json.dumps(names, indent=2).encode(),
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": json.dumps(tokenizer_config, indent=2).encode(),
        "model.safetensors": b"not weights: nothing should fetch this file",
    }
    return Repo("model", name, files, gated=gated)
