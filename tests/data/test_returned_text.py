"""Lost text: characters that are missing or added after encoding and decoding."""

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from public_tokenizers import like_llama_2, like_qwen, of_bytes, of_words, save
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from zeroflow.data import encoding, returned_text
from zeroflow.data.encoding import Encoder
from zeroflow.data.returned_text import Excerpts, ReturnedText, lost_characters, mean_lost_share

DECOMPOSED = unicodedata.normalize("NFD", "café naïve Ünïcode")


def lower_casing() -> Tokenizer:
    tokenizer = of_bytes()
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def sample(encoder: Encoder, *batches: list[str]) -> ReturnedText:
    excerpts = Excerpts()
    for texts in batches:
        excerpts.add(texts)
    found = excerpts.measure(encoder)
    assert found is not None
    return found


@pytest.fixture
def lost(tmp_path: Path):
    """Share of texts that a tokenizer loses, in percent."""

    def measure(tokenizer: Tokenizer, *texts: str) -> float:
        file = save(tmp_path, tokenizer) / "tokenizer.json"
        encoder = encoding.load(file, encoding.compare(file)[0])
        return 100 * sample(encoder, list(texts)).lost_share

    return measure


@given(text=st.text())
def test_equal_text_has_lost_nothing_and_different_text_something(text):
    assert lost_characters(text, text) == 0
    assert lost_characters(text, text + "x") == lost_characters(text + "x", text) == 1


@pytest.mark.parametrize("tokenizer", [of_bytes(), like_qwen(), like_llama_2()])
def test_lossless_tokenizers_lose_nothing(tokenizer, lost):
    assert lost(tokenizer, "The river: 1234\n\n  don't 日本語 🙂\t", " x ", "") == 0


def test_changes_before_encoding_are_counted(lost):
    assert lost(like_qwen(), unicodedata.normalize("NFC", DECOMPOSED)) == 0, "already in its form"
    accents = sum(map(unicodedata.combining, DECOMPOSED)) // 230
    assert lost(like_qwen(), DECOMPOSED) == pytest.approx(200 * accents / len(DECOMPOSED))
    assert lost(lower_casing(), "ABcdefghij") == pytest.approx(20)


def test_unknown_tokens_count_as_lost_text(lost):
    assert lost(of_words("the"), "the knunkunknun the") == pytest.approx(100 * 12 / 19)


MOST = returned_text._EXCERPTS * returned_text._EXCERPT_CHARACTERS
ENGLISH, GREEK = "the licence of this edition " * 30, "ανδρα μοι εννεπε μουσα " * 30


def only_english() -> Tokenizer:
    """A BPE that knows only these letters, and drops all others silently."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(special_tokens=["</s>"], show_progress=False)
    tokenizer.train_from_iterator([ENGLISH], trainer)
    return tokenizer


def greek_share(*texts: str) -> float:
    """Percentage of Greek letters in a text."""
    text = "".join(texts)
    return 100 * sum(letter in GREEK and letter != " " for letter in text) / len(text)


LICENSED = ENGLISH * 6 + GREEK * 60 + ENGLISH * 12


@pytest.mark.parametrize(
    "texts",
    [
        [LICENSED],
        [LICENSED * 20],
        [ENGLISH * 4 + GREEK * 2] * 400,
        [GREEK[:200] + ENGLISH[:800]] * 900,
        [(ENGLISH * 3)[:2000] + (GREEK * 4)[:2000]] * 2000,
        [ENGLISH * 10] * 300 + [GREEK] * 300,
    ],
    ids=["one file", "large file", "English begins", "Greek begins", "equal", "Greek at the end"],
)
def test_lost_text_is_found_at_any_position(texts, lost):
    assert lost(only_english(), *texts) == pytest.approx(greek_share(*texts), abs=3)


def test_words_that_the_sample_cuts_are_not_lost(lost):
    words = ["incomprehensibly", "unknowable", "lengthily"]
    assert lost(of_words(*words), " ".join(words * 20_000)) == 0
    assert lost(of_words(*words), *[" ".join(words)] * 20_000) == 0


def test_space_that_a_tokenizer_adds_before_every_text_is_not_lost_text(lost):
    tokenizer = of_bytes()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert lost(tokenizer, *[ENGLISH, "x"] * 900) == 0


def test_sample_does_not_depend_on_the_batches_and_is_bounded(tmp_path):
    file = save(tmp_path, lower_casing()) / "tokenizer.json"
    encoder = encoding.load(file, "tokenizers")
    texts = ["a" * 5000] * 500 + ["A" * 5000] * 500
    found = sample(encoder, texts)
    assert MOST / 2 <= found.characters <= MOST
    assert found.lost_share == pytest.approx(0.5, abs=0.02)
    assert found.total == 5_000_000
    assert sample(encoder, texts[:7], [], texts[7:9], *([text] for text in texts[9:])) == found


def test_texts_count_by_their_size():
    large = ReturnedText(characters=100, lost=90, total=9900)
    small = ReturnedText(characters=100, lost=0, total=100)
    assert mean_lost_share([large, small]) == pytest.approx(0.891)
    assert mean_lost_share([]) == 0
