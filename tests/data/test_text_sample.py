"""The predicted number of tokens of the user's own files, compared with the exact one."""

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from hub import english
from public_tokenizers import of_bytes
from tiny import files_corpus

from zeroflow.data import bpe, text_sample
from zeroflow.data.formats import json_lines
from zeroflow.data.slices import local_text_bytes, read_documents


@pytest.fixture(scope="module")
def tokenizer() -> tokenizers.Tokenizer:
    return of_bytes()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Several megabytes, most of them in few documents."""
    rng = random.Random(0)
    sentences = [english(rng) for _ in range(300)]
    return [" ".join(rng.choices(sentences, k=rng.choice([1, 1, 1, 9]))) for _ in range(600)]


def lines(texts: list[str]) -> bytes:
    rows = ({"text": text, "id": str(i), "other": "x" * 300} for i, text in enumerate(texts))
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def predicted(path: Path, tokenizer: tokenizers.Tokenizer | None = None) -> float:
    """Number of tokens that is predicted for the files."""
    corpus = files_corpus(str(path))
    found = text_sample.measure(
        corpus, tokenizer, lambda texts: bpe.train_bpe(iter(texts), vocab_size=400)
    )
    assert found is not None
    return local_text_bytes(corpus) / found.bytes_per_token


def exact(path: Path, tokenizer: tokenizers.Tokenizer) -> int:
    documents = [document.text for document in read_documents(files_corpus(str(path)))]
    encoded = tokenizer.encode_batch_fast(documents, add_special_tokens=False)
    return sum(len(one.ids) + 1 for one in encoded)


KINDS = {
    "one.txt": (1, lambda texts: " ".join(texts).encode()),
    "lines.jsonl": (1, lines),
    # So long that only their beginning is read
    "lines.txt.gz": (8, lambda texts: gzip.compress("".join(texts).encode(), compresslevel=1)),
    "lines.jsonl.gz": (8, lambda texts: gzip.compress(lines(texts), compresslevel=1)),
}


@pytest.mark.parametrize("name", KINDS)
def test_tokens_of_a_file_are_predicted_from_a_sample(tmp_path, tokenizer, texts, name):
    times, write = KINDS[name]
    (tmp_path / name).write_bytes(write(texts))
    once = exact(tmp_path / name, tokenizer)
    (tmp_path / name).write_bytes(write(texts * times))
    assert predicted(tmp_path / name, tokenizer) == pytest.approx(times * once, rel=0.25)


def test_tokens_of_row_groups_are_predicted_from_a_few(tmp_path, tokenizer, texts):
    rows = [{"text": text, "other": "x" * 300} for text in texts]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=20)
    file = tmp_path / "a.parquet"
    assert predicted(file, tokenizer) == pytest.approx(exact(file, tokenizer), rel=0.2)


def test_tokens_of_many_small_files_are_predicted_from_a_few(tmp_path, tokenizer, texts):
    for number, text in enumerate(texts[:200]):
        (tmp_path / f"{number}.txt").write_text(text[:300])
    files = tmp_path / "*.txt"
    assert predicted(files, tokenizer) == pytest.approx(exact(files, tokenizer), rel=0.2)


def test_tokens_of_thousands_of_notes_are_predicted_before_their_tokenizer_is_trained(
    tmp_path, texts
):
    notes = [text[start : start + 60] for text in texts for start in range(0, 360, 60)]
    for number, note in enumerate(notes):
        (tmp_path / f"{number}.txt").write_text(note)
    files = tmp_path / "*.txt"
    trained = bpe.train_bpe(iter(notes), vocab_size=400)
    assert predicted(files) == pytest.approx(exact(files, trained), rel=0.2)


@pytest.mark.parametrize("times", [1, 3])
def test_tokens_of_lines_longer_than_a_place_are_predicted(tmp_path, tokenizer, texts, times):
    file = tmp_path / "long.jsonl"
    file.write_text("\n".join(json.dumps({"text": " ".join(texts[:90])}) for _ in range(times)))
    assert predicted(file, tokenizer) == pytest.approx(exact(file, tokenizer), rel=0.2)


def test_lines_too_long_for_a_sample_are_not_read(tmp_path, tokenizer, texts, monkeypatch):
    monkeypatch.setattr(json_lines, "_LONGEST_LINE", 2**18)
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": " ".join(texts)}))
    corpus = files_corpus(str(tmp_path / "long.jsonl"))
    assert text_sample.measure(corpus, tokenizer, train=lambda texts: tokenizer) is None


def test_prediction_says_that_duplicates_are_included(tmp_path, tokenizer, texts):
    (tmp_path / "twice.jsonl").write_bytes(lines(texts[:20] * 2))
    for deduplicate, said in ((False, False), (True, True)):
        corpus = files_corpus(str(tmp_path / "twice.jsonl")).replace(deduplicate=deduplicate)
        found = text_sample.measure(corpus, tokenizer, train=lambda texts: tokenizer)
        assert found is not None
        assert found.source.endswith("duplicates included") is said


@pytest.mark.parametrize("members", [1, 2])
def test_tokens_of_a_small_compressed_file_are_predicted(tmp_path, tokenizer, texts, members):
    file = tmp_path / "small.jsonl.gz"
    file.write_bytes(gzip.compress(lines(texts[:50])) * members)
    assert predicted(file, tokenizer) == pytest.approx(exact(file, tokenizer), rel=0.05)


def test_tokenizer_that_is_not_trained_yet_is_trained_on_half_of_the_sample(tmp_path, texts):
    (tmp_path / "one.txt").write_text(" ".join(texts))
    trained = bpe.train_bpe(iter(texts), vocab_size=400)
    file = tmp_path / "one.txt"
    assert predicted(file) == pytest.approx(exact(file, trained), rel=0.2)


def test_sample_of_a_large_file_reads_only_a_part_of_it(tmp_path, tokenizer, texts, monkeypatch):
    (tmp_path / "one.txt").write_text(" ".join(texts))
    read = []
    monkeypatch.setattr(text_sample, "_count", lambda tokenizer, texts: read.append(texts) or 1)
    predicted(tmp_path / "one.txt", tokenizer)
    [sampled] = read
    assert [len(text) for text in sampled] == [2**16] * 16


def test_files_without_text_or_with_damage_have_no_prediction(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    (tmp_path / "b.jsonl").write_text('{"words": "one"}\n')
    for name in ("a", "b"):
        corpus = files_corpus(str(tmp_path / f"{name}.jsonl"))
        assert text_sample.measure(corpus, tokenizer, train=lambda texts: tokenizer) is None
