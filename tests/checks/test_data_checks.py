"""Checks of the shards."""

import random
import re

import pytest
from checked import SHARDS, assert_failed, checked_job
from hub import english
from public_tokenizers import like_bert, like_clip, of_bytes, of_words, save
from tiny import jsonl_corpus
from tokenizers import Tokenizer, decoders, normalizers

from zeroflow import artifacts
from zeroflow.checks import data_checks
from zeroflow.checks.check import Check
from zeroflow.data.build import build_shards
from zeroflow.data.corpus import CorpusConfig
from zeroflow.data.tokenizer import TokenizerConfig
from zeroflow.data.tokenizer_origins import fetch_tokenizer


def test_synthetic_data_has_no_text_to_check(tmp_path):
    synthetic = CorpusConfig(data_mode="synthetic")
    config = TokenizerConfig(tokenizer_name="synthetic", vocab_size=300)
    tokenizer = fetch_tokenizer(config, synthetic, tmp_path)
    job = checked_job(tmp_path, build_shards(SHARDS, synthetic, tokenizer, tmp_path), tokenizer)
    found = list(data_checks.checks(job.shards, job.tokenizer, job.model))
    assert [check.name for check in found] == ["checksums", "token ids"]
    assert all(check.passed for check in found)


def test_ids_of_another_tokenizer_fail_the_text_check(text, tmp_path):
    shards = build_shards(SHARDS, *text[:2], tmp_path)
    numbers = [f"{n * n} {n**3} fünf" for n in range(999)]
    config = TokenizerConfig(tokenizer_name="train", vocab_size=400)
    other = fetch_tokenizer(config, jsonl_corpus(tmp_path / "numbers.jsonl", numbers), tmp_path)
    sound = data_checks.text(shards, text.tokenizer)
    assert sound.passed and float(sound.figure.partition("%")[0]) > 95
    assert_failed(data_checks.text(shards, other), "survive", "did not make the other ids", "data")


def pieces_without_marks() -> Tokenizer:
    """Decodes into pieces of words that it does not know."""
    tokenizer = like_bert()
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def spaced_pieces() -> Tokenizer:
    tokenizer = like_clip()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


@pytest.mark.parametrize(
    ("make", "end"), [(pieces_without_marks, "[SEP]"), (spaced_pieces, "<|endoftext|>")]
)
def test_text_check_names_the_tokenizer_if_that_loses_the_text(tmp_path, make, end):
    documents = [english(random.Random(seed)) for seed in range(60)]
    corpus = jsonl_corpus(tmp_path / "english.jsonl", documents)
    folder = save(tmp_path / "tokenizer", make(), {"eos_token": end})
    fetched = fetch_tokenizer(TokenizerConfig(tokenizer_name=str(folder)), corpus, tmp_path)
    shards = build_shards(SHARDS, corpus, fetched, tmp_path)
    found = data_checks.text(shards, fetched)
    assert_failed(found, f"When {folder} made the ids", "lost or changed: use another tokenizer")
    assert "remove the shards" not in found.sentence


@pytest.fixture
def lost_text(tmp_path):
    """Builds shards of English with a tokenizer, and checks them."""
    documents = [english(random.Random(seed)) for seed in range(60)]
    corpus = jsonl_corpus(tmp_path / "english.jsonl", documents)

    def check(tokenizer: Tokenizer, end: str) -> Check:
        folder = save(tmp_path / "tokenizer", tokenizer, {"eos_token": end})
        config = TokenizerConfig(tokenizer_name=str(folder))
        fetched = fetch_tokenizer(config, corpus, tmp_path)
        shards = build_shards(SHARDS, corpus, fetched, tmp_path)
        found = {check.name: check for check in checks_of(tmp_path, shards, fetched)}
        assert all(check.passed for name, check in found.items() if name != "lost text")
        return found["lost text"]

    return check


def checks_of(folder, shards, tokenizer) -> list[Check]:
    job = checked_job(folder, shards, tokenizer)
    return list(data_checks.checks(job.shards, job.tokenizer, job.model))


def test_words_outside_the_vocabulary_fail_with_their_share(lost_text, caplog):
    found = lost_text(of_words("the", "river"), "</s>")
    assert_failed(found, "characters lost", "the limits are 10% unknown", "--tokenizer-name train")
    unknown = float(found.figure.split("%")[0])
    words = re.findall(r"\w+|[^\w\s]+", " ".join(english(random.Random(n)) for n in range(60)))
    known = sum(word in ("the", "river") for word in words)
    assert unknown == pytest.approx(100 - 100 * known / len(words), abs=3)
    early = "are lost by encoding and decoding with"
    assert any(early in text and "the pre-flight fails at 25%" in text for text in caplog.messages)


def test_lower_casing_passes_with_a_warning_that_names_its_share(lost_text, caplog):
    tokenizer = of_bytes()
    tokenizer.normalizer = normalizers.Lowercase()
    found = lost_text(tokenizer, "<|endoftext|>")
    text = "".join(english(random.Random(seed)) for seed in range(60))
    share = 100 * sum(map(str.isupper, text)) / len(text)
    assert found.passed and found.warning
    unknown, lost = (float(share) for share in re.findall(r"([\d.]+)%", found.figure))
    assert unknown == 0
    assert lost == pytest.approx(share, abs=0.3)
    assert any("the pre-flight fails at 25%" in message for message in caplog.messages)


def test_text_that_survives_encoding_passes_without_a_warning(lost_text, caplog):
    found = lost_text(of_bytes(), "<|endoftext|>")
    assert found.passed and not found.warning
    assert re.findall(r"([\d.]+)%", found.figure) == ["0.00", "0.00"]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_shards_of_an_older_version_are_checked_for_unknown_tokens_only(text, tmp_path):
    shards = build_shards(SHARDS, *text[:2], tmp_path)
    for part in shards.part_paths:
        manifest = artifacts.read_signed(part / artifacts.MANIFEST)
        assert manifest.pop("returned")
        artifacts.write_signed(part / artifacts.MANIFEST, manifest)
    found = data_checks.lost_text(shards, text.tokenizer)
    assert found.passed and re.findall(r"([\d.]+)%", found.figure) == ["0.00"]
    assert "an earlier version built the shards" in found.sentence
