from pathlib import Path

import numpy as np
import pytest
from tiny import jsonl_corpus

from zeroflow.data import build_times, document_table, statistics
from zeroflow.data.build import build_shards
from zeroflow.data.build_times import last_build_times
from zeroflow.data.corpus import CorpusConfig
from zeroflow.data.shards import ShardConfig
from zeroflow.data.tokenizer import TokenizerConfig
from zeroflow.data.tokenizer_origins import fetch_tokenizer
from zeroflow.report import data_page

CONFIG = ShardConfig(seq_len=32, train_rows=10**6, validation_rows=10**6, validation_fraction=0.1)


@pytest.fixture
def shards(text, tmp_path):
    return build_shards(CONFIG, *text[:2], tmp_path)


def test_lengths_are_those_of_whole_documents(shards, text):
    seen = statistics.gather(shards, text.tokenizer)
    table = [line for path in shards.part_paths for line in document_table.read(path).to_pylist()]
    trained = dict.fromkeys(line["id"] for line in table if line["split"] == "train")
    texts = [text.texts[int(name[1:])] for name in trained]
    expected = text.tokenizer.load_encoder().encode(texts).lengths + 1
    assert seen.lengths.tolist() == expected.tolist()
    assert seen.lengths.sum() == shards.train.document_tokens


def test_tables_and_build_times_of_some_parts_are_enough(small_pieces, text, tmp_path, monkeypatch):
    shards = build_shards(CONFIG, *text[:2], tmp_path)
    monkeypatch.setattr(statistics, "_MOST_TABLES", 3)
    monkeypatch.setattr(build_times, "_MOST_BYTES", 200)
    assert len(last_build_times(shards.path)) < shards.parts
    last = shards.parts - 1
    assert shards.some_parts(3)[0] == 0 and shards.some_parts(3)[-1] == last
    for number in set(range(shards.parts)) - set(shards.some_parts(3)):
        (shards.part(number) / document_table.FILE).unlink()
    seen = statistics.gather(shards, text.tokenizer)
    assert seen.parts == 3 and 0 < len(seen.lengths) < shards.train.documents
    page = data_page.page(shards, seen, text.tokenizer, plot=Path("lengths.png")).linked
    assert "(in 3 of the parts)" in page


def test_page_describes_the_data_and_its_rows(shards, text):
    seen = statistics.gather(shards, text.tokenizer)
    page = data_page.page(shards, seen, text.tokenizer, plot=Path("lengths.png")).linked
    source = seen.source["source"]
    assert f"| Source | {source}" in page
    assert f"revision {text.corpus.data_revision}" in page
    assert "train, 400 tokens, encoded by fastokens" in page
    padding = shards.train.padding_tokens
    share = padding / (shards.train.rows * 33)
    assert f"| padding | {padding:,} ({share:.2%})" in page
    assert f"| documents | {shards.train.documents} | {shards.validation.documents} |" in page
    assert "![histogram of document lengths](lengths.png)" in page
    assert "MB of text/s" in page
    assert any(sample[:20] in document for sample in seen.samples for document in text.texts)


def test_page_says_which_documents_are_in_both_splits(text, tmp_path):
    book = jsonl_corpus(tmp_path / "book.jsonl", ["\n".join(text.texts)])
    shards = build_shards(CONFIG, book, text.tokenizer, tmp_path)
    seen = statistics.gather(shards, text.tokenizer)
    page = data_page.page(shards, seen, text.tokenizer, plot=Path("x")).linked
    assert "| In both splits | 1 document: its end is held out |" in page
    many = shards.replace(held_out_ends=2)
    page = data_page.page(many, seen, text.tokenizer, plot=Path("x")).linked
    assert "| In both splits | 2 documents: their ends are held out |" in page


def test_speed_is_that_of_parts_that_were_built_here(shards, text):
    again = build_shards(CONFIG, *text[:2], shards.path.parents[1])
    assert again.reused
    assert len(last_build_times(shards.path)) == shards.parts, "reading is no building"
    (shards.path / build_times.FILE).unlink()
    seen = statistics.gather(shards, text.tokenizer)
    assert seen.tokens_per_second is None
    assert "Built here" not in data_page.page(shards, seen, text.tokenizer, plot=Path("x")).linked


def test_synthetic_data_is_shown_as_ids(tmp_path):
    corpus = CorpusConfig(data_mode="synthetic")
    tokenizer = fetch_tokenizer(
        TokenizerConfig(tokenizer_name="synthetic", vocab_size=300), corpus, tmp_path
    )
    shards = build_shards(
        CONFIG.replace(train_rows=5, validation_rows=1), corpus, tokenizer, tmp_path
    )
    seen = statistics.gather(shards, tokenizer)
    ids = np.array([int(i) for i in seen.samples[0].split()])
    assert ids.min() >= 0 and ids.max() < 300
    assert (
        "| bytes per token | none | none |"
        in data_page.page(shards, seen, tokenizer, plot=Path("lengths.png")).linked
    )
