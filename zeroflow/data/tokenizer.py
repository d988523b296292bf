"""Tokenizers: fetched at a pinned revision, taken from a folder, or trained; then loaded.

Whatever its origin, a tokenizer becomes a directory under `<cache>/tokenizers/` that holds a
`tokenizer.json`, is complete or absent, and is described by `Tokenizer`.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from pydantic import Field
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from zeroflow import artifacts, reuse
from zeroflow.config import Config
from zeroflow.data import encoding, hub
from zeroflow.data.corpus import (
    CorpusConfig,
    corpus_identity,
    file_digests,
    first_bytes,
    read_documents,
)
from zeroflow.data.encoding import Encoder, EncoderName
from zeroflow.reuse import Fields, StageResult
from zeroflow.run_folder import Cache

log = logging.getLogger(__name__)

LLAMA_TOKENIZER = "meta-llama/Llama-3.1-8B"
TRAINED_TOKENIZER = "train"
SYNTHETIC_TOKENIZER = "synthetic"
"""Name of the tokenizer that synthetic data does without."""

_FORMAT = 2
_LLAMA_VOCABULARY = 128_256
_END_OF_TEXT = "<|end_of_text|>"
_USUAL_ENDS = (_END_OF_TEXT, "<|endoftext|>", "</s>", "<eos>")
_TRAINING_BYTES = 32_000_000
_HUB_FILES = ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"]
_HUB_FILES += ["*.model", "config.json"]

# The pre-tokenizer of Llama 3: https://github.com/meta-llama/llama3, tokenizer.py
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class TokenizerConfig(Config):
    """How text becomes token ids."""

    tokenizer_name: str = "auto"
    """A name on the Hugging Face Hub, a folder, a tokenizer.json, or train: a byte-level BPE
    trained on the run's own text. auto: Llama-3.1's if it is cached or the hub gives it,
    otherwise, and always with the sample, train."""

    vocab_size: int = Field(32_768, ge=300, le=2**31 - 1)
    """Tokens of a trained tokenizer, and of synthetic data."""

    tokenizer_revision: str | None = None
    """Commit of the tokenizer on the hub; found once, then recorded."""

    end_of_text: str | None = None
    """The token that ends every document, where the tokenizer's own end token is not wanted."""


class Tokenizer(StageResult):
    """A tokenizer in the cache."""

    name: str

    path: Path | None
    """None for synthetic data, which has no text."""

    vocab_size: int
    """Ids are below this; added tokens are counted."""

    end_of_text: int
    """Id that ends every document."""

    fingerprint: str
    """Of tokenizer.json and the end-of-text id."""

    encoder: EncoderName = "tokenizers"
    """The library that encodes documents; its ids are Hugging Face's, whichever it is."""

    @property
    def file(self) -> Path:
        """Its `tokenizer.json`."""
        assert self.path is not None, "synthetic data has no tokenizer"
        return self.path / "tokenizer.json"

    def load(self) -> tokenizers.Tokenizer:
        """Hugging Face's tokenizer, set so that special tokens spelled out in a text are text."""
        return encoding.plain(self.file)

    def load_encoder(self) -> Encoder:
        """The encoder for much text. It is kept in memory and shared by all threads."""
        return encoding.load(self.file, self.encoder)


class ResolvedTokenizer(NamedTuple):
    tokenizer: TokenizerConfig
    reason: str


def resolve_tokenizer(
    config: TokenizerConfig, corpus: CorpusConfig, cache: Path
) -> ResolvedTokenizer:
    """Settle `auto` and the revision, for a resolved corpus.

    Raises:
        hub.HubError: a tokenizer was asked for by name and is neither cached nor given.
        ValueError: a folder or file was asked for that does not exist.
    """
    name = config.tokenizer_name
    if corpus.data_mode == "synthetic":
        return ResolvedTokenizer(
            config.replace(tokenizer_name=SYNTHETIC_TOKENIZER), "synthetic data is token ids"
        )
    if name == "auto":
        if corpus.data_mode == "sample":
            return ResolvedTokenizer(
                config.replace(tokenizer_name=TRAINED_TOKENIZER), "the default for the sample"
            )
        try:
            resolved = resolve_tokenizer(
                config.replace(tokenizer_name=LLAMA_TOKENIZER), corpus, cache
            )
        except hub.HubError as error:
            return ResolvedTokenizer(
                config.replace(tokenizer_name=TRAINED_TOKENIZER),
                f"{LLAMA_TOKENIZER} is not cached and the hub does not give it ({error.cause})",
            )
        return ResolvedTokenizer(resolved.tokenizer, f"Llama-3.1's, {resolved.reason}")
    if name == TRAINED_TOKENIZER:
        return ResolvedTokenizer(config, "asked for")
    if _local(name):
        return ResolvedTokenizer(config, "asked for")
    if cached := _cached(config, cache):
        revision = artifacts.read_json(cached / artifacts.MANIFEST)["revision"]
        return ResolvedTokenizer(config.replace(tokenizer_revision=revision), "cached")
    try:
        revision = hub.model_revision(name, config.tokenizer_revision, probe="tokenizer.json")
    except hub.HubError as error:
        raise error.with_remedies(*_remedies(name)) from error
    return ResolvedTokenizer(
        config.replace(tokenizer_revision=revision), "from the Hugging Face Hub"
    )


def fetch_tokenizer(config: TokenizerConfig, corpus: CorpusConfig, cache: Path) -> Tokenizer:
    """Have the resolved tokenizer under `<cache>/tokenizers/`; nothing is fetched or trained twice.

    Raises:
        hub.HubError: the hub refused or failed.
        ValueError: the files hold no tokenizer, or none that says how a text ends.
    """
    name, root = config.tokenizer_name, Cache(cache).tokenizers
    if name == SYNTHETIC_TOKENIZER:
        return Tokenizer(
            name=name,
            path=None,
            vocab_size=config.vocab_size,
            end_of_text=config.vocab_size - 1,
            fingerprint=artifacts.fingerprint([SYNTHETIC_TOKENIZER, config.vocab_size]),
            why="synthetic data is token ids: there is nothing to make",
        )
    if name == TRAINED_TOKENIZER:
        return _train(config, corpus, root)
    if source := _local(name):
        return _copy(config, source, root)
    path = _cached(config, cache) or _hub_path(config, root)

    def download(partial: Path) -> None:
        try:
            hub.download(name, config.tokenizer_revision, _HUB_FILES, partial)
        except hub.HubError as error:
            raise error.with_remedies(*_remedies(name)) from error

    revision = config.tokenizer_revision
    identity = {"tokenizer_revision": revision, "end_of_text": config.end_of_text}
    return _have(path, config, identity, download, verb="fetched", revision=revision)


def describe_tokenizer(path: Path) -> Tokenizer:
    """The description of a tokenizer directory, from its manifest."""
    facts = artifacts.read_json(path / artifacts.MANIFEST)
    known = {name: facts[name] for name in ("name", "vocab_size", "end_of_text", "fingerprint")}
    chosen, why = facts["encoder"], ""
    before, now = chosen["compared_with"], version("fastokens")
    if before != now:  # it may give other ids
        why = f"its encoder is chosen anew, as fastokens is {now} instead of {before}"
        log.info("%s: %s", path.name, why)
        chosen = _choose_encoder(path)
    return Tokenizer(path=path, encoder=chosen["name"], why=why, **known)


def expected_vocab_size(config: TokenizerConfig, cache: Path) -> tuple[int, bool]:
    """Vocabulary of a resolved tokenizer before it is fetched, and whether that is certain."""
    if config.tokenizer_name == SYNTHETIC_TOKENIZER:
        return config.vocab_size, True
    if config.tokenizer_name == TRAINED_TOKENIZER:
        return config.vocab_size, False  # a small text gives fewer tokens
    if not _local(config.tokenizer_name) and (path := _cached(config, cache)):
        return describe_tokenizer(path).vocab_size, True
    return _LLAMA_VOCABULARY, False


def _remedies(name: str) -> tuple[str, ...]:
    return (
        f"accept the licence on the page of {name} and `hf auth login`, if it is gated",
        "`--tokenizer-name train` to train one on the run's own text",
        "`--tokenizer-name FOLDER` to use one that you have",
    )


def _local(name: str) -> Path | None:
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name.endswith(".json") or name.startswith((".", "/", "~")):
        raise ValueError(f"--tokenizer-name {name}: there is no such file or folder")
    return None


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.").lower()


def _hub_path(config: TokenizerConfig, root: Path) -> Path:
    assert config.tokenizer_revision, "resolve() pins the revision"
    return root / f"{_slug(config.tokenizer_name)}-{_variant(config)}"


def _variant(config: TokenizerConfig) -> str:
    """The revision; with the chosen end-of-text token, which is part of the identity."""
    assert config.tokenizer_revision
    return artifacts.fingerprint([_FORMAT, config.tokenizer_revision, config.end_of_text])


def _cached(config: TokenizerConfig, cache: Path) -> Path | None:
    """An intact directory of this hub name: of the revision, or the newest if none is set."""
    if config.tokenizer_revision:
        path = _hub_path(config, Cache(cache).tokenizers)
        return path if _intact(path) else None
    found = []
    for manifest in Cache(cache).tokenizers.glob(f"*/{artifacts.MANIFEST}"):
        facts = _intact(manifest.parent)
        if not facts or facts["name"] != config.tokenizer_name:
            continue
        if facts["asked_end"] == config.end_of_text:
            found.append(manifest)
    newest = max(found, key=lambda manifest: manifest.stat().st_mtime, default=None)
    return newest.parent if newest else None


def _intact(path: Path) -> dict[str, Any] | None:
    try:
        return artifacts.verify(path)
    except artifacts.DamagedArtifact:
        return None  # absent, set aside before, or to be set aside by `fetch`


def _copy(config: TokenizerConfig, source: Path, root: Path) -> Tokenizer:
    folder = source if source.is_dir() else source.parent
    wanted = [source] if source.is_file() else sorted(_tokenizer_files(folder))
    contents = {p.name: artifacts.file_sha256(p) for p in wanted}
    name = artifacts.fingerprint([_FORMAT, contents, config.end_of_text])
    path = root / f"{_slug(folder.resolve().name)}-{name}"

    def copy(partial: Path) -> None:
        for file in wanted:
            target = "tokenizer.json" if file == source else file.name
            shutil.copyfile(file, partial / target)

    short = {file: digest[:12] for file, digest in contents.items()}
    identity = {"file": short, "end_of_text": config.end_of_text}
    return _have(path, config, identity, copy, verb="copied")


def _tokenizer_files(folder: Path) -> set[Path]:
    return {path for pattern in _HUB_FILES for path in folder.glob(pattern) if path.is_file()}


def _train(config: TokenizerConfig, corpus: CorpusConfig, root: Path) -> Tokenizer:
    identity = {
        "format": _FORMAT,
        "corpus": corpus_identity(corpus),
        "vocab_size": config.vocab_size,
        "bytes": _TRAINING_BYTES,
    }
    path = root / f"bpe-{config.vocab_size}-{corpus.name}-{artifacts.fingerprint(identity)}"

    def train(partial: Path) -> None:
        log.info("training a BPE of %d tokens on %s", config.vocab_size, corpus.name)
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=config.vocab_size,
            special_tokens=[_END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        texts = first_bytes(read_documents(corpus), _TRAINING_BYTES)
        tokenizer.train_from_iterator(texts, trainer)
        tokenizer.save(str(partial / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _END_OF_TEXT}
        artifacts.write_json(partial / "tokenizer_config.json", settings)

    fields: dict[str, Any] = {"vocab_size": config.vocab_size, **corpus_identity(corpus)}
    fields |= {"file": file_digests(corpus), "training_bytes": _TRAINING_BYTES}
    return _have(path, config, fields, train, verb="trained", corpus=identity["corpus"])


def _have(
    path: Path,
    config: TokenizerConfig,
    identity: dict[str, Any],
    make: Callable[[Path], None],
    *,
    verb: str,
    **facts: Any,
) -> Tokenizer:
    """The tokenizer at `path`, whose files `make` writes unless it is there and whole.

    Args:
        identity: what it depends on beside name and format, for people to read.
        facts: for its manifest.
    """
    identity = {"tokenizer_name": config.tokenizer_name, "format": _FORMAT} | identity
    others = reuse.existing(path.parent, _identity, but=path)
    why = reuse.damaged(path) if path.exists() else reuse.nearest(identity, others)

    def build(partial: Path) -> None:
        log.info("tokenizer has to be made: %s", why)
        make(partial)
        _finish(partial, config, identity=identity, **facts)

    reused = artifacts.build_once(path, build)
    log.info("tokenizer %s: %s", "reused" if reused else verb, path)
    tokenizer = describe_tokenizer(path)
    if reused:
        why = "; ".join(filter(None, (reuse.SAME, tokenizer.why)))
    return tokenizer.replace(reused=reused, why=why)


def _identity(path: Path) -> Fields:
    identity: Fields = artifacts.read_signed(path / artifacts.MANIFEST)["identity"]
    return identity


def _finish(partial: Path, config: TokenizerConfig, **facts: Any) -> None:
    """Check what lies in `partial` and seal it."""
    file = partial / "tokenizer.json"
    if not file.exists():
        _convert(partial, config.tokenizer_name)
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library knows no narrower class
        raise ValueError(
            f"--tokenizer-name {config.tokenizer_name}: {file.name} holds no tokenizer ({error})"
        ) from error
    end_of_text = _end_of_text(partial, tokenizer, config)
    _tell_of_confusion(tokenizer)
    facts |= {
        "name": config.tokenizer_name,
        # the highest id counts, as a vocabulary may have holes
        "vocab_size": max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1,
        "end_of_text": end_of_text,
        "asked_end": config.end_of_text,
        "fingerprint": artifacts.fingerprint([artifacts.file_sha256(file), end_of_text]),
        "encoder": _choose_encoder(partial),
    }
    artifacts.seal(partial, facts)


def _tell_of_confusion(tokenizer: tokenizers.Tokenizer) -> None:
    """Warn of special tokens that a text which spells them out would become.

    Unigram models hold them as pieces like any other.
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
            "this tokenizer makes control ids of texts that spell out %s: a document with the one "
            "that ends documents will be refused",
            ", ".join(confused[:9]),
        )


def _choose_encoder(folder: Path) -> dict[str, str]:
    name, reason = encoding.choose(folder / "tokenizer.json")
    log.info("documents are encoded by %s: %s", name, reason)
    return {"name": name, "reason": reason, "compared_with": version("fastokens")}


def _convert(folder: Path, name: str) -> None:
    """Write tokenizer.json for a tokenizer that comes in another form."""
    from transformers import AutoTokenizer  # takes seconds to import, and is rarely needed

    try:
        AutoTokenizer.from_pretrained(folder, use_fast=True).backend_tokenizer.save(
            str(folder / "tokenizer.json")
        )
    except Exception as error:
        raise ValueError(f"{name} has no tokenizer.json and none can be made: {error}") from error


def _end_of_text(folder: Path, tokenizer: tokenizers.Tokenizer, config: TokenizerConfig) -> int:
    token = config.end_of_text
    settings = folder / "tokenizer_config.json"
    if token is None and settings.exists():
        declared = json.loads(settings.read_text(encoding="utf-8")).get("eos_token")
        token = declared.get("content") if isinstance(declared, dict) else declared
    candidates = [token] if token else _USUAL_ENDS
    for candidate in candidates:
        if (found := tokenizer.token_to_id(candidate)) is not None:
            return found
    raise ValueError(
        f"{config.tokenizer_name} has no token {' or '.join(candidates)} to end a document with: "
        "name one with --end-of-text"
    )
