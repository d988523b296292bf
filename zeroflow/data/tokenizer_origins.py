"""Make the directory of a tokenizer: fetch, copy or train it."""

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import tokenizers

from zeroflow import artifacts, reuse
from zeroflow.data import bpe, hub
from zeroflow.data.corpus import CorpusConfig, CorpusIdentity, corpus_identity
from zeroflow.data.documents import Document
from zeroflow.data.hub_requests import QUESTION, READING, Patience
from zeroflow.data.slices import read_documents
from zeroflow.data.tokenizer import (
    FORMAT,
    SYNTHETIC_TOKENIZER,
    TRAINED_TOKENIZER,
    TRAINING_BYTES,
    Tokenizer,
    TokenizerConfig,
    cached_copy,
    copy_path,
    describe_tokenizer,
    file_digests,
    hub_path,
    is_of_tokenizer,
    local_source,
    refuse_path,
    remedies,
    tokenizer_files,
    trained_path,
)
from zeroflow.data.tokenizer_files import TokenizerManifest, seal_tokenizer
from zeroflow.reuse import Fields
from zeroflow.run_folder import Cache

log = logging.getLogger(__name__)


def fetch_tokenizer(config: TokenizerConfig, corpus: CorpusConfig, cache: Path) -> Tokenizer:
    """Ensure that the resolved tokenizer is under `<cache>/tokenizers/`.

    Nothing is fetched or trained twice.

    Raises:
        hub.HubError: the hub refused or failed.
        ValueError: the files contain no tokenizer, or it has no token that ends a document.
    """
    name, root = config.tokenizer_name, Cache(cache).tokenizers
    if name == SYNTHETIC_TOKENIZER:
        return Tokenizer(
            name=name,
            path=None,
            vocab_size=config.vocab_size,
            end_of_text=config.vocab_size - 1,
            fingerprint=artifacts.fingerprint([SYNTHETIC_TOKENIZER, config.vocab_size]),
            why="synthetic data is token ids and needs no tokenizer",
        )
    if name == TRAINED_TOKENIZER:
        return _train(config, corpus, root)
    if source := local_source(name):
        return _copy(config, source, root)
    return _download(config, cache)


class _Origin(NamedTuple):
    """Origin of a tokenizer, which writes its directory."""

    verb: str
    """Past tense of the origin, for the log: fetched, copied or trained."""

    identity: Fields
    """Everything that the tokenizer depends on, except name and format, for messages."""

    make: Callable[[Path], None]
    """Writes the tokenizer's files into a directory."""

    revision: str | None = None
    corpus: CorpusIdentity | None = None


def _downloading(config: TokenizerConfig, patience: Patience = READING) -> Callable[[Path], None]:
    """Return a function that fetches the files of a tokenizer from the hub into a folder."""
    name = config.tokenizer_name

    def download(folder: Path) -> None:
        if early := _early.pop((name, config.tokenizer_revision), None):
            shutil.copytree(early.name, folder, dirs_exist_ok=True)
            early.cleanup()
            return
        try:
            hub.download(
                name, config.tokenizer_revision, is_of_tokenizer, folder, patience=patience
            )
        except hub.HubError as error:
            raise error.with_remedies(*remedies(name)) from error

    return download


_early: dict[tuple[str, str | None], TemporaryDirectory[str]] = {}
"""Files from the hub that the plan of a run needed, by name and revision. They are added to the
cache when the run fetches its tokenizer, so that it is downloaded once."""


def downloaded_early(config: TokenizerConfig) -> Path:
    """Return a folder with the files of a tokenizer on the hub, which this process keeps.

    Raises:
        hub.HubError: the hub refused or failed.
    """
    wanted = (config.tokenizer_name, config.tokenizer_revision)
    if wanted not in _early:
        folder = TemporaryDirectory()
        try:
            _downloading(config, patience=QUESTION)(Path(folder.name))
        except BaseException:
            folder.cleanup()
            raise
        for other in [*_early]:  # only the newest is kept
            _early.pop(other).cleanup()
        _early[wanted] = folder
    return Path(_early[wanted].name)


def _download(config: TokenizerConfig, cache: Path) -> Tokenizer:
    name, revision = config.tokenizer_name, config.tokenizer_revision
    identity = {"tokenizer_revision": revision, "end_of_text": config.end_of_text}
    if (path := cached_copy(config, cache)) is None:
        refuse_path(name)
        path = hub_path(config, Cache(cache).tokenizers)
    origin = _Origin("fetched", identity, _downloading(config), revision=revision)
    return _ensure(path, config, origin)


def _copy(config: TokenizerConfig, source: Path, root: Path) -> Tokenizer:
    short = {file: digest[:12] for file, digest in file_digests(tokenizer_files(source)).items()}
    identity = {"file": short, "end_of_text": config.end_of_text}
    origin = _Origin("copied", identity, lambda folder: copy_files(source, folder))
    return _ensure(copy_path(config, source, root), config, origin)


def copy_files(source: Path, folder: Path) -> None:
    for file in tokenizer_files(source):
        target = "tokenizer.json" if file == source else file.name
        shutil.copyfile(file, folder / target)


def _train(config: TokenizerConfig, corpus: CorpusConfig, root: Path) -> Tokenizer:
    text = corpus_identity(corpus)

    def train(partial: Path) -> None:
        log.info("training a BPE of %d tokens on %s", config.vocab_size, corpus.name)
        train_tokenizer(config, corpus).save(str(partial / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": bpe.END_OF_TEXT}
        artifacts.write_json(partial / "tokenizer_config.json", settings)

    identity = {
        "vocab_size": config.vocab_size,
        **text,
        "file": corpus.source.digests(),
        "training_bytes": TRAINING_BYTES,
    }
    origin = _Origin("trained", identity, train, corpus=text)
    return _ensure(trained_path(config, corpus, root), config, origin)


def train_tokenizer(config: TokenizerConfig, corpus: CorpusConfig) -> tokenizers.Tokenizer:
    """Train a tokenizer on the beginning of a resolved corpus."""
    corpus.source.require_revision(str(corpus.data_revision))
    texts = first_bytes(read_documents(corpus), TRAINING_BYTES)
    return bpe.train_bpe(texts, config.vocab_size)


def first_bytes(documents: Iterable[Document], limit: int) -> Iterator[str]:
    """Yield the texts of documents until their total size reaches `limit` bytes."""
    passed = 0
    for document in documents:
        if passed >= limit:
            return
        passed += len(document.text.encode("utf-8", "surrogatepass"))
        yield document.text


def _ensure(path: Path, config: TokenizerConfig, origin: _Origin) -> Tokenizer:
    """Ensure that the tokenizer exists at `path` and verifies."""
    identity = {"tokenizer_name": config.tokenizer_name, "format": FORMAT, **origin.identity}
    others = reuse.existing(path.parent, _recorded_identity, but=path)
    why = reuse.damaged(path) if path.exists() else reuse.nearest(_by_flag(identity), others)

    def build(partial: Path) -> None:
        log.info("making tokenizer: %s", why)
        origin.make(partial)
        seal_tokenizer(
            partial,
            config.tokenizer_name,
            end_token=config.end_of_text,
            identity=identity,
            revision=origin.revision,
            corpus=origin.corpus,
        )

    reused = artifacts.build_once(path, build)
    log.info("tokenizer %s: %s", "reused" if reused else origin.verb, path)
    tokenizer = describe_tokenizer(path)
    if reused:
        return tokenizer.replace(
            reused=True, why="; ".join(filter(None, (reuse.SAME, tokenizer.why)))
        )
    return tokenizer.replace(reused=False, why=why)


def _recorded_identity(path: Path) -> Fields:
    identity = TokenizerManifest.read(path).identity
    if identity is None:
        raise ValueError(f"{path} has no record of what it depends on")
    return _by_flag(identity)


def _by_flag(identity: Fields) -> Fields:
    return reuse.by_flag(identity, {*TokenizerConfig.model_fields, *CorpusConfig.model_fields})
