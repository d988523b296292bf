import numpy as np
import pytest
from shard_sets import ALL, SMALL, table_of
from tiny import jsonl_corpus

from zeroflow.data.build import build_shards
from zeroflow.data.holdout import holdout_positions
from zeroflow.data.rows import Rows


def test_held_out_places_are_spread_evenly_and_known_from_the_id_alone():
    ids = [f"document {i}".encode() for i in range(10_000)]
    places = sorted(holdout_positions(ids).tolist())
    # Kolmogorov-Smirnov: one in a million even samples deviates by more than 0.027
    assert max(abs(place - i / 10_000) for i, place in enumerate(places)) < 0.027
    assert holdout_positions(ids[7:8]) == holdout_positions(ids)[7]


def test_no_validation_document_is_trained_on(shards, text):
    held_out = {line["id"] for line in table_of(shards) if line["split"] == "validation"}
    trained = {line["id"] for line in table_of(shards) if line["split"] == "train"}
    assert len(held_out) + len(trained) == 60 and held_out and trained
    assert len(held_out) < 20
    assert (shards.validation.documents, shards.train.documents) == (len(held_out), len(trained))


def test_runs_of_any_length_are_validated_on_the_same_rows(small_pieces, text, tmp_path):
    first = np.arange(4)
    for rows in (1, 100, 400):
        shards = build_shards(SMALL.replace(train_rows=rows), *text[:2], tmp_path)
        held_out = Rows(shards, "validation")[first]
        assert np.array_equal(held_out, Rows(shards, "validation")[first])
        if rows == 1:
            expected = held_out
        assert np.array_equal(held_out, expected)


@pytest.mark.parametrize("fraction", [0.001, 0.999])
@pytest.mark.parametrize("count", [2, 3])
def test_corpus_of_a_few_documents_is_held_out_from_as_well(text, tmp_path, count, fraction):
    few = jsonl_corpus(tmp_path / "few.jsonl", text.texts[:count])
    config = SMALL.replace(validation_fraction=fraction)
    shards = build_shards(config, few, text.tokenizer, tmp_path / "cache")
    assert shards.documents == count
    assert shards.train.rows and shards.validation.rows


@pytest.mark.parametrize("texts", [[], ["one document"]])
def test_corpus_that_cannot_be_held_out_from_is_refused(text, tmp_path, texts):
    few = jsonl_corpus(tmp_path / "few.jsonl", texts)
    with pytest.raises(ValueError, match="the corpus is too small"):
        build_shards(SMALL, few, text.tokenizer, tmp_path / "cache")


def test_share_that_is_held_out_does_not_grow_with_short_documents(text, tmp_path):
    short = jsonl_corpus(tmp_path / "short.jsonl", [f"hi {i}" for i in range(3000)])
    config = ALL.replace(seq_len=2048, validation_fraction=0.02)
    shards = build_shards(config, short, text.tokenizer, tmp_path)
    # binomial: 60 of 3,000, with a deviation of 7.7
    assert 20 < shards.validation.documents < 100


def test_few_documents_that_come_again_and_again_are_held_out_from_as_well(text, tmp_path):
    texts = [text.texts[i % 3] for i in range(60)]
    same = jsonl_corpus(tmp_path / "same.jsonl", texts).replace(deduplicate=True)
    shards = build_shards(ALL.replace(validation_fraction=0.02), same, text.tokenizer, tmp_path)
    assert (shards.documents, shards.duplicates) == (3, 57)
    assert shards.train.documents and shards.validation.documents
