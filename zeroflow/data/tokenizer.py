"""The tokenizer of a run: fetched at a pinned revision, copied from a folder, or trained.

A tokenizer of any origin becomes a directory under `<cache>/tokenizers/` with a `tokenizer.json`.
The directory is complete or absent, and `Tokenizer` describes it.
"""

import functools
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import tokenizers
from pydantic import Field

from zeroflow import artifacts, reuse
from zeroflow.config import Config
from zeroflow.data import bpe, encoding, hub, text_sample
from zeroflow.data.corpus import CorpusConfig, CorpusIdentity, corpus_identity
from zeroflow.data.documents import Document
from zeroflow.data.encoding import Encoder, EncoderName
from zeroflow.data.hub_requests import QUESTION, READING, Patience
from zeroflow.data.slices import bytes_per_token, local_text_bytes, read_documents
from zeroflow.data.text_sample import Density
from zeroflow.data.tokenizer_files import (
    EncoderChoice,
    TokenizerManifest,
    inspect_tokenizer,
    seal_tokenizer,
)
from zeroflow.reuse import Fields, StageResult
from zeroflow.run_folder import Cache

log = logging.getLogger(__name__)

LLAMA_TOKENIZER = "meta-llama/Llama-3.1-8B"

TRAINED_TOKENIZER = "train"
"""Name of a tokenizer that is trained on the run's own text."""

SYNTHETIC_TOKENIZER = "synthetic"
"""Name for the absence of a tokenizer: synthetic data is token ids."""

FORMAT = 2
"""Version of the directory's format; part of its fingerprint."""

_LLAMA_VOCAB_SIZE = 128_256
"""Assumed for a plan when the tokenizer cannot be read."""

_TRAINING_BYTES = 32_000_000
"""Maximum bytes of text that a tokenizer is trained on."""


_ENOUGH_BYTES_PER_TOKEN = 120
"""Bytes of text per token that are usually enough for the requested vocabulary: for 32,768 tokens,
English prose needed 60, and Python code 120."""

_SHORT_BYTES = 4_000_000
"""Bytes of text on which a tokenizer is trained in about two seconds."""

_FILES = ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"]
_FILES += ["*.model", "config.json"]


class TokenizerConfig(Config):
    """Choice of the tokenizer."""

    tokenizer_name: str = "auto"
    """A name on the Hugging Face Hub, a folder, a tokenizer.json, or train: a byte-level BPE
    trained on the run's own text. auto: Llama-3.1's if it is cached or the hub provides it;
    otherwise, and always with the sample, train."""

    vocab_size: int = Field(32_768, ge=300, le=2**31 - 1)
    """Vocabulary size of a trained tokenizer, and of synthetic data."""

    tokenizer_revision: str | None = None
    """Commit of the tokenizer on the hub; determined once, then recorded."""

    end_of_text: str | None = None
    """Token that ends every document. Default: the tokenizer's own end token."""


class Tokenizer(StageResult):
    """A tokenizer in the cache."""

    name: str

    path: Path | None
    """Directory of the tokenizer; None for synthetic data, which has no text."""

    vocab_size: int
    """Upper limit of all ids, including added tokens."""

    end_of_text: int
    """Id of the token that ends every document."""

    fingerprint: str
    """Fingerprint of tokenizer.json and the end-of-text id."""

    encoder: EncoderName = "tokenizers"
    """The library that encodes documents. It gives the same ids as Hugging Face's library."""

    @property
    def file(self) -> Path:
        """Its `tokenizer.json`."""
        assert self.path is not None, "synthetic data has no tokenizer"
        return self.path / "tokenizer.json"

    def load(self) -> tokenizers.Tokenizer:
        """Load Hugging Face's tokenizer, which encodes spelled-out special tokens as text."""
        return encoding.plain(self.file)

    def load_encoder(self) -> Encoder:
        """Load the encoder for large amounts of text, which stays in memory for all threads."""
        return encoding.load(self.file, self.encoder)

    def decoder(self) -> Callable[[list[int]], str]:
        """Return a function from token ids to text; for synthetic data, the ids as text."""
        if self.path is None:
            return lambda ids: " ".join(map(str, ids))
        loaded = self.load()
        return lambda ids: loaded.decode(ids, skip_special_tokens=False)


class ResolvedTokenizer(NamedTuple):
    tokenizer: TokenizerConfig
    reason: str
    """Why this tokenizer was chosen."""


def resolve_tokenizer(
    config: TokenizerConfig, corpus: CorpusConfig, cache: Path
) -> ResolvedTokenizer:
    """Choose a tokenizer for `auto`, and pin the revision.

    Args:
        corpus: the resolved corpus.

    Raises:
        hub.HubError: the named tokenizer is not cached, and the hub does not provide it.
        ValueError: the named folder or file does not exist.
    """
    name = config.tokenizer_name
    if not corpus.is_text:
        config = config.replace(tokenizer_name=SYNTHETIC_TOKENIZER)
        return ResolvedTokenizer(config, "synthetic data is token ids")
    if name == "auto":
        return _resolve_auto(config, corpus, cache)
    if name == TRAINED_TOKENIZER or _local(name):
        return ResolvedTokenizer(config, "asked for")
    if cached := _cached(config, cache):  # from the hub, or a copy of a folder that is missing now
        revision = TokenizerManifest.read(cached).revision
        return ResolvedTokenizer(config.replace(tokenizer_revision=revision), "cached")
    _refuse_path(name)
    try:
        revision = hub.model_revision(name, config.tokenizer_revision, probe="tokenizer.json")
    except hub.HubError as error:
        raise error.with_remedies(*_remedies(name)) from error
    config = config.replace(tokenizer_revision=revision)
    return ResolvedTokenizer(config, "from the Hugging Face Hub")


def _resolve_auto(config: TokenizerConfig, corpus: CorpusConfig, cache: Path) -> ResolvedTokenizer:
    trained = config.replace(tokenizer_name=TRAINED_TOKENIZER)
    if without_hub(corpus) == TRAINED_TOKENIZER:
        return ResolvedTokenizer(trained, "the default for the sample")
    llama = config.replace(tokenizer_name=LLAMA_TOKENIZER)
    try:
        resolved = resolve_tokenizer(llama, corpus, cache)
    except hub.HubError as error:
        reason = f"{LLAMA_TOKENIZER} is not cached, and not available from the hub ({error.cause})"
        return ResolvedTokenizer(trained, reason)
    return ResolvedTokenizer(resolved.tokenizer, f"Llama-3.1's, {resolved.reason}")


def without_hub(corpus: CorpusConfig) -> str:
    """The tokenizer to expect for `auto`, without a request to the hub: for text, Llama's."""
    if not corpus.is_text:
        return SYNTHETIC_TOKENIZER
    return TRAINED_TOKENIZER if corpus.data_mode == "sample" else LLAMA_TOKENIZER


class Vocabulary(NamedTuple):
    """Vocabulary of a tokenizer that may not be in the cache yet."""

    size: int
    is_certain: bool
    source: str
    """Source of the size, as text."""

    is_limit: bool = False
    """True if the size is a limit, because training on repetitive text gives fewer tokens."""

    load: Callable[[], tokenizers.Tokenizer] | None = None
    """Loads the tokenizer; None if it does not exist yet or cannot be read now."""


def expected_vocabulary(config: TokenizerConfig, corpus: CorpusConfig, cache: Path) -> Vocabulary:
    """Return the vocabulary of a resolved tokenizer before it is fetched.

    Nothing is added to the cache. Files that are not cached are read only to count tokens.

    Raises:
        ValueError: the files contain no tokenizer.
    """
    name, root = config.tokenizer_name, Cache(cache).tokenizers
    if name == SYNTHETIC_TOKENIZER:
        return Vocabulary(config.vocab_size, True, "as asked for")
    if name == TRAINED_TOKENIZER:
        return _expected_of_training(config, corpus, root)
    if source := _local(name):
        read = functools.partial(_local_tokenizer, config, source)
        return Vocabulary(_local_size(config, source, root), True, f"as in {name}", load=read)
    if path := _cached(config, cache):
        return _of_cached(path, TokenizerManifest.read(path))
    assumed = Vocabulary(_LLAMA_VOCAB_SIZE, False, "assumed, as Llama-3.1's")
    if not config.tokenizer_revision:
        return assumed  # the hub did not answer
    try:
        folder = _downloaded_early(config)
    except hub.HubError as error:
        return assumed._replace(source=f"{assumed.source}: {error.subject}: {error.cause}")
    size = inspect_tokenizer(folder, name, config.end_of_text)
    read = functools.partial(encoding.plain, folder / "tokenizer.json")
    return Vocabulary(size, True, f"as in {name} on the Hugging Face Hub", load=read)


def _of_cached(path: Path, manifest: TokenizerManifest) -> Vocabulary:
    read = functools.partial(encoding.plain, path / "tokenizer.json")
    return Vocabulary(manifest.vocab_size, True, "of the cached tokenizer", load=read)


def _local_tokenizer(config: TokenizerConfig, source: Path) -> tokenizers.Tokenizer:
    with TemporaryDirectory() as folder:
        _copy_files(source, Path(folder))
        inspect_tokenizer(Path(folder), config.tokenizer_name, config.end_of_text)
        return encoding.plain(Path(folder) / "tokenizer.json")


def density(config: TokenizerConfig, corpus: CorpusConfig, known: Vocabulary) -> Density:
    """Return the bytes of text per token: from a sample of local files, or assumed.

    Args:
        known: what is known about the vocabulary of the resolved tokenizer.
    """
    found = None
    if known.load or config.tokenizer_name == TRAINED_TOKENIZER:
        found = text_sample.measure(
            corpus,
            known.load and known.load(),
            lambda texts: bpe.train_bpe(iter(texts), config.vocab_size),
        )
    usual = bytes_per_token(known.size)
    return found or Density(usual, f"assuming {usual:.1f} bytes of text per token")


def _expected_of_training(config: TokenizerConfig, corpus: CorpusConfig, root: Path) -> Vocabulary:
    """Return the vocabulary of a tokenizer that will be trained; for a long text, its limit."""
    asked = config.vocab_size
    if manifest := TokenizerManifest.verified(_trained_path(config, corpus, root)):
        return _of_cached(_trained_path(config, corpus, root), manifest)
    if local_text_bytes(corpus) > min(_ENOUGH_BYTES_PER_TOKEN * asked, _SHORT_BYTES):
        why = "as asked for: the tokenizer is trained first, and repetitive text gives fewer tokens"
        return Vocabulary(asked, False, why, is_limit=True)
    trained = _trained(config, corpus)
    size = trained.get_vocab_size()
    short = f", as the text is too short for {asked:,}" if size < asked else ""
    return Vocabulary(size, True, f"the tokenizer is trained first{short}", load=lambda: trained)


def known_vocab_size(config: TokenizerConfig, cache: Path) -> int | None:
    """Return the maximum vocabulary size without a request; None if it is unknown.

    Raises:
        ValueError: there is no such file or folder, or no tokenizer in it.
    """
    name = config.tokenizer_name
    if name in ("auto", TRAINED_TOKENIZER, SYNTHETIC_TOKENIZER):
        return config.vocab_size
    if source := _local(name):
        return _local_size(config, source, Cache(cache).tokenizers)
    if path := _cached(config, cache):
        return TokenizerManifest.read(path).vocab_size
    _refuse_path(name)
    return None


def _local_size(config: TokenizerConfig, source: Path, root: Path) -> int:
    """Vocabulary size of a local tokenizer, whose files are checked as for a copy in the cache."""
    if copied := TokenizerManifest.verified(_copy_path(config, source, root)):
        return copied.vocab_size
    return _inspected(config, lambda folder: _copy_files(source, folder))


def _inspected(config: TokenizerConfig, make: Callable[[Path], None]) -> int:
    """Vocabulary size of a tokenizer whose files `make` writes into a folder."""
    with TemporaryDirectory() as folder:
        make(Path(folder))
        return inspect_tokenizer(Path(folder), config.tokenizer_name, config.end_of_text)


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
    if source := _local(name):
        return _copy(config, source, root)
    return _download(config, cache)


def require_copy(tokenizer: Tokenizer) -> None:
    """
    Raises:
        ValueError: the tokenizer's directory is missing or damaged.
    """
    if tokenizer.path and TokenizerManifest.verified(tokenizer.path) is None:
        raise ValueError(
            f"the tokenizer {tokenizer.path} is missing or damaged: run the command of the run "
            "again, which restores it"
        )


def own_copy(tokenizer: Tokenizer) -> Tokenizer | None:
    """Return the tokenizer of a run from its directory; None if it is missing or damaged."""
    path = tokenizer.path
    if path is None or TokenizerManifest.verified(path) is None:
        return None
    found = describe_tokenizer(path)
    return found.replace(reused=True, why="; ".join(filter(None, (reuse.SAME, found.why))))


def require_restorable(config: TokenizerConfig, trained: Tokenizer) -> None:
    """Check that the tokenizer of a trained run exists, or can be copied or fetched again.

    Raises:
        ValueError: both its directory and the local files that it was copied from are lost.
    """
    name, path = config.tokenizer_name, trained.path
    if path is None or not _is_local(config) or TokenizerManifest.verified(path):
        return
    changed = changed_since(config, trained)
    if changed or _local(name) is None:
        state = f"has changed since ({changed})" if changed else "is gone"
        raise ValueError(
            f"the tokenizer that the run was trained with, {path}, is missing or damaged, and "
            f"{name}, which it was copied from, {state}: restore one of them"
        )


def changed_since(config: TokenizerConfig, trained: Tokenizer) -> str:
    """Compare a local tokenizer with the copy that a run was trained with.

    Returns:
        Names of the files that differ; "" if none differs, if the files are missing, or if the
        tokenizer is not local.
    """
    source = _local(config.tokenizer_name) if _is_local(config) else None
    if source is None or trained.path is None:
        return ""
    now = _digests(_tokenizer_files(source))
    if (manifest := TokenizerManifest.verified(trained.path)) is None:
        again = _copy_path(config, source, trained.path.parent)
        return "" if again.name == trained.path.name else ", ".join(now)
    before = {file: record.sha256 for file, record in manifest.files.items()}
    if source.is_file():
        now = {"tokenizer.json": now[source.name]}
    elif "tokenizer.json" not in now:
        before.pop("tokenizer.json")  # made from the others
    names = sorted({*before, *now})
    return ", ".join(n for n in names if _is_of_tokenizer(n) and before.get(n) != now.get(n))


def describe_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a directory, from its manifest."""
    manifest = TokenizerManifest.read(path)
    chosen, why = manifest.encoder, ""
    before, now = chosen.compared_with, version("fastokens")
    if before != now:  # another version may give different ids
        why = f"the encoders were compared again, because fastokens is {now} instead of {before}"
        log.info("%s: %s", path.name, why)
        chosen = EncoderChoice.make(path)
    return Tokenizer(
        name=manifest.name,
        path=path,
        vocab_size=manifest.vocab_size,
        end_of_text=manifest.end_of_text,
        fingerprint=manifest.fingerprint,
        encoder=chosen.name,
        why=why,
    )


# The three origins


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
                name, config.tokenizer_revision, _is_of_tokenizer, folder, patience=patience
            )
        except hub.HubError as error:
            raise error.with_remedies(*_remedies(name)) from error

    return download


_early: dict[tuple[str, str | None], TemporaryDirectory[str]] = {}
"""Files from the hub that the plan of a run needed, by name and revision. They are added to the
cache when the run fetches its tokenizer, so that it is downloaded once."""


def _downloaded_early(config: TokenizerConfig) -> Path:
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
    if (path := _cached(config, cache)) is None:
        _refuse_path(name)
        path = _hub_path(config, Cache(cache).tokenizers)
    origin = _Origin("fetched", identity, _downloading(config), revision=revision)
    return _ensure(path, config, origin)


def _copy(config: TokenizerConfig, source: Path, root: Path) -> Tokenizer:
    short = {file: digest[:12] for file, digest in _digests(_tokenizer_files(source)).items()}
    identity = {"file": short, "end_of_text": config.end_of_text}
    origin = _Origin("copied", identity, lambda folder: _copy_files(source, folder))
    return _ensure(_copy_path(config, source, root), config, origin)


def _copy_files(source: Path, folder: Path) -> None:
    for file in _tokenizer_files(source):
        target = "tokenizer.json" if file == source else file.name
        shutil.copyfile(file, folder / target)


def _train(config: TokenizerConfig, corpus: CorpusConfig, root: Path) -> Tokenizer:
    text = corpus_identity(corpus)

    def train(partial: Path) -> None:
        log.info("training a BPE of %d tokens on %s", config.vocab_size, corpus.name)
        _trained(config, corpus).save(str(partial / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": bpe.END_OF_TEXT}
        artifacts.write_json(partial / "tokenizer_config.json", settings)

    identity = {
        "vocab_size": config.vocab_size,
        **text,
        "file": corpus.source.digests(),
        "training_bytes": _TRAINING_BYTES,
    }
    origin = _Origin("trained", identity, train, corpus=text)
    return _ensure(_trained_path(config, corpus, root), config, origin)


def _trained(config: TokenizerConfig, corpus: CorpusConfig) -> tokenizers.Tokenizer:
    """Train a tokenizer on the beginning of a resolved corpus."""
    corpus.source.require_revision(str(corpus.data_revision))
    texts = first_bytes(read_documents(corpus), _TRAINING_BYTES)
    return bpe.train_bpe(texts, config.vocab_size)


def _trained_path(config: TokenizerConfig, corpus: CorpusConfig, root: Path) -> Path:
    """Return the directory of a trained tokenizer, named after everything that it depends on."""
    depends_on = {
        "format": FORMAT,
        "corpus": corpus_identity(corpus),
        "vocab_size": config.vocab_size,
        "bytes": _TRAINING_BYTES,
    }
    fingerprint = artifacts.fingerprint(depends_on)
    return root / f"bpe-{config.vocab_size}-{corpus.name}-{fingerprint}"


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


# Directories and files


def _remedies(name: str) -> tuple[str, ...]:
    return (
        f"if {name} is gated, accept its licence on its page and run `hf auth login`",
        "`--tokenizer-name train` to train one on the run's own text",
        "`--tokenizer-name FOLDER` to use one that you have",
    )


def _local(name: str) -> Path | None:
    """Return the folder or file called `name`; None if there is none, as for names on the hub."""
    path = Path(name).expanduser()
    return path if path.exists() else None


def _is_local(config: TokenizerConfig) -> bool:
    """Return True if a resolved tokenizer comes from local files, which may be missing by now."""
    return config.tokenizer_name != TRAINED_TOKENIZER and config.tokenizer_revision is None


def _refuse_path(name: str) -> None:
    """
    Raises:
        ValueError: the name is not one on the hub.
    """
    if name.endswith(".json") or name.startswith((".", "/", "~")):
        raise ValueError(f"--tokenizer-name {name}: no such file or folder")


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.").lower()


def _hub_path(config: TokenizerConfig, root: Path) -> Path:
    """The directory of a tokenizer from the hub; its name contains revision and end of text."""
    assert config.tokenizer_revision, "resolve_tokenizer() pins the revision"
    identity = [FORMAT, config.tokenizer_revision, config.end_of_text]
    return root / f"{_slug(config.tokenizer_name)}-{artifacts.fingerprint(identity)}"


def _cached(config: TokenizerConfig, cache: Path) -> Path | None:
    """Return a cached directory of this hub tokenizer that verifies: of the revision, or the
    newest.
    """
    root = Cache(cache).tokenizers
    if config.tokenizer_revision:
        path = _hub_path(config, root)
        return path if TokenizerManifest.verified(path) else None
    found = []
    for file in root.glob(f"*/{artifacts.MANIFEST}"):
        manifest = TokenizerManifest.verified(file.parent)
        if not manifest or manifest.name != config.tokenizer_name:
            continue
        if manifest.asked_end == config.end_of_text:
            found.append(file)
    newest = max(found, key=lambda file: file.stat().st_mtime, default=None)
    return newest.parent if newest else None


def _copy_path(config: TokenizerConfig, source: Path, root: Path) -> Path:
    """The directory of the copy of a local tokenizer, named after the contents of its files."""
    identity = [FORMAT, _digests(_tokenizer_files(source)), config.end_of_text]
    folder = source if source.is_dir() else source.parent
    return root / f"{_slug(folder.resolve().name)}-{artifacts.fingerprint(identity)}"


def _digests(files: list[Path]) -> dict[str, str]:
    return {file.name: artifacts.file_sha256(file) for file in files}


def _tokenizer_files(source: Path) -> list[Path]:
    """The files of a local tokenizer: those in a folder, or one tokenizer.json of any name."""
    if source.is_file():
        return [source]
    files = (path for path in source.iterdir() if path.is_file())
    return sorted(path for path in files if _is_of_tokenizer(path.name))


def _is_of_tokenizer(file: str) -> bool:
    """Return True if a file of this name belongs to a tokenizer. Code does not: it is never run."""
    return not file.endswith(".py") and any(fnmatchcase(file, pattern) for pattern in _FILES)
