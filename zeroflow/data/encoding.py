"""Encoding of text with the fastest library that gives the same ids as Hugging Face's.

`choose` compares the libraries for a tokenizer on a few thousand difficult strings. If a document
spells out a special token, every encoder treats it as text, and never returns the id of that token.
"""

import json
import logging
import os
import random
import subprocess
import sys
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import fastokens
import numpy as np
import numpy.typing as npt
import tokenizers

from zeroflow import artifacts
from zeroflow.data import allocator

log = logging.getLogger(__name__)

EncoderName = Literal["fastokens", "tokenizers"]

_FUZZED = 3000
"""Number of random strings to compare."""

# Building blocks of difficult strings: white space, control and combining characters, and texts on
# which pre-tokenizers have differed
_WHITESPACE = " \t\n\r\x0b\x0c\x1c\x85\xa0\u1680\u2003\u2009\u200b\u2028\u2029\u202f\u3000\ufeff"
_OTHERS = "\x00\x01\x7f\u0301\u0308\u200d\ufe0f\ufffd\U0001f600\U0001f468\U0001f3fd\U0010ffff"
_PIECES = (
    *(
        "don't I'LL we'Ve 'S ''s it’s",
        "1234567 3.14 1,000 ½ ²",
        "http://a.b/c?d=e&f=%20",
        "ﬁ ǅ ß İ",
    ),
    *(
        "\r\n\r\n",
        "\n \n\t\n",
        "  x",
        "...",
        "»«",
        "<|",
        "|>",
        "</",
        "[INST]",
        "def f(x):\n\treturn",
    ),
    *(
        "日本語の文章",
        "한국어",
        "العربية",
        "हिन्दी",
        "ไทย",
        "Ελληνικά",
        "עברית",
        "ქართული",
        "𝔘𝔫𝔦",
        "🇫🇷👩‍👩‍👧",
    ),
)


class Encoded(NamedTuple):
    """The ids of documents, end to end."""

    ids: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]


class Encoder(Protocol):
    def encode(self, texts: list[str]) -> Encoded:
        """Return the ids of `texts`, which must not contain lone surrogates; no special tokens.

        Several threads may call this. The fast library keeps a cache of words for each thread.
        """
        ...

    def decode(self, ids: list[list[int]]) -> list[str]:
        """Return the decoded texts, without unknown tokens."""
        ...


class _HuggingFace:
    def __init__(self, file: Path) -> None:
        self._tokenizer = plain(file)
        self._unknown = unknown_id(self._tokenizer)

    def added_tokens(self) -> list[str]:
        return [t.content for t in self._tokenizer.get_added_tokens_decoder().values()]

    def encode(self, texts: list[str]) -> Encoded:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        lengths = np.array([len(part) for part in ids], dtype=np.int64)
        return Encoded(np.concatenate([*ids, np.empty(0, np.int32)]), lengths)

    def decode(self, ids: list[list[int]]) -> list[str]:
        known = [[id_ for id_ in text if id_ != self._unknown] for text in ids]
        return self._tokenizer.decode_batch(known, skip_special_tokens=False)


class _Fastokens:
    def __init__(self, file: Path) -> None:
        # One thread per call: several parts are built at once, each in a thread that calls this
        # library, and additional threads would mostly wait for each other
        os.environ["FASTOKENS_BPE_THREADS"] = "1"
        self._tokenizer = fastokens.Tokenizer.from_file(str(file))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, texts: list[str]) -> Encoded:
        ids, ends = self._tokenizer.encode_batch_flat(texts, split_special_tokens=True)
        offsets = np.frombuffer(ends, np.uint64).astype(np.int64)
        return Encoded(np.frombuffer(ids, np.int32), offsets[1:] - offsets[:-1])

    def decode(self, ids: list[list[int]]) -> list[str]:
        # This library is chosen only for byte-level tokenizers, which have no unknown token
        return list(self._tokenizer.decode_batch(ids, False))


_loaded: dict[tuple[str, EncoderName], Encoder] = {}
_loading = threading.Lock()


def plain(file: Path) -> tokenizers.Tokenizer:
    """Load Hugging Face's tokenizer, configured so that the ids of a text depend on the text only.

    Truncation, padding and dropout are off, and special tokens that a text spells out are encoded
    as text.
    """
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if dropout(tokenizer):
        tokenizer.model.dropout = None
    tokenizer.encode_special_tokens = True
    return tokenizer


def dropout(tokenizer: tokenizers.Tokenizer) -> float:
    """Return the share of merges that a BPE skips at random, which makes ids non-deterministic."""
    return getattr(tokenizer.model, "dropout", None) or 0.0


def unknown_id(tokenizer: tokenizers.Tokenizer) -> int | None:
    """Return the id that replaces text outside the vocabulary; None if there is none."""
    model = tokenizer.model
    if isinstance(model, tokenizers.models.Unigram):
        found: int | None = json.loads(model.__getstate__())["unk_id"]
        return found
    token = model.unk_token
    return None if token is None else tokenizer.token_to_id(token)


def choose(file: Path) -> tuple[EncoderName, str]:
    """Return the encoder for a tokenizer.json, and the reason for the choice.

    The comparison runs in a child process. Otherwise this process would keep the memory of both
    libraries, and a tokenizer that crashes the fast library would end it.
    """
    # The child must import the same modules as this process
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", __name__, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode == 0:
        name, reason = json.loads(done.stdout)
        return name, reason
    last = done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"
    return "tokenizers", f"the comparison with {_fast_version()} failed: {last[:200]}"


def compare(file: Path) -> tuple[EncoderName, str]:
    """Return the result of `choose`, computed in this process."""
    if dropout(tokenizers.Tokenizer.from_file(str(file))):
        return "tokenizers", f"{_fast_version()} cannot disable the dropout of merges"
    reference = _HuggingFace(file)
    texts = hard_strings(reference.added_tokens())
    expected = reference.encode(texts)
    del reference
    fast = _fast_version()
    try:
        found = _Fastokens(file).encode(texts)
    except BaseException as error:  # a panic of the Rust library is not a subclass of Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return "tokenizers", f"{fast} cannot load this tokenizer: {str(error)[:200]}"
    if not np.array_equal(found.lengths, expected.lengths) or not np.array_equal(
        found.ids, expected.ids
    ):
        return "tokenizers", f"{fast} gives different ids for some of {len(texts)} test strings"
    return "fastokens", f"{fast} gives the same ids for {len(texts)} test strings"


def _fast_version() -> str:
    return f"fastokens {version('fastokens')}"


def load(file: Path, name: EncoderName) -> Encoder:
    """Return the encoder called `name` for a tokenizer.json.

    It stays in memory, because a vocabulary of 128,000 tokens takes most of a second to load.
    """
    key = (artifacts.file_sha256(file), name)
    with _loading:
        if key not in _loaded:
            _loaded.clear()  # a process uses one at a time, and each takes 150 MB
            _loaded[key] = _Fastokens(file) if name == "fastokens" else _HuggingFace(file)
            allocator.give_back()
        return _loaded[key]


def hard_strings(special: list[str]) -> list[str]:
    """Return strings on which tokenizers are known to differ, and random mixtures of them.

    The strings are the same on every call.

    Args:
        special: the tokenizer's special tokens, which a text may spell out.
    """
    rng = random.Random(0)
    texts = ["", *_PIECES, *_WHITESPACE, *_OTHERS, "a\ufffdb", "\x00" * 99]
    texts += [f"{a}{token}{b}" for token in special for a, b in (("", ""), ("x", "y"), (" ", " "))]
    texts += [letter * 60_000 for letter in "a 1\n"] + ["ab" * 20_000, "é" * 5000, "\r\n" * 5000]
    alphabets = [_WHITESPACE, _OTHERS, "".join(map(chr, range(32, 127))), *_scripts()]
    for _ in range(_FUZZED):
        parts = []
        for _ in range(rng.randint(1, 8)):
            match rng.randrange(4):
                case 0:
                    parts.append(rng.choice(_PIECES))
                case 1 if special:
                    parts.append(rng.choice(special))
                case _:
                    parts.append("".join(rng.choices(rng.choice(alphabets), k=rng.randint(1, 12))))
        texts.append("".join(parts))
    return texts


def _scripts() -> list[str]:
    """Return runs of 64 neighbouring characters, spread over Unicode."""
    starts = [
        *range(0x80, 0x3000, 0x40),
        *range(0x3000, 0xD800, 0x400),
        *range(0xE000, 0x10000, 64),
    ]
    starts += range(0x10000, min(0x20000, sys.maxunicode), 0x100)
    return ["".join(map(chr, range(start, start + 64))) for start in starts]


if __name__ == "__main__":
    json.dump(compare(Path(sys.argv[1])), sys.stdout)
