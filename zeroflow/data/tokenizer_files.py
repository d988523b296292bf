"""The directory of a tokenizer: its manifest, and checks of its files."""

import json
import logging
from importlib.metadata import version
from pathlib import Path
from typing import Self

import tokenizers
from pydantic import Field

from zeroflow import artifacts
from zeroflow.artifacts import FileRecord
from zeroflow.config import Config
from zeroflow.data import bpe, encoding
from zeroflow.data.corpus import CorpusIdentity
from zeroflow.data.encoding import EncoderName
from zeroflow.reuse import Fields

log = logging.getLogger(__name__)

_USUAL_ENDS = (bpe.END_OF_TEXT, "<|endoftext|>", "</s>", "<eos>")


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
    """Everything that it depends on, for information; absent in manifests of earlier versions."""

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
    file = folder / "tokenizer.json"
    if not file.exists():
        _convert(folder, name)
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no narrower class
        raise ValueError(
            f"--tokenizer-name {name}: {file.name} is not a valid tokenizer ({error})"
        ) from error
    end_of_text = _end_of_text(folder, tokenizer, name, end_token)
    _warn_of_special_pieces(tokenizer)
    given = {"revision": revision, "corpus": corpus}
    manifest = TokenizerManifest(
        identity=identity,
        **{name: value for name, value in given.items() if value is not None},
        name=name,
        # one more than the highest id, as a vocabulary may have gaps
        vocab_size=max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1,
        end_of_text=end_of_text,
        asked_end=end_token,
        fingerprint=artifacts.fingerprint([artifacts.file_sha256(file), end_of_text]),
        encoder=EncoderChoice.make(folder),
    )
    artifacts.seal(folder, manifest.model_dump(mode="json", exclude_unset=True))


def _convert(folder: Path, name: str) -> None:
    """Write tokenizer.json for a tokenizer in another format.

    Raises:
        ValueError: transformers cannot convert it.
    """
    from transformers import AutoTokenizer  # slow to import, and rarely needed

    try:
        AutoTokenizer.from_pretrained(folder, use_fast=True).backend_tokenizer.save(
            str(folder / "tokenizer.json")
        )
    except Exception as error:
        raise ValueError(
            f"{name} has no tokenizer.json, and its files cannot be converted: {error}"
        ) from error


def _end_of_text(
    folder: Path, tokenizer: tokenizers.Tokenizer, name: str, end_token: str | None
) -> int:
    """Id of the token that ends documents: the requested, the declared, or a usual one.

    Raises:
        ValueError: the vocabulary has no such token.
    """
    token = end_token
    settings = folder / "tokenizer_config.json"
    if token is None and settings.exists():
        declared = json.loads(settings.read_text(encoding="utf-8")).get("eos_token")
        token = declared.get("content") if isinstance(declared, dict) else declared
    candidates = [token] if token else _USUAL_ENDS
    for candidate in candidates:
        if (found := tokenizer.token_to_id(candidate)) is not None:
            return found
    raise ValueError(
        f"{name} has no token {' or '.join(candidates)} to end a document: "
        "set one with --end-of-text"
    )


def _warn_of_special_pieces(tokenizer: tokenizers.Tokenizer) -> None:
    """Warn if a text that spells out a special token gets that token's id.

    Unigram models contain special tokens as ordinary pieces.
    """
    tokenizer.encode_special_tokens = True
    special = {n: t.content for n, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    confused = [
        text
        for id_, text in special.items()
        if id_ in tokenizer.encode(text, add_special_tokens=False).ids
    ]
    if confused:
        log.warning(
            "this tokenizer encodes text that spells out %s as special tokens: a document that "
            "contains the token that ends documents will be refused",
            ", ".join(confused[:9]),
        )
