import json

import numpy as np
import pytest
from shard_sets import ALL, SMALL, rows_of, table_of
from tiny import files_corpus, jsonl_corpus

from zeroflow import artifacts
from zeroflow.data import build, part_plan
from zeroflow.data.build import build_shards
from zeroflow.data.corpus import resolve_corpus
from zeroflow.data.documents import Tally
from zeroflow.data.holdout import NOTHING, choose_holdout, holdout_positions
from zeroflow.data.rows import Rows
from zeroflow.data.slices import all_slices, read_slice


def test_held_out_positions_are_spread_evenly_and_depend_on_the_id_alone():
    ids = [f"document {i}".encode() for i in range(10_000)]
    places = sorted(holdout_positions(ids).tolist())
    # Kolmogorov-Smirnov: one in a million even samples deviates by more than 0.027
    assert max(abs(place - i / 10_000) for i, place in enumerate(places)) < 0.027
    assert holdout_positions(ids[7:8]) == holdout_positions(ids)[7]


def test_no_validation_document_is_used_for_training(shards, text):
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
def test_part_of_a_corpus_of_a_few_documents_is_held_out(text, tmp_path, count, fraction):
    few = jsonl_corpus(tmp_path / "few.jsonl", text.texts[:count])
    config = SMALL.replace(validation_fraction=fraction)
    shards = build_shards(config, few, text.tokenizer, tmp_path / "cache")
    assert shards.documents in (count, count + 1)  # the end of one may be held out
    assert shards.train.rows and shards.validation.rows


@pytest.mark.parametrize("texts", [[], ["x"]])
def test_corpus_that_is_too_small_to_hold_anything_out_is_refused(text, tmp_path, texts):
    few = jsonl_corpus(tmp_path / "few.jsonl", texts)
    with pytest.raises(ValueError, match="the corpus is too small"):
        build_shards(SMALL, few, text.tokenizer, tmp_path / "cache")


def test_share_that_is_held_out_does_not_grow_with_short_documents(text, tmp_path):
    short = jsonl_corpus(tmp_path / "short.jsonl", [f"hi {i}" for i in range(3000)])
    config = ALL.replace(seq_len=2048, validation_fraction=0.02)
    shards = build_shards(config, short, text.tokenizer, tmp_path)
    # binomial: 60 of 3,000, with a deviation of 7.7
    assert 20 < shards.validation.documents < 100


def test_part_of_a_few_repeated_documents_is_held_out(text, tmp_path):
    texts = [text.texts[i % 3] for i in range(60)]
    same = jsonl_corpus(tmp_path / "same.jsonl", texts).replace(deduplicate=True)
    shards = build_shards(ALL.replace(validation_fraction=0.02), same, text.tokenizer, tmp_path)
    # Each of 20 copies of the document that is cut has a beginning and an end
    assert (shards.train.documents, shards.validation.documents) == (3, 1)
    assert shards.duplicates == 60 + 20 - 4


def held_out_share(shards):
    train, held_out = shards.train.document_tokens, shards.validation.document_tokens
    return held_out / (train + held_out)


def prose(text, count):
    """A text of `count` documents' length."""
    return "\n".join(text.texts[i % len(text.texts)] for i in range(count))


def text_of(shards, tokenizer, split):
    decode = tokenizer.decoder()
    ids = documents_in(shards, split)
    return [decode(document) for document in ids]


def documents_in(shards, split):
    lines = [line for line in table_of(shards) if line["split"] == split]
    rows = rows_of(shards.part_paths[0], split)
    found = []
    for line in lines:
        if line["start"] == 0:
            found.append([])
        piece = rows[line["row"]][line["offset"] : line["offset"] + line["tokens"]].tolist()
        found[-1] += [token for token in piece if token != shards.end_of_text]
    return found


def test_end_of_one_large_document_is_held_out(text, tmp_path):
    book = prose(text, 400)
    one = jsonl_corpus(tmp_path / "book.jsonl", [book])
    shards = build_shards(ALL.replace(validation_fraction=0.02), one, text.tokenizer, tmp_path)
    assert 0.01 < held_out_share(shards) < 0.03
    [beginning] = text_of(shards, text.tokenizer, "train")
    [end] = text_of(shards, text.tokenizer, "validation")
    assert beginning + end == book and beginning.endswith("\n")


def test_end_of_a_novel_beside_notes_is_held_out_and_the_rest_is_trained_on(text, tmp_path):
    novel, notes = prose(text, 400), prose(text, 2)
    both = jsonl_corpus(tmp_path / "both.jsonl", [novel, notes])
    shards = build_shards(ALL.replace(validation_fraction=0.02), both, text.tokenizer, tmp_path)
    assert 0.01 < held_out_share(shards) < 0.03
    [trained] = text_of(shards, text.tokenizer, "train")
    assert novel.startswith(trained)


def test_document_longer_than_the_whole_share_is_never_held_out(text, tmp_path):
    books = 0
    for seed in range(20):  # each corpus has another book, so that chance would hold out some
        texts = [f"document {seed} {i}: " + text.texts[i % 60][:100] for i in range(1200)]
        texts[600] = f"book {seed}\n" + prose(text, 300)
        corpus = jsonl_corpus(tmp_path / f"{seed}.jsonl", texts)
        rule = choose_holdout(corpus, fraction=0.1, row_tokens=33)
        batches = [rule.apply(batch) for batch in read_slice(corpus, all_of(corpus), Tally())]
        for batch, held_out in batches:
            lengths = np.array([len(t) for t in batch.texts])
            books += int(held_out[lengths > 10_000].sum())
    assert not books and rule.longest < len(texts[600])


def all_of(corpus):
    [piece] = all_slices(corpus)
    return piece


def test_repeated_ids_do_not_decide_which_documents_are_held_out(text, tmp_path):
    file = tmp_path / "categories.jsonl"
    lines = [
        {"id": ("web", "books")[i % 2], "text": f"{i} {text.texts[i % 60]}"} for i in range(3000)
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    config = ALL.replace(validation_fraction=0.02)
    shards = build_shards(config, files_corpus(str(file)), text.tokenizer, tmp_path)
    assert 0.01 < held_out_share(shards) < 0.03  # binomial: 60 of 3,000, with a deviation of 7.7


def test_validation_files_are_never_trained_on_and_the_whole_corpus_is_trained_on(text, tmp_path):
    train = tmp_path / "train.txt"
    train.write_text(prose(text, 40))
    held_out = tmp_path / "held_out.txt"
    held_out.write_text(prose(text, 3))
    corpus = files_corpus(str(train), validation_path=(str(held_out),))
    shards = build_shards(ALL, corpus, text.tokenizer, tmp_path)
    assert [part.name for part in shards.part_paths] == ["part-00000", "part-00001"]
    assert shards.validation.text_bytes == held_out.stat().st_size
    assert shards.train.text_bytes == train.stat().st_size

    held_out.write_text("other text")
    with pytest.raises(ValueError, match="the files of --validation-path have changed"):
        resolve_corpus(corpus)
    changed = files_corpus(str(train), validation_path=(str(held_out),))
    assert build_shards(ALL, changed, text.tokenizer, tmp_path).path != shards.path


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("none.txt", "--validation-path .*none.txt matches no file"),
        ("folder", "--validation-path .*folder is a folder"),
        ("link.txt", "--validation-path: .*link.txt is a link to nowhere"),
    ],
)
def test_errors_about_validation_files_name_their_flag(text, tmp_path, name, problem):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.txt").symlink_to("nowhere")
    train = tmp_path / "train.txt"
    train.write_text(text.texts[0])
    with pytest.raises(ValueError, match=problem):
        files_corpus(str(train), validation_path=(str(tmp_path / name),))


def test_validation_rows_are_not_searched_for_if_there_are_validation_files(
    small_pieces, text, tmp_path
):
    held_out = tmp_path / "held_out.txt"
    held_out.write_text(text.texts[0])
    corpus = text.corpus.replace(validation_path=(str(held_out),), validation_revision=None)
    corpus = resolve_corpus(corpus).corpus
    few = ALL.replace(train_rows=1)  # which asks for a million rows to validate on
    assert build_shards(few, corpus, text.tokenizer, tmp_path).parts == 2


def test_set_of_an_older_version_is_reused_as_it_is(text, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "FORMAT", 3)
    older = build_shards(SMALL, *text[:2], tmp_path)
    plan = artifacts.read_signed(older.path / "plan.json")
    plan["held_out_below"] = plan.pop("holdout")["below"]
    artifacts.write_signed(older.path / "plan.json", plan)
    monkeypatch.undo()
    again = build_shards(SMALL, *text[:2], tmp_path)
    assert again.reused and again.path == older.path


def test_set_of_an_older_version_without_validation_rows_is_not_used(text, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "FORMAT", 3)
    monkeypatch.setattr(part_plan, "choose_holdout", lambda *_, **__: NOTHING)
    with pytest.raises(ValueError, match="none is left for validation"):
        build_shards(SMALL, *text[:2], tmp_path)
    monkeypatch.undo()
    assert build_shards(SMALL, *text[:2], tmp_path).validation.rows
