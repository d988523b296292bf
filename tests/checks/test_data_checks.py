"""Checks of the shards."""

from checked import SHARDS, assert_failed, checked_job
from tiny import jsonl_corpus

from zeroflow.checks import data_checks
from zeroflow.data.build import build_shards
from zeroflow.data.corpus import CorpusConfig
from zeroflow.data.rows import Rows
from zeroflow.data.tokenizer import TokenizerConfig, fetch_tokenizer


def test_synthetic_data_has_no_text_to_check(tmp_path):
    synthetic = CorpusConfig(data_mode="synthetic")
    config = TokenizerConfig(tokenizer_name="synthetic", vocab_size=300)
    tokenizer = fetch_tokenizer(config, synthetic, tmp_path)
    job = checked_job(tmp_path, build_shards(SHARDS, synthetic, tokenizer, tmp_path), tokenizer)
    found = list(data_checks.checks(job.shards, job.tokenizer, job.model))
    assert [check.name for check in found] == ["checksums", "token ids"]
    assert all(check.passed for check in found)


def test_ids_of_another_tokenizer_are_caught_by_their_text(text, tmp_path):
    shards = build_shards(SHARDS, *text[:2], tmp_path)
    numbers = [f"{n * n} {n**3} fünf" for n in range(999)]
    config = TokenizerConfig(tokenizer_name="train", vocab_size=400)
    other = fetch_tokenizer(config, jsonl_corpus(tmp_path / "numbers.jsonl", numbers), tmp_path)
    rows = Rows(shards, "train")
    sound = data_checks.text(rows, text.tokenizer)
    assert sound.passed and float(sound.figure.partition("%")[0]) > 95
    assert_failed(data_checks.text(rows, other), "survive", "zeroflow data")
