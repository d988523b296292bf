"""The tokenizer of a run: fetched at a pinned revision, copied from a folder, or trained.

A tokenizer of any origin becomes a directory under `<cache>/tokenizers/` with a `tokenizer.json`.
The directory is complete or absent, and `Tokenizer` describes it.
"""

import logging
import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import tokenizers
from pydantic import Field

from zeroflow import artifacts, reuse
from zeroflow.config import Config
from zeroflow.data import encoding, hub
from zeroflow.data.corpus import CorpusConfig, corpus_identity
from zeroflow.data.encoding import Encoder, EncoderName
from zeroflow.data.tokenizer_files import EncoderChoice, TokenizerManifest
from zeroflow.reuse import StageResult
from zeroflow.run_folder import Cache

log = logging.getLogger(__name__)

LLAMA_TOKENIZER = "meta-llama/Llama-3.1-8B"

TRAINED_TOKENIZER = "train"
"""Name of a tokenizer that is trained on the run's own text."""

SYNTHETIC_TOKENIZER = "synthetic"
"""Name for the absence of a tokenizer: synthetic data is token ids."""

FORMAT = 2
"""Version of the directory's format; part of its fingerprint."""

TRAINING_BYTES = 32_000_000
"""Maximum bytes of text that a tokenizer is trained on."""


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
    if name == TRAINED_TOKENIZER or local_source(name):
        return ResolvedTokenizer(config, "asked for")
    # A copy from the hub, or of a folder that is missing now
    if cached := cached_copy(config, cache):
        revision = TokenizerManifest.read(cached).revision
        return ResolvedTokenizer(config.replace(tokenizer_revision=revision), "cached")
    refuse_path(name)
    try:
        revision = hub.model_revision(name, config.tokenizer_revision, probe="tokenizer.json")
    except hub.HubError as error:
        raise error.with_remedies(*remedies(name)) from error
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
    if changed or local_source(name) is None:
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
    source = local_source(config.tokenizer_name) if _is_local(config) else None
    if source is None or trained.path is None:
        return ""
    now = file_digests(tokenizer_files(source))
    if (manifest := TokenizerManifest.verified(trained.path)) is None:
        again = copy_path(config, source, trained.path.parent)
        return "" if again.name == trained.path.name else ", ".join(now)
    before = {file: record.sha256 for file, record in manifest.files.items()}
    if source.is_file():
        now = {"tokenizer.json": now[source.name]}
    elif "tokenizer.json" not in now:
        before.pop("tokenizer.json")  # made from the others
    names = sorted({*before, *now})
    return ", ".join(n for n in names if is_of_tokenizer(n) and before.get(n) != now.get(n))


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


def trained_path(config: TokenizerConfig, corpus: CorpusConfig, root: Path) -> Path:
    """Return the directory of a trained tokenizer, named after everything that it depends on."""
    depends_on = {
        "format": FORMAT,
        "corpus": corpus_identity(corpus),
        "vocab_size": config.vocab_size,
        "bytes": TRAINING_BYTES,
    }
    fingerprint = artifacts.fingerprint(depends_on)
    return root / f"bpe-{config.vocab_size}-{corpus.name}-{fingerprint}"


# Directories and files


def remedies(name: str) -> tuple[str, ...]:
    return (
        f"if {name} is gated, accept its licence on its page and run `hf auth login`",
        "`--tokenizer-name train` to train one on the run's own text",
        "`--tokenizer-name FOLDER` to use one that you have",
    )


def local_source(name: str) -> Path | None:
    """Return the folder or file called `name`; None if there is none, as for names on the hub."""
    path = Path(name).expanduser()
    return path if path.exists() else None


def _is_local(config: TokenizerConfig) -> bool:
    """Return True if a resolved tokenizer comes from local files, which may be missing by now."""
    return config.tokenizer_name != TRAINED_TOKENIZER and config.tokenizer_revision is None


def refuse_path(name: str) -> None:
    """
    Raises:
        ValueError: the name is not one on the hub.
    """
    if name.endswith(".json") or name.startswith((".", "/", "~")):
        raise ValueError(f"--tokenizer-name {name}: no such file or folder")


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.").lower()


def hub_path(config: TokenizerConfig, root: Path) -> Path:
    """The directory of a tokenizer from the hub; its name contains revision and end of text."""
    assert config.tokenizer_revision, "resolve_tokenizer() pins the revision"
    identity = [FORMAT, config.tokenizer_revision, config.end_of_text]
    return root / f"{_slug(config.tokenizer_name)}-{artifacts.fingerprint(identity)}"


def cached_copy(config: TokenizerConfig, cache: Path) -> Path | None:
    """Return a cached directory of this hub tokenizer that verifies: of the revision, or the
    newest.
    """
    root = Cache(cache).tokenizers
    if config.tokenizer_revision:
        path = hub_path(config, root)
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


def copy_path(config: TokenizerConfig, source: Path, root: Path) -> Path:
    """The directory of the copy of a local tokenizer, named after the contents of its files."""
    identity = [FORMAT, file_digests(tokenizer_files(source)), config.end_of_text]
    folder = source if source.is_dir() else source.parent
    return root / f"{_slug(folder.resolve().name)}-{artifacts.fingerprint(identity)}"


def file_digests(files: list[Path]) -> dict[str, str]:
    return {file.name: artifacts.file_sha256(file) for file in files}


def tokenizer_files(source: Path) -> list[Path]:
    """The files of a local tokenizer: those in a folder, or one tokenizer.json of any name."""
    if source.is_file():
        return [source]
    files = (path for path in source.iterdir() if path.is_file())
    return sorted(path for path in files if is_of_tokenizer(path.name))


def is_of_tokenizer(file: str) -> bool:
    """Return True if a file of this name belongs to a tokenizer. Code does not: it is never run."""
    return not file.endswith(".py") and any(fnmatchcase(file, pattern) for pattern in _FILES)
