import pytest
from public_tokenizers import like_bert, save
from shard_sets import SMALL
from tiny import files_corpus, jsonl_corpus

from zeroflow.data import sufficient
from zeroflow.data.build import build_shards
from zeroflow.data.sufficient import require_both_splits
from zeroflow.data.tokenizer import TokenizerConfig
from zeroflow.data.tokenizer_origins import fetch_tokenizer


@pytest.fixture
def words(text, tmp_path):
    """A tokenizer that has no tokens for white space."""
    folder = save(tmp_path / "words", like_bert(), {"sep_token": "[SEP]"})
    config = TokenizerConfig(tokenizer_name=str(folder), end_of_text="[SEP]")
    return fetch_tokenizer(config, text.corpus, tmp_path)


TEXTS = {
    "only white space": ([" \n\t" * 900] * 3, "none is left for train"),
    "white space to validate on": (["the river " * 99 + " " * 999], "none is left for validation"),
    "one character": (["x"], "none is left for validation"),
    "enough": (["the river runs"] * 3, ""),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_that_a_run_would_refuse_is_refused_before_anything_is_built(words, tmp_path, name):
    texts, message = TEXTS[name]
    corpus = jsonl_corpus(tmp_path / "corpus.jsonl", texts)
    if not message:
        require_both_splits(corpus, SMALL.layout, words.load)
        build_shards(SMALL, corpus, words, tmp_path / "cache")
        return
    with pytest.raises(ValueError, match=message):
        require_both_splits(corpus, SMALL.layout, words.load)
    with pytest.raises(ValueError, match=message):
        build_shards(SMALL, corpus, words, tmp_path / "cache")


def test_files_for_validation_are_a_split_of_their_own(words, tmp_path):
    for name, content in {"text": "the river", "space": " \n" * 99}.items():
        (tmp_path / f"{name}.txt").write_text(content)
    text, space = (str(tmp_path / f"{name}.txt") for name in ("text", "space"))
    for first, second, split in ((text, space, "validation"), (space, text, "train")):
        corpus = files_corpus(first, validation_path=(second,))
        with pytest.raises(ValueError, match=f"none is left for {split}"):
            require_both_splits(corpus, SMALL.layout, words.load)


def test_large_text_is_not_read(words, tmp_path, monkeypatch):
    corpus = jsonl_corpus(tmp_path / "corpus.jsonl", [" "])
    with pytest.raises(ValueError, match="too small"):
        require_both_splits(corpus, SMALL.layout, words.load)
    monkeypatch.setattr(sufficient, "MOST_BYTES", 5)
    require_both_splits(corpus, SMALL.layout, words.load)
