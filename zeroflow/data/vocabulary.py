"""The vocabulary of a tokenizer that may not be in the cache yet."""

import functools
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import tokenizers

from zeroflow.data import bpe, encoding, hub, text_sample
from zeroflow.data.corpus import CorpusConfig
from zeroflow.data.slices import bytes_per_token, local_text_bytes
from zeroflow.data.text_sample import Density
from zeroflow.data.tokenizer import (
    SYNTHETIC_TOKENIZER,
    TRAINED_TOKENIZER,
    TokenizerConfig,
    cached_copy,
    copy_path,
    local_source,
    refuse_path,
    trained_path,
)
from zeroflow.data.tokenizer_files import TokenizerManifest, inspect_tokenizer
from zeroflow.data.tokenizer_origins import copy_files, downloaded_early, train_tokenizer
from zeroflow.run_folder import Cache

_LLAMA_VOCAB_SIZE = 128_256
"""Assumed for a plan when the tokenizer cannot be read."""

_ENOUGH_BYTES_PER_TOKEN = 120
"""Bytes of text per token that are usually enough for the requested vocabulary: for 32,768 tokens,
English prose needed 60, and Python code 120."""

_SHORT_BYTES = 4_000_000
"""Bytes of text on which a tokenizer is trained in about two seconds."""


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
    if source := local_source(name):
        read = functools.partial(_local_tokenizer, config, source)
        return Vocabulary(_local_size(config, source, root), True, f"as in {name}", load=read)
    if path := cached_copy(config, cache):
        return _of_cached(path, TokenizerManifest.read(path))
    assumed = Vocabulary(_LLAMA_VOCAB_SIZE, False, "assumed, as Llama-3.1's")
    if not config.tokenizer_revision:
        return assumed  # the hub did not answer
    try:
        folder = downloaded_early(config)
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
        copy_files(source, Path(folder))
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
    path = trained_path(config, corpus, root)
    if manifest := TokenizerManifest.verified(path):
        return _of_cached(path, manifest)
    if local_text_bytes(corpus) > min(_ENOUGH_BYTES_PER_TOKEN * asked, _SHORT_BYTES):
        why = "as asked for: the tokenizer is trained first, and repetitive text gives fewer tokens"
        return Vocabulary(asked, False, why, is_limit=True)
    trained = train_tokenizer(config, corpus)
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
    if source := local_source(name):
        return _local_size(config, source, Cache(cache).tokenizers)
    if path := cached_copy(config, cache):
        return TokenizerManifest.read(path).vocab_size
    refuse_path(name)
    return None


def _local_size(config: TokenizerConfig, source: Path, root: Path) -> int:
    """Vocabulary size of a local tokenizer, whose files are checked as for a copy in the cache."""
    if copied := TokenizerManifest.verified(copy_path(config, source, root)):
        return copied.vocab_size
    return _inspected(config, lambda folder: copy_files(source, folder))


def _inspected(config: TokenizerConfig, make: Callable[[Path], None]) -> int:
    """Vocabulary size of a tokenizer whose files `make` writes into a folder."""
    with TemporaryDirectory() as folder:
        make(Path(folder))
        return inspect_tokenizer(Path(folder), config.tokenizer_name, config.end_of_text)
