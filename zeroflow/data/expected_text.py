"""Predicted vocabulary and shards of a run, before they are fetched and built."""

from pathlib import Path
from typing import NamedTuple

from zeroflow.data.corpus import CorpusConfig
from zeroflow.data.shards import ShardConfig, expected_bytes
from zeroflow.data.sufficient import require_both_splits
from zeroflow.data.tokenizer import Tokenizer, TokenizerConfig
from zeroflow.data.vocabulary import Vocabulary, density, expected_vocabulary


class ExpectedText(NamedTuple):
    """Predicted vocabulary and shards."""

    vocabulary: Vocabulary
    shard_bytes: int
    """Bytes of the shards that the run needs."""

    source: str
    """Basis of `shard_bytes`; empty for synthetic data."""


def expected_text(
    config: TokenizerConfig,
    corpus: CorpusConfig,
    shards: ShardConfig,
    trained: Tokenizer | None,
    cache: Path,
) -> ExpectedText:
    """Predict the vocabulary and the shards of a resolved corpus and tokenizer.

    Nothing is added to the cache.

    Args:
        trained: the tokenizer that the run was trained with; None if it has no checkpoint.

    Raises:
        ValueError: the files contain no tokenizer, or a small text does not suffice for training
            and validation.
    """
    if trained:
        load = trained.load if trained.path else None
        vocabulary = Vocabulary(trained.vocab_size, True, "of the run's tokenizer", load=load)
    else:
        vocabulary = expected_vocabulary(config, corpus, cache)
        require_both_splits(corpus, shards.layout, vocabulary.load)
    text = density(config, corpus, vocabulary)
    return ExpectedText(
        vocabulary,
        expected_bytes(shards, corpus, text.bytes_per_token),
        text.source if corpus.is_text else "",
    )
