import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from shard_sets import ALL, SMALL, rows_of, table_of
from tiny import files_corpus, jsonl_corpus

from zeroflow import artifacts
from zeroflow.data import build, holdout, part_counts, part_plan
from zeroflow.data.build import build_shards
from zeroflow.data.corpus import CorpusConfig, list_files, resolve_corpus
from zeroflow.data.documents import Tally
from zeroflow.data.holdout import NOTHING, Holdout, choose_holdout, holdout_positions
from zeroflow.data.rows import Rows
from zeroflow.data.slices import all_slices, read_documents, read_slice, require_readable


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
    assert shards.documents == count
    assert shards.train.rows and shards.validation.rows


@pytest.mark.parametrize("texts", [[], ["x"]])
def test_corpus_that_is_too_small_to_hold_anything_out_is_refused(text, tmp_path, texts):
    few = jsonl_corpus(tmp_path / "few.jsonl", texts)
    with pytest.raises(ValueError, match="the corpus is too small"):
        build_shards(SMALL, few, text.tokenizer, tmp_path / "cache")


def test_at_most_a_fifth_of_short_documents_is_held_out_to_fill_rows(text, tmp_path):
    short = jsonl_corpus(tmp_path / "short.jsonl", [f"hi {i}" for i in range(3000)])
    config = ALL.replace(seq_len=2048, validation_fraction=0.02)
    shards = build_shards(config, short, text.tokenizer, tmp_path)
    # binomial: 600 of 3,000, with a deviation of 22
    assert 490 < shards.validation.documents < 710


def test_part_of_a_few_repeated_documents_is_held_out(text, tmp_path):
    texts = [text.texts[i % 3] for i in range(60)]
    same = jsonl_corpus(tmp_path / "same.jsonl", texts).replace(deduplicate=True)
    shards = build_shards(ALL.replace(validation_fraction=0.02), same, text.tokenizer, tmp_path)
    assert (shards.train.documents, shards.validation.documents) == (3, 1)
    assert (shards.documents, shards.duplicates) == (3, 57), "a copy of the one that is cut is one"


def test_document_whose_end_is_held_out_counts_once(text, tmp_path, caplog):
    caplog.set_level("INFO", logger="zeroflow")
    book = jsonl_corpus(tmp_path / "book.jsonl", [prose(text, 400), "a note"])
    shards = build_shards(ALL, book, text.tokenizer, tmp_path)
    assert (shards.documents, shards.held_out_ends) == (2, 1)
    assert (shards.train.documents, shards.validation.documents) == (2, 1)
    assert ", from 2 documents: " in caplog.text
    for part in shards.part_paths:  # as an earlier version wrote it
        manifest = artifacts.read_signed(part / artifacts.MANIFEST)
        assert manifest["facts"].pop("held_out_ends") == 1
        artifacts.write_signed(part / artifacts.MANIFEST, manifest)
    again = build_shards(ALL, book, text.tokenizer, tmp_path)
    assert again.reused and again.documents == 2


def test_documents_whose_ends_are_held_out_count_once(small_pieces, text, tmp_path, monkeypatch):
    monkeypatch.setattr(part_counts, "PAGE_PARTS", 2)
    texts = [
        f"{i} " + prose(text, 40 if i % 120 == 5 else 1)[: 9000 if i % 120 == 5 else 12]
        for i in range(1200)
    ]
    corpus = jsonl_corpus(tmp_path / "giants.jsonl", texts)
    for name in ("cut", "pages"):  # once from the parts, and once from the pages of their counts
        shards = build_shards(ALL, corpus, text.tokenizer, tmp_path)
        assert (shards.documents, shards.held_out_ends) == (1200, 10), name
        assert shards.train.documents + shards.validation.documents == 1210
    assert list(shards.path.glob("counts-*.arrow"))


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
    trained, others = text_of(shards, text.tokenizer, "train")
    assert novel.startswith(trained) and others == notes


def test_a_fair_share_of_notes_beside_a_novel_is_held_out(text, tmp_path):
    notes = [f"note {i}: {text.texts[i % 60][:40]}" for i in range(200)]
    corpus = jsonl_corpus(tmp_path / "both.jsonl", [prose(text, 3000), *notes])
    rule = choose_holdout(corpus, fraction=0.02, row_tokens=33)
    trained, held_out = divided(corpus, rule)
    assert 0.01 < share_of(trained, held_out) < 0.03
    assert sum(note in trained for note in notes) > 190, "before, 200 were held out"


def divided(corpus, rule):
    """Return the texts that are trained on, and those that are held out."""
    found = [], []
    for batch, held_out, _ in map(rule.apply, read_slice(corpus, all_of(corpus), Tally())):
        for one, out in zip(batch.texts, held_out, strict=True):
            found[int(out)].append(one)
    return found


def share_of(trained, held_out):
    trained, held_out = sum(map(len, trained)), sum(map(len, held_out))
    return held_out / (trained + held_out)


MANY = {
    "one huge": lambda i, prose: prose * 400 if i == 600 else prose[:20],
    "ten giants": lambda i, prose: prose * 10 if i % 120 == 5 else prose[:12],
    "sixty lumps": lambda i, prose: prose * 4 if i % 20 == 5 else prose[:5],
}


@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize("name", MANY)
def test_share_is_accurate_for_many_documents_of_which_some_are_long(
    text, tmp_path, monkeypatch, name, measured
):
    if not measured:
        monkeypatch.setattr(holdout, "_MEASURED_BYTES", 0)
    some = prose(text, 2)
    for seed in range(5):  # each corpus has other hashes
        texts = [f"{seed} {i} " + MANY[name](i, some) for i in range(1200)]
        corpus = jsonl_corpus(tmp_path / f"{seed}.jsonl", texts)
        rule = choose_holdout(corpus, fraction=0.02, row_tokens=33)
        trained, held_out = divided(corpus, rule)
        assert 0.009 < share_of(trained, held_out) < 0.041
        assert sum(map(len, trained)) + sum(map(len, held_out)) == sum(map(len, texts))
        short = [one for one in held_out if len(one) < 100]
        assert len(short) < 100, "of 1,200"


def test_at_least_a_few_rows_of_many_short_documents_are_held_out(text, tmp_path):
    texts = [f"{i} {text.texts[i % 60][:100]}" for i in range(1200)]
    corpus = jsonl_corpus(tmp_path / "short.jsonl", texts)
    rule = choose_holdout(corpus, fraction=0.001, row_tokens=513)
    _, held_out = divided(corpus, rule)
    assert sum(map(len, held_out)) > 4 * 513 * 4 / 2


def test_rule_for_many_documents_of_similar_length_is_the_one_of_format_4(text, tmp_path):
    texts = [f"{i} {text.texts[i % 60]}" for i in range(1200)]
    corpus = jsonl_corpus(tmp_path / "even.jsonl", texts)
    size = (tmp_path / "even.jsonl").stat().st_size
    rule = choose_holdout(corpus, fraction=0.02, row_tokens=33)
    assert rule == Holdout(below=0.02, longest=int(0.02 * size))


def test_document_longer_than_the_whole_share_is_never_held_out_as_a_whole(text, tmp_path):
    books = 0
    for seed in range(20):  # each corpus has another book, so that chance would hold out some
        texts = [f"document {seed} {i}: " + text.texts[i % 60][:100] for i in range(1200)]
        texts[600] = f"book {seed}\n" + prose(text, 300)
        corpus = jsonl_corpus(tmp_path / f"{seed}.jsonl", texts)
        rule = choose_holdout(corpus, fraction=0.1, row_tokens=33)
        batches = [rule.apply(batch) for batch in read_slice(corpus, all_of(corpus), Tally())]
        for batch, held_out, _ in batches:
            lengths = np.array([len(t) for t in batch.texts])
            books += int(held_out[lengths > len(texts[600]) / 2].sum())
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


@pytest.fixture
def folder(text, tmp_path):
    """Three notes, and a copy of the first under another name elsewhere."""
    (tmp_path / "notes").mkdir()
    for i in range(3):
        (tmp_path / f"notes/{i}.txt").write_text(text.texts[i])
    (tmp_path / "copy.txt").write_text(text.texts[0])
    (tmp_path / "link.txt").symlink_to("notes/0.txt")
    return tmp_path


@pytest.mark.parametrize("name", ["notes/0.txt", "copy.txt", "link.txt"])
def test_validation_files_among_those_to_train_on_are_left_out_of_training(
    text, folder, name, caplog
):
    corpus = files_corpus(str(folder / "notes/*.txt"), validation_path=(str(folder / name),))
    assert [file.name for file in list_files(corpus)] == ["1.txt", "2.txt"]
    assert [document.text for document in read_documents(corpus)] == text.texts[1:3]
    [line] = caplog.messages
    assert line == (
        "1 file left out of training, because --validation-path names the same text: 0.txt"
    )
    shards = build_shards(ALL, corpus, text.tokenizer, folder / "cache")
    assert (shards.train.documents, shards.validation.documents) == (2, 1)


def test_other_validation_files_do_not_change_the_digest_of_the_corpus(folder, text):
    (folder / "other.txt").write_text(text.texts[5])
    (folder / "same size.txt").write_text(text.texts[0][::-1])
    alone = files_corpus(str(folder / "notes/*.txt"))
    for name in ("other.txt", "same size.txt"):
        both = files_corpus(str(folder / "notes/*.txt"), validation_path=(str(folder / name),))
        assert both.data_revision == alone.data_revision


def test_corpus_without_text_other_than_its_validation_files_is_refused(folder):
    path = str(folder / "copy.txt")
    asked = CorpusConfig(data_mode="files", data_path=(path,), validation_path=(path,))
    for check in (require_readable, resolve_corpus):
        with pytest.raises(ValueError, match="no text is left to train on: name other text"):
            check(asked)


def test_validation_files_are_left_out_of_the_sample():
    path = str(Path(argparse.__file__).resolve())
    corpus = CorpusConfig(data_mode="sample", validation_path=(path,), data_revision="unread")
    names = [file.name for file in list_files(corpus)]
    assert "ast.py" in names and "argparse.py" not in names


def test_set_with_validation_files_of_the_earlier_version_is_reused(
    small_pieces, text, folder, monkeypatch
):
    named = (str(folder / "copy.txt"),)
    corpus = text.corpus.replace(validation_path=named, validation_revision=None)
    corpus = resolve_corpus(corpus).corpus
    newest = build.FORMAT
    monkeypatch.setattr(build, "FORMAT", 4)
    older = build_shards(SMALL, corpus, text.tokenizer, folder / "cache")
    monkeypatch.setattr(build, "FORMAT", newest)
    again = build_shards(SMALL, corpus, text.tokenizer, folder / "cache")
    assert again.reused and again.path == older.path


def test_reason_for_another_share_is_logged(text, tmp_path, caplog, monkeypatch):
    config = ALL.replace(validation_fraction=0.001, seq_len=64)
    few = jsonl_corpus(tmp_path / "few.jsonl", text.texts)
    build_shards(config, few, text.tokenizer, tmp_path / "cache")
    why = "at least 4 rows are held out, or 20% of a shorter text"
    assert f"asks for 0.1 %: {why}" in caplog.text
    caplog.clear()

    texts = [f"{i} {text.texts[i % 60]}" for i in range(1200)]
    many = jsonl_corpus(tmp_path / "many.jsonl", texts)
    monkeypatch.setattr(build, "FORMAT", 4)
    monkeypatch.setattr(part_plan, "choose_holdout", lambda *_, **__: Holdout(below=0.01))
    shards = build_shards(ALL.replace(validation_fraction=0.05), many, text.tokenizer, tmp_path)
    assert f"a hash chose {shards.validation.documents} of 1,200 documents" in caplog.text
    caplog.clear()
    monkeypatch.undo()
    build_shards(ALL.replace(validation_fraction=0.05), many, text.tokenizer, tmp_path)
    assert f"an earlier version built {shards.path.name}; delete it" in caplog.text


@pytest.mark.parametrize("sizes", [(500, 500), (20, 5000), (3, 3)])
def test_share_of_two_short_documents_is_not_put_down_to_a_hash(text, tmp_path, caplog, sizes):
    book = prose(text, 9)
    two = jsonl_corpus(tmp_path / "two.jsonl", [book[: sizes[0]], book[-sizes[1] :]])
    config = ALL.replace(validation_fraction=0.02, seq_len=64)
    build_shards(config, two, text.tokenizer, tmp_path)
    assert "2.0 %: at least 4 rows are held out, or 20% of a shorter text" in caplog.text


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
