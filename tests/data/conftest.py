import random
from pathlib import Path
from typing import NamedTuple

import pytest
from hub import english
from tiny import jsonl_corpus

from zeroflow.data import tokenizer
from zeroflow.data.corpus import CorpusConfig
from zeroflow.data.tokenizer import TokenizerConfig, TokenizerFiles


class Text(NamedTuple):
    corpus: CorpusConfig
    tokens: TokenizerFiles
    texts: list[str]
    """By number: document d7 is texts[7]."""


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    """Sixty documents, each with a word of its own, and a tokenizer trained on them."""
    folder: Path = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    texts = [f"Marker{number:03}. {english(rng)}" for number in range(60)]
    corpus = jsonl_corpus(folder / "documents.jsonl", texts)
    config = TokenizerConfig(tokenizer_name="train", vocab_size=400)
    return Text(corpus, tokenizer.fetch(config, corpus, folder / "cache"), texts)
