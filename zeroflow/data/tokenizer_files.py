"""The directory of a tokenizer: its manifest, and checks of its files."""

import codecs
import json
import logging
from importlib.metadata import version
from pathlib import Path
from typing import Self

import tokenizers
from pydantic import Field

from zeroflow import artifacts
from zeroflow.artifacts import FileRecord, JsonObject
from zeroflow.config import Config
from zeroflow.data import bpe, encoding
from zeroflow.data.corpus import CorpusIdentity
from zeroflow.data.encoding import EncoderName
from zeroflow.reuse import Fields

log = logging.getLogger(__name__)

_CONFIG, _SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"

_USUAL_ENDS = (bpe.END_OF_TEXT, "<|endoftext|>", "</s>", "<eos>")
"""End-of-text tokens to look for if the files of a tokenizer name none."""


class EncoderChoice(Config):
    """The library that encodes documents, and the reason for the choice."""

    name: EncoderName
    reason: str
    compared_with: str
    """Version of fastokens that was compared with Hugging Face's library."""

    @classmethod
    def make(cls, folder: Path) -> Self:
        name, reason = encoding.choose(folder / "tokenizer.json")
        log.info("documents are encoded by %s: %s", name, reason)
        return cls(name=name, reason=reason, compared_with=version("fastokens"))


class TokenizerManifest(Config):
    """manifest.json of a tokenizer's directory."""

    identity: Fields | None = None
    """Everything that the tokenizer depends on, for messages; absent in earlier versions."""

    revision: str | None = None
    """Commit, for a tokenizer from the hub."""

    corpus: CorpusIdentity | None = None
    """Corpus, for a trained tokenizer."""

    name: str
    vocab_size: int
    end_of_text: int
    asked_end: str | None
    fingerprint: str
    encoder: EncoderChoice
    files: dict[str, FileRecord] = Field(default_factory=dict)
    """Added by `artifacts.seal`."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """
        Raises:
            DamagedArtifact: the manifest is missing or damaged.
        """
        return cls.model_validate(artifacts.read_signed(folder / artifacts.MANIFEST))

    @classmethod
    def verified(cls, folder: Path) -> Self | None:
        """The manifest of a directory that exists and verifies; otherwise None."""
        try:
            return cls.model_validate(artifacts.verify(folder))
        except ValueError:
            return None  # absent, of another version, or damaged: `fetch_tokenizer` sets it aside


def seal_tokenizer(
    folder: Path,
    name: str,
    *,
    end_token: str | None,
    identity: Fields,
    revision: str | None = None,
    corpus: CorpusIdentity | None = None,
) -> None:
    """Check the files of a tokenizer in `folder`, and write their manifest.

    Args:
        name: the tokenizer's name in the settings.
        end_token: the requested token to end documents; None for the tokenizer's own.

    Raises:
        ValueError: the folder has no tokenizer, or it has no token that ends a document.
    """
    tokenizer, end_of_text = _load(folder, name, end_token)
    _warn_of_dropout(tokenizer, name)
    file = folder / "tokenizer.json"
    _warn_of_special_pieces(encoding.plain(file))
    given = {"revision": revision, "corpus": corpus}
    depends_on = [artifacts.file_sha256(file), end_of_text]
    if encoding.dropout(tokenizer):
        # Shards of earlier versions, which encoded with dropout, must not be reused
        depends_on.append("no dropout")
    manifest = TokenizerManifest(
        identity=identity,
        **{name: value for name, value in given.items() if value is not None},
        name=name,
        vocab_size=_vocab_size(tokenizer),
        end_of_text=end_of_text,
        asked_end=end_token,
        fingerprint=artifacts.fingerprint(depends_on),
        encoder=EncoderChoice.make(folder),
    )
    artifacts.seal(folder, manifest.model_dump(mode="json", exclude_unset=True))


def inspect_tokenizer(folder: Path, name: str, end_token: str | None) -> int:
    """Return the vocabulary size of the tokenizer in `folder`, as its manifest would have it.

    Raises:
        ValueError: as `seal_tokenizer` does.
    """
    tokenizer, _ = _load(folder, name, end_token)
    return _vocab_size(tokenizer)


def _load(folder: Path, name: str, end_token: str | None) -> tuple[tokenizers.Tokenizer, int]:
    """Load a tokenizer and the id that ends documents.

    tokenizer.json is written first if the tokenizer comes in another form.
    """
    settings = {file: _settings(folder / file, name) for file in (_CONFIG, _SPECIAL_TOKENS)}
    file = folder / "tokenizer.json"
    if not file.exists():
        _convert(folder, name, settings[_CONFIG])
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no narrower class
        why = "save it as UTF-8 without a byte-order mark" if _has_mark(file) else str(error)
        raise ValueError(
            f"--tokenizer-name {name}: {file.name} is not a valid tokenizer ({why})"
        ) from error
    return tokenizer, _end_of_text(tokenizer, name, end_token or _declared_end(settings, name))


def _vocab_size(tokenizer: tokenizers.Tokenizer) -> int:
    """Return one more than the highest id, as a vocabulary may have gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def _has_mark(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(3).startswith(
            (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        )


def _settings(file: Path, name: str) -> JsonObject:
    """The contents of a JSON file of settings; nothing if it does not exist.

    Raises:
        ValueError: the file does not contain a JSON object.
    """
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_bytes())  # bytes: a byte-order mark is understood
    except ValueError as error:
        raise ValueError(
            f"--tokenizer-name {name}: {file.name} is not valid JSON ({error}): fix or remove it"
        ) from error
    if not isinstance(content, dict):
        kind = "a list" if isinstance(content, list) else type(content).__name__
        raise ValueError(
            f"--tokenizer-name {name}: {file.name} contains {kind} instead of settings by name, as "
            'in {"eos_token": "</s>"}: fix or remove it'
        )
    return content


def _convert(folder: Path, name: str, config: JsonObject) -> None:
    """Write tokenizer.json for a tokenizer that comes in another form.

    Raises:
        ValueError: files are missing, or transformers cannot convert them or would need Python code
            that comes with them.
    """
    if "auto_map" not in config:
        require_vocabulary(folder, name)
    from transformers import AutoTokenizer  # slow to import, and rarely needed

    try:
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False).backend_tokenizer.save(
            str(folder / "tokenizer.json")
        )
    except Exception as error:
        if "auto_map" in config:
            raise ValueError(
                f"{name} has no tokenizer.json, and its own Python code, which {_CONFIG} names "
                "(auto_map), is not run: if you trust that code, use it to save a tokenizer.json, "
                "and name the folder of that file"
            ) from error
        why = " ".join(str(error).split())
        if "tokenizer_class" not in config:
            why = (
                f'{_CONFIG} does not name their class: add it, as in {{"tokenizer_class": '
                '"GPT2Tokenizer"}'
            )
        raise ValueError(
            f"{name} has no tokenizer.json, and its files cannot be converted: {why}"
        ) from error


def require_vocabulary(folder: Path, name: str) -> None:
    """Check that `folder` has the files of a tokenizer, before a library opens it.

    transformers names other causes if they are missing, or makes an empty tokenizer.

    Args:
        name: name of the tokenizer or model, for the message.

    Raises:
        ValueError: files are missing.
    """
    names = {path.name for path in folder.iterdir()}
    pair = {"vocab.json", "merges.txt"}
    whole = {"tokenizer.json", "vocab.txt"} & names or pair <= names
    if whole or any(file.endswith((".model", ".tiktoken")) for file in names):
        return
    if half := pair & names:
        missing = f"{min(half)} without {min(pair - half)}, and no tokenizer.json"
    else:
        missing = (
            "no tokenizer.json, and no tokenizer.model, vocab.txt or vocab.json with merges.txt"
        )
    raise ValueError(
        f"{name} has {missing}: name another one, or write these files with the tokenizer's "
        "save_pretrained()"
    )


def _declared_end(settings: dict[str, JsonObject], name: str) -> str | None:
    """The token that the tokenizer's own files name as its end; None if they name none.

    Raises:
        ValueError: they name something that is not a token.
    """
    for file, content in settings.items():
        declared = content.get("eos_token")
        token = declared.get("content") if isinstance(declared, dict) else declared
        if token is not None and not isinstance(token, str):
            raise ValueError(
                f"--tokenizer-name {name}: eos_token in {file} is {token!r}, not a token: fix "
                "it, or set the token with --end-of-text"
            )
        if token:
            return token
    return None


def _end_of_text(tokenizer: tokenizers.Tokenizer, name: str, token: str | None) -> int:
    """The id of the token that ends documents, or of a usual one if none is named.

    Raises:
        ValueError: the vocabulary has no such token.
    """
    candidates = [token] if token else _USUAL_ENDS
    for candidate in candidates:
        if (found := tokenizer.token_to_id(candidate)) is not None:
            return found
    raise ValueError(
        f"{name} has no token {' or '.join(candidates)} to end a document: "
        "set one with --end-of-text"
    )


def _warn_of_dropout(tokenizer: tokenizers.Tokenizer, name: str) -> None:
    if share := encoding.dropout(tokenizer):
        log.warning(
            "%s skips %g of its merges at random (BPE dropout), so that a text has different ids "
            "each time: dropout is disabled, in training and in exports",
            name,
            share,
        )


def _warn_of_special_pieces(tokenizer: tokenizers.Tokenizer) -> None:
    """Warn if a text that spells out a special token gets that token's id.

    Unigram models contain special tokens as ordinary pieces.
    """
    special = {n: t.content for n, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    confused = [
        text
        for id_, text in special.items()
        if id_ in tokenizer.encode(text, add_special_tokens=False).ids
    ]
    if confused:
        log.warning(
            "this tokenizer encodes text that spells out %s as special tokens: a document with the "
            "end-of-text token in its text will be refused",
            ", ".join(confused[:9]),
        )
