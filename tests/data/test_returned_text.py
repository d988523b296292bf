"""Lost text: characters that are missing or added after encoding and decoding."""

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from public_tokenizers import like_llama_2, like_qwen, of_bytes, of_words, save
from tokenizers import Tokenizer, normalizers

from zeroflow.data import encoding, returned_text
from zeroflow.data.returned_text import ReturnedText, lost_characters, sample

DECOMPOSED = unicodedata.normalize("NFD", "café naïve Ünïcode")


def lower_casing() -> Tokenizer:
    tokenizer = of_bytes()
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


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


def test_sample_is_spread_over_the_texts_and_bounded(tmp_path):
    file = save(tmp_path, lower_casing()) / "tokenizer.json"
    encoder = encoding.load(file, "tokenizers")
    texts = ["a" * 5000] * 500 + ["A" * 5000] * 500
    found = sample(encoder, texts)
    assert found.characters <= returned_text._EXCERPTS * returned_text._EXCERPT_CHARACTERS
    assert found.lost_share == pytest.approx(0.5, abs=0.02)
    assert found + found == ReturnedText(characters=2 * found.characters, lost=2 * found.lost)
