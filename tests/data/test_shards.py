import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub import english
from tiny import apart_from_reuse, contents, jsonl_corpus

from zeroflow import artifacts
from zeroflow.data import (
    build,
    parts,
    readers,
    slices,
    split_writer,
    synthetic,
)
from zeroflow.data import builders as builders_module
from zeroflow.data.build import build_shards
from zeroflow.data.builders import Builders, in_threads
from zeroflow.data.corpus import CorpusConfig, resolve_corpus
from zeroflow.data.part_facts import DOCUMENTS, SPLITS, BuiltPart, PartFacts
from zeroflow.data.rows import Rows
from zeroflow.data.shards import PLAN, ShardConfig, ShardSet
from zeroflow.data.tokenizer import Tokenizer, TokenizerConfig, fetch_tokenizer

SYNTHETIC = CorpusConfig(data_mode="synthetic")
SMALL = ShardConfig(seq_len=32, train_rows=50, validation_rows=4, validation_fraction=0.1)
ALL = SMALL.replace(train_rows=10**6, validation_rows=10**6)


def synthetic_tokens(vocab_size: int) -> Tokenizer:
    return fetch_tokenizer(
        TokenizerConfig(tokenizer_name="synthetic", vocab_size=vocab_size), SYNTHETIC, Path()
    )


@pytest.fixture
def small_pieces(monkeypatch):
    """A part for every few documents, a file for every 20 rows, a window for every batch."""
    monkeypatch.setattr(slices, "SLICE_BYTES", 15_000)
    monkeypatch.setattr(readers, "_READ_ROWS", 5)
    monkeypatch.setattr(split_writer, "_SHARD_TOKENS", 20 * 33)
    monkeypatch.setattr(split_writer, "_WINDOW_DOCUMENTS", 4)
    monkeypatch.setattr(split_writer, "_WINDOW_TOKENS", (100, 5000))


@pytest.fixture(params=["best-fit", "concat"])
def built(request, small_pieces, text, tmp_path) -> ShardSet:
    """All of the sixty documents: more rows are asked for than there are."""
    return build_shards(ALL.replace(packing=request.param), *text[:2], tmp_path)


def lines(built: ShardSet) -> list[dict]:
    """The table of documents, with the number of the part each line is of."""
    tables = [parts.documents(path).to_pylist() for path in built.part_paths]
    return [line | {"part": part} for part, table in enumerate(tables) for line in table]


def rows_of(path: Path, split: str) -> np.ndarray:
    """All rows of a split of a part, read by plain pyarrow."""
    files = sorted(path.glob(f"{split}-*.arrow"))
    tables = [pa.ipc.open_file(pa.memory_map(str(file))).read_all() for file in files]
    return np.array([row for table in tables for row in table["tokens"].to_pylist()])


def documents_of(built: ShardSet) -> dict[str, list[int]]:
    """The ids of every document, put together from its pieces."""
    found: dict[str, list[int]] = {}
    rows = {
        (part, split): rows_of(path, split)
        for part, path in enumerate(built.part_paths)
        for split in SPLITS
    }
    for line in lines(built):
        ids = found.setdefault(line["id"], [])
        assert len(ids) == line["start"]
        row = rows[line["part"], line["split"]][line["row"]]
        ids += row[line["offset"] : line["offset"] + line["tokens"]].tolist()
    return found


def test_every_document_is_found_whole_through_the_table(built, text):
    loaded = text.tokenizer.load()
    found = documents_of(built)
    assert list(found) != [] and set(found) == {f"d{number}" for number in range(60)}
    for name, ids in found.items():
        document = text.texts[int(name[1:])]
        assert ids[-1] == text.tokenizer.end_of_text
        assert loaded.decode(ids[:-1], skip_special_tokens=False) == document
    for line in lines(built):
        assert line["bytes"] == len(text.texts[int(line["id"][1:])].encode())


def test_what_no_document_lies_in_is_padding_and_is_counted(built):
    for split in SPLITS:
        padding = 0
        for part, path in enumerate(built.part_paths):
            rows = rows_of(path, split)
            free = np.ones(rows.shape, dtype=bool) if len(rows) else np.empty((0, 33), bool)
            for line in lines(built):
                if (line["part"], line["split"]) == (part, split):
                    place = free[line["row"], line["offset"] : line["offset"] + line["tokens"]]
                    assert place.all(), "no two documents overlap"
                    place[:] = False
            assert (rows[free] == built.end_of_text).all() if len(rows) else True
            # which is all that a reader needs to tell it
            ends = rows == built.end_of_text
            if len(rows):
                assert np.array_equal(free[:, 1:], ends[:, 1:] & ends[:, :-1])
            padding += int(free.sum())
        counts = getattr(built, split)
        assert counts.padding_tokens == padding
        assert counts.rows * 33 == counts.document_tokens + padding


def test_no_validation_document_is_trained_on(built, text):
    held_out = {line["id"] for line in lines(built) if line["split"] == "validation"}
    trained = {line["id"] for line in lines(built) if line["split"] == "train"}
    assert len(held_out) + len(trained) == 60 and held_out and trained
    assert len(held_out) < 20
    assert (built.validation.documents, built.train.documents) == (len(held_out), len(trained))


def test_files_have_the_documented_schema_and_one_batch_each(built):
    assert built.parts > 3
    files = sorted(built.path.rglob("*.arrow"))
    for file in files:
        reader = pa.ipc.open_file(pa.memory_map(str(file)))
        assert reader.num_record_batches == 1
        [field] = reader.schema
        assert field.name == "tokens" and not field.nullable
        assert field.type == pa.list_(pa.field("item", pa.int32(), nullable=False), 33)
        batch = reader.get_batch(0)
        assert 0 < batch.num_rows <= 20
        # lies uncompressed in the file: reading a row allocates nothing
        assert batch.column(0).flatten().to_numpy(zero_copy_only=True).dtype == np.int32
    for field in pq.read_schema(built.part_paths[0] / "documents.parquet"):
        assert not field.nullable, field


def test_reader_finds_rows_in_any_file_and_order(built):
    for split in SPLITS:
        found = [rows_of(path, split) for path in built.part_paths]
        expected = np.concatenate([rows for rows in found if len(rows)])
        rows = Rows(built, split)
        assert (len(rows), rows.row_tokens) == expected.shape
        ids = np.random.default_rng(0).integers(len(rows), size=100)
        assert np.array_equal(rows[ids], expected[ids])
        ends = np.array([len(rows) - 1, 0])
        assert np.array_equal(rows[ends], expected[ends])


def test_best_fit_cuts_fewer_documents_than_concatenation(small_pieces, text, tmp_path):
    texts = [text[:90] for text in text.texts]
    short = jsonl_corpus(tmp_path / "short.jsonl", texts)
    cut = {
        name: build_shards(ALL.replace(packing=name), short, text.tokenizer, tmp_path).train
        for name in ("best-fit", "concat")
    }
    longer = sum(len(tokens) > 33 for tokens in _tokens(texts, text.tokenizer))
    assert cut["best-fit"].cut_documents <= longer < cut["concat"].cut_documents


def _tokens(texts, files):
    encoded = files.load_encoder().encode(texts)
    return np.split(np.arange(len(encoded.ids) + len(texts)), np.cumsum(encoded.lengths + 1)[:-1])


def test_longer_run_adds_parts_and_leaves_those_there_are(small_pieces, text, tmp_path):
    few = build_shards(SMALL, *text[:2], tmp_path)
    before = contents(few.path)
    assert few.train.rows >= 50 and few.parts < 5
    more = build_shards(SMALL.replace(train_rows=400), *text[:2], tmp_path)
    assert more.path == few.path and more.parts > few.parts and not more.reused
    kept = {name: data for name, data in before.items() if name.startswith("part-")}
    after = contents(few.path)
    assert kept.items() <= after.items()
    rows = Rows(few, "train")
    assert np.array_equal(rows[np.arange(50)], Rows(more, "train")[np.arange(50)])
    # the run that needs few reads few, whatever has come since
    again = build_shards(SMALL, *text[:2], tmp_path)
    assert again.reused and apart_from_reuse(again) == apart_from_reuse(few)
    lacking = f"parts 1 to {few.parts} have {few.train.rows} of 400 rows to train on, "
    assert more.why.startswith(
        f"{few.parts} parts reused and {more.parts - few.parts} built: {lacking}"
    )
    assert contents(few.path) == after


def test_runs_of_any_length_are_validated_on_the_same_rows(small_pieces, text, tmp_path):
    first = np.arange(4)
    for rows in (1, 100, 400):
        built = build_shards(SMALL.replace(train_rows=rows), *text[:2], tmp_path)
        held_out = Rows(built, "validation")[first]
        assert np.array_equal(held_out, Rows(built, "validation")[first])
        if rows == 1:
            expected = held_out
        assert np.array_equal(held_out, expected)


def test_result_does_not_depend_on_who_builds_the_parts_or_how_many_at_once(
    small_pieces, text, tmp_path
):
    alone = build_shards(ALL, *text[:2], tmp_path / "alone")

    def backwards(job):
        """Nothing is done before it is waited for, and then all that was started, last first."""
        started.append(job)

        def ending():
            while started:
                later = started.pop()
                ended[later.path] = parts.build_part(later)
            return ended[job.path]

        return ending

    started, ended = [], {}
    three = Builders(backwards, 3)
    together = build_shards(ALL, *text[:2], tmp_path / "together", builders=three)
    assert together == alone.replace(path=together.path)
    for mine, theirs in zip(together.part_paths, alone.part_paths, strict=True):
        assert contents(mine) == contents(theirs)


@pytest.mark.parametrize(
    ("token_type", "vocab_size"), [("int32", 70_000), ("uint16", 65_536), ("uint16", 300)]
)
def test_ids_up_to_the_highest_are_kept_in_either_type(token_type, vocab_size, tmp_path):
    config = SMALL.replace(token_type=token_type, packing="concat")
    built = build_shards(config, SYNTHETIC, synthetic_tokens(vocab_size), tmp_path, seed=3)
    rows = Rows(built, "train")[np.arange(50)]
    assert rows.dtype == np.dtype(token_type)
    assert rows.max() == vocab_size - 1
    block = synthetic.documents(vocab_size, 3, 0)
    trained = {line["id"] for line in lines(built) if line["split"] == "train"}
    tokens = [
        token
        for name, ids in zip(block.ids, block.tokens, strict=True)
        if name in trained
        for token in ids.tolist()
    ]
    assert rows.ravel().tolist() == tokens[: rows.size]
    assert built.entropy == synthetic.entropy_rate(vocab_size)
    assert built.validation_bytes_per_token is None


def test_vocabulary_that_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    config = SMALL.replace(token_type="uint16")
    with pytest.raises(ValueError, match=r"65537 tokens, more than uint16.*--token-type int32"):
        build_shards(config, SYNTHETIC, synthetic_tokens(65_537), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_id_outside_the_vocabulary_leaves_no_part(text, tmp_path):
    wrong = text.tokenizer.replace(vocab_size=300)
    with pytest.raises(ValueError, match=r"gave id \d+ for document d0.*its tokenizer\.json is"):
        build_shards(SMALL, text.corpus, wrong, tmp_path)
    assert not list((tmp_path / "shards").glob("*/part-*"))


@pytest.mark.parametrize("fraction", [0.001, 0.999])
@pytest.mark.parametrize("count", [2, 3])
def test_corpus_of_a_few_documents_is_held_out_from_as_well(text, tmp_path, count, fraction):
    few = jsonl_corpus(tmp_path / "few.jsonl", text.texts[:count])
    config = SMALL.replace(validation_fraction=fraction)
    built = build_shards(config, few, text.tokenizer, tmp_path / "cache")
    assert built.documents == count
    assert built.train.rows and built.validation.rows


@pytest.mark.parametrize("texts", [[], ["one document"]])
def test_corpus_that_cannot_be_held_out_from_is_refused(text, tmp_path, texts):
    few = jsonl_corpus(tmp_path / "few.jsonl", texts)
    with pytest.raises(ValueError, match="the corpus is too small"):
        build_shards(SMALL, few, text.tokenizer, tmp_path / "cache")


def test_share_that_is_held_out_does_not_grow_with_short_documents(text, tmp_path):
    short = jsonl_corpus(tmp_path / "short.jsonl", [f"hi {i}" for i in range(3000)])
    config = ALL.replace(seq_len=2048, validation_fraction=0.02)
    built = build_shards(config, short, text.tokenizer, tmp_path)
    # binomial: 60 of 3,000, with a deviation of 7.7
    assert 20 < built.validation.documents < 100


def test_no_more_is_built_ahead_than_the_run_is_likely_to_need(small_pieces, text, tmp_path):
    started, at_once = [], []

    def noting(job):
        started.append(job.path)
        ending = threads.start(job)

        def waited_for():
            at_once.append(len(started) - len(at_once))
            return ending()

        return waited_for

    one_part = ShardConfig(seq_len=32, train_rows=8, validation_rows=1, validation_fraction=0.1)
    with in_threads(3) as threads:
        many, few = Builders(noting, 99), Builders(noting, threads.at_once)
        build_shards(one_part, *text[:2], tmp_path / "one", builders=many)
        assert len(started) == 1
        started.clear()
        at_once.clear()
        built = build_shards(ALL, *text[:2], tmp_path / "all", builders=few)
    assert max(at_once) == 3 + 1 and len(started) == built.parts


def part_of_nothing(seconds: float) -> BuiltPart:
    """Told from others by its seconds."""
    facts = PartFacts(
        train={}, validation={}, empty_documents=0, duplicates=0, bad_lines=0, bad_places=()
    )
    return BuiltPart(facts=facts, seconds=seconds)


def test_so_many_threads_build_parts_and_end_with_the_work():
    together, threads = threading.Barrier(3), set()

    def build_part(job):
        threads.add(threading.current_thread())
        together.wait(timeout=60)
        return job

    jobs = list(map(part_of_nothing, range(9)))
    with in_threads(3, build_part) as builders:
        endings = [builders.start(job) for job in jobs]
        assert [ending() for ending in endings] == jobs
    assert len(threads) == 3
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()


def test_another_thread_follows_one_that_has_built_its_share(monkeypatch):
    """What the tokenizer's library remembers for a thread would grow with the corpus."""
    monkeypatch.setattr(builders_module, "_THREAD_PARTS", 2)
    threads, alone = [], threading.Semaphore(1)

    def build_part(job):
        assert alone.acquire(blocking=False), "one at a time"
        threads.append(threading.current_thread())
        alone.release()
        return job

    jobs = list(map(part_of_nothing, range(5)))
    with in_threads(1, build_part) as builders:
        endings = [builders.start(job) for job in jobs]
        assert [ending() for ending in endings] == jobs
    assert [thread is threads[0] for thread in threads] == [True, True, False, False, False]
    assert threads[3] is threads[2] is not threads[4]
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()


def test_parts_that_wait_are_not_begun_once_one_has_failed():
    """A hub that does not answer holds up each for minutes."""
    begun = []

    def build_part(job):
        begun.append(job)
        if job.seconds == 1:
            raise OSError("the hub is gone")
        return job

    jobs = list(map(part_of_nothing, range(4)))
    with in_threads(1, build_part) as builders:
        first, *others = [builders.start(job) for job in jobs]
        assert first() == jobs[0]
        failures = {ending() for ending in others}
    assert begun == jobs[:2] and str(*failures) == "the hub is gone"


def test_interrupt_does_not_wait_for_parts_that_are_being_built(text, tmp_path):
    """A hub that does not answer may hold up a part for minutes."""
    code = """
import os, signal, threading
from types import SimpleNamespace
from pathlib import Path
from zeroflow.data import builders

def stuck(job):
    if job.path == Path("first"):
        os.kill(os.getpid(), signal.SIGINT)  # to the process, as Ctrl-C is
    threading.Event().wait()

with builders.in_threads(2, stuck) as who:
    for name in ("other", "first"):
        ending = who.start(SimpleNamespace(path=Path(name)))
    ending()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.returncode == -signal.SIGINT, done.stderr


def test_interrupt_does_not_wait_for_a_disk_that_takes_nothing(text, tmp_path):
    code = """
import os, signal, sys, threading
from pathlib import Path
from zeroflow import artifacts
from zeroflow.data.build import build_shards
from zeroflow.data.corpus import CorpusConfig
from zeroflow.data.shards import ShardConfig
from zeroflow.data.tokenizer import Tokenizer

def stuck(file, content):
    os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait()

artifacts.write_recorded = stuck
config, text, tokenizer = sys.argv[1:]
build_shards(
    ShardConfig.model_validate_json(config),
    CorpusConfig.model_validate_json(text),
    Tokenizer.model_validate_json(tokenizer),
    Path(),
)
"""
    settings = [each.model_dump_json() for each in (SMALL, text.corpus, text.tokenizer)]
    done = subprocess.run(
        [sys.executable, "-c", code, *settings],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert done.returncode == -signal.SIGINT, done.stderr


def test_parts_that_wait_are_not_begun_once_they_are_given_up():
    begun, going_on, given_up = [], threading.Event(), threading.Event()

    def build_part(job):
        begun.append(job)
        going_on.set()
        given_up.wait(timeout=60)
        return job

    jobs = list(map(part_of_nothing, range(3)))
    with in_threads(1, build_part) as builders:
        first, *others = [builders.start(job) for job in jobs]
        going_on.wait(timeout=60)
        builders.give_up()
        given_up.set()
        assert first() == jobs[0] and begun == jobs[:1]
        assert all(isinstance(ending(), CancelledError) for ending in others)


def test_what_waits_is_given_up_at_the_end_and_at_an_error(small_pieces, text, tmp_path):
    told = []

    def show(share, line):
        raise RuntimeError("nobody looks")

    with in_threads(1) as threads:
        builders = Builders(threads.start, 2, lambda: told.append("given up"))
        build_shards(SMALL, *text[:2], tmp_path / "a", builders=builders)
        assert told == ["given up"]
        with pytest.raises(RuntimeError, match="nobody looks"):
            build_shards(SMALL, *text[:2], tmp_path / "b", builders=builders, show=show)
    assert told == ["given up"] * 2


def test_documents_that_are_left_out_leave_no_trace_in_the_table(text, tmp_path, monkeypatch):
    monkeypatch.setattr(split_writer, "_MOST_NAME_BYTES", 500)
    lines = [{"id": f"d{i}", "url": "u", "text": text} for i, text in enumerate(text.texts)]
    tables = []
    for left_out in ([], [lines[3] | {"url": "u" * 400}]):
        file = tmp_path / str(len(left_out)) / "a.jsonl"
        file.parent.mkdir()
        file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *left_out]))
        config = CorpusConfig(data_mode="files", data_path=(str(file),), deduplicate=True)
        built = build_shards(ALL, resolve_corpus(config).corpus, text.tokenizer, file.parent)
        assert built.duplicates == len(left_out)
        tables.append((built.part_paths[0] / DOCUMENTS).read_bytes())
    assert tables[0] == tables[1]


def test_part_that_was_built_ahead_and_is_not_needed_may_fail(
    small_pieces, text, tmp_path, monkeypatch
):
    monkeypatch.setattr(build, "_FEW_DOCUMENTS", 20)  # else all are looked at before
    file = tmp_path / "a.jsonl"
    jsonl_corpus(file, text.texts)
    file.write_text(file.read_text() + "\nno json")
    settled = resolve_corpus(CorpusConfig(data_mode="files", data_path=(str(file),))).corpus
    one = build_shards(SMALL, settled, text.tokenizer, tmp_path / "one")
    with in_threads(99) as builders:
        many = build_shards(SMALL, settled, text.tokenizer, tmp_path / "many", builders=builders)
    assert many == one.replace(path=many.path)
    with in_threads(99) as builders, pytest.raises(ValueError, match="is not JSON"):
        build_shards(ALL, settled, text.tokenizer, tmp_path / "many", builders=builders)


@pytest.mark.parametrize(
    "damage",
    [
        lambda plan: plan.replace('"held_out_below": 0.1', '"held_out_below": 0.9'),
        lambda plan: plan.replace('"next_file"', '"nextfile"'),
        lambda plan: plan[: len(plan) // 2],
        lambda plan: "",
        lambda plan: "null",
    ],
)
def test_damaged_plan_is_made_anew(small_pieces, text, tmp_path, damage):
    built = build_shards(SMALL, *text[:2], tmp_path)
    plan = built.path / PLAN
    before = plan.read_text()
    plan.write_text(damage(before))
    assert plan.read_text() != before
    again = build_shards(SMALL, *text[:2], tmp_path)
    assert again.reused and apart_from_reuse(again) == apart_from_reuse(built)
    assert plan.read_text() == before


def test_synthetic_data_has_no_duplicates_to_leave_out(tmp_path):
    settled = SYNTHETIC.replace(deduplicate=True)
    built = build_shards(SMALL, settled, synthetic_tokens(300), tmp_path)
    assert built.documents > 1000 and built.duplicates == 0


def test_document_that_spells_out_the_end_of_text_is_refused_where_it_cannot_be_told_apart(
    text, tmp_path
):
    from tokenizers import Tokenizer, models, trainers

    tokens = Tokenizer(models.Unigram())
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokens.train_from_iterator(text.texts, trainer)
    (tmp_path / "unigram").mkdir()
    tokens.save(str(tmp_path / "unigram" / "tokenizer.json"))
    config = TokenizerConfig(tokenizer_name=str(tmp_path / "unigram"))
    files = fetch_tokenizer(config, text.corpus, tmp_path)
    good = build_shards(SMALL, text.corpus, files, tmp_path)
    assert good.train.rows
    bad = jsonl_corpus(tmp_path / "bad.jsonl", [*text.texts[:3], "a </s> b"])
    with pytest.raises(ValueError, match="document d3 spells out the token that ends documents"):
        build_shards(SMALL, bad, files, tmp_path)


def test_duplicates_are_left_out_on_request_wherever_they_come_again(small_pieces, text, tmp_path):
    texts = [*text.texts[:20], *text.texts[:20], *text.texts[20:40], text.texts[25]]
    twice = jsonl_corpus(tmp_path / "twice.jsonl", texts)
    plain = build_shards(ALL, twice, text.tokenizer, tmp_path)
    assert (plain.documents, plain.duplicates) == (61, 0)
    alone = twice.replace(deduplicate=True)
    with in_threads(3) as builders:
        once = build_shards(ALL, alone, text.tokenizer, tmp_path, builders=builders)
    assert once.path != plain.path and once.parts > 3
    assert (once.documents, once.duplicates) == (40, 21)
    names = {f"d{i}" for i in (*range(20), *range(40, 60))}
    assert set(documents_of(once)) == names, "the first of its kind is kept"


def test_few_documents_that_come_again_and_again_are_held_out_from_as_well(text, tmp_path):
    texts = [text.texts[i % 3] for i in range(60)]
    same = jsonl_corpus(tmp_path / "same.jsonl", texts).replace(deduplicate=True)
    built = build_shards(ALL.replace(validation_fraction=0.02), same, text.tokenizer, tmp_path)
    assert (built.documents, built.duplicates) == (3, 57)
    assert built.train.documents and built.validation.documents


def test_table_is_the_same_however_many_lines_are_written_at_once(text, tmp_path, monkeypatch):
    whole = lines(build_shards(ALL, *text[:2], tmp_path / "whole"))
    monkeypatch.setattr(split_writer, "_MOST_NAME_BYTES", 100)  # as if names were 2**30 bytes long
    assert lines(build_shards(ALL, *text[:2], tmp_path / "cut")) == whole


def test_ids_and_urls_with_half_a_surrogate_pair_are_tabled_and_tell_documents_apart(
    small_pieces, text, tmp_path
):
    """As different ids they are held out apart, though the table shows them alike."""
    written = [
        {"id": f"\\ud8{i:02x}", "url": "u\\udfff", "text": t} for i, t in enumerate(text.texts)
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, written)).replace("\\\\", "\\"))
    settled = resolve_corpus(CorpusConfig(data_mode="files", data_path=(str(file),))).corpus
    built = build_shards(ALL, settled, text.tokenizer, tmp_path)
    assert {(line["id"], line["url"]) for line in lines(built)} == {("\ufffd", "u\ufffd")}
    assert built.documents == 60 and 0 < built.validation.documents < 20


def test_empty_documents_and_bad_lines_are_counted(text, tmp_path):
    good = [json.dumps({"text": document}) for document in text.texts[:9]]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join([*good, '{"text": ""}', "no json", '{"text": ""}']))
    settled = resolve_corpus(
        CorpusConfig(data_mode="files", data_path=(str(file),), bad_lines_limit=1)
    ).corpus
    built = build_shards(ALL, settled, text.tokenizer, tmp_path)
    assert (built.documents, built.empty_documents, built.bad_lines) == (9, 2, 1)
    with pytest.raises(ValueError, match=r"1 bad lines, --bad-lines-limit 0:\n  .*line 11 is not"):
        build_shards(ALL, settled.replace(bad_lines_limit=0), text.tokenizer, tmp_path)


def flip_a_bit(folder: Path) -> None:
    rng = random.Random(1)
    file = rng.choice(sorted(folder.glob("*.arrow")))
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def truncate(folder: Path) -> None:
    file = folder / "train-00000.arrow"
    file.write_bytes(file.read_bytes()[:-64])


DAMAGES = {
    "bit flip": flip_a_bit,
    "truncated": truncate,
    "missing": lambda folder: (folder / "train-00000.arrow").unlink(),
    "extra": lambda folder: (folder / "train-00099.arrow").write_bytes(b"x"),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "half a manifest": lambda folder: (folder / "manifest.json").write_text('{"files": {'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_part_is_set_aside_and_rebuilt_to_the_same_bytes(
    small_pieces, text, tmp_path, damage
):
    config = SMALL.replace(train_rows=400)
    built = build_shards(config, *text[:2], tmp_path)
    part = built.part_paths[1]
    before = contents(part)
    DAMAGES[damage](part)
    damaged = contents(part)
    assert damaged != before

    again = build_shards(config, *text[:2], tmp_path)
    assert not again.reused and apart_from_reuse(again) == apart_from_reuse(built)
    reused = built.parts - 1
    assert (
        again.why == f"{reused} parts reused and 1 built: part-00001 was damaged and is set aside"
    )
    assert contents(part) == before
    assert contents(part.with_name(part.name + ".damaged-1")) == damaged


def test_all_of_many_flipped_bits_are_noticed(small_pieces, text, tmp_path):
    part = build_shards(SMALL, *text[:2], tmp_path).part_paths[0]
    rng = random.Random(0)
    files = sorted(path for path in part.iterdir())
    for _ in range(100):
        file = rng.choice(files)
        content = file.read_bytes()
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(flipped)
        assert parts.existing(part) is None, file
        file.write_bytes(content)
    assert parts.existing(part) is not None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seq_len": 33}, "seq_len 32 instead of 33"),
        ({"validation_fraction": 0.5}, "validation_fraction 0.1 instead of 0.5"),
        ({"token_type": "uint16"}, "token_type int32 instead of uint16"),
        ({"packing": "concat"}, "packing best-fit instead of concat"),
    ],
)
def test_each_setting_that_changes_the_bytes_changes_the_name_and_is_told(
    text, tmp_path, change, told, caplog
):
    caplog.set_level("INFO", logger="zeroflow")
    first = build_shards(SMALL, *text[:2], tmp_path)
    assert first.why == "nothing of its kind was there"
    other = build_shards(SMALL.replace(**change), *text[:2], tmp_path)
    assert other.path != first.path and not other.reused
    assert other.why == f"{first.path.name} has {told}"
    assert f"shards have to be built: {first.path.name} has {told}" in caplog.messages


def test_file_of_the_corpus_that_changed_is_named(text, tmp_path):
    for name in ("a", "b"):
        settled = jsonl_corpus(tmp_path / "texts" / f"{name}.jsonl", text.texts[:9])
    settled = resolve_corpus(
        settled.replace(data_path=(f"{tmp_path}/texts/*",), data_revision=None)
    )
    first = build_shards(SMALL, settled.corpus, text.tokenizer, tmp_path)
    jsonl_corpus(tmp_path / "texts" / "b.jsonl", text.texts[:8])
    changed = resolve_corpus(settled.corpus.replace(data_revision=None))
    why = build_shards(SMALL, changed.corpus, text.tokenizer, tmp_path).why
    before, now = settled.corpus.data_revision, changed.corpus.data_revision
    assert f"{first.path.name} has revision {before} instead of {now}, file b.jsonl " in why
    assert "a.jsonl" not in why


def test_set_that_differs_in_fewer_fields_is_the_one_to_compare_with(text, tmp_path):
    far = SMALL.replace(packing="concat", token_type="uint16")
    near = build_shards(SMALL, *text[:2], tmp_path)
    build_shards(far, *text[:2], tmp_path)
    why = build_shards(SMALL.replace(seq_len=16), *text[:2], tmp_path).why
    assert f"the nearest of 2, {near.path.name}, has seq_len 32 instead of 16" in why


def test_set_of_another_format_or_without_a_record_is_told(text, tmp_path, monkeypatch):
    first = build_shards(SMALL, *text[:2], tmp_path)
    monkeypatch.setattr(build, "_FORMAT", 4)
    newer = build_shards(SMALL, *text[:2], tmp_path)
    assert newer.why == f"{first.path.name} has format 3 instead of 4"
    for built in (first, newer):
        (built.path / PLAN).unlink()
    why = build_shards(SMALL.replace(seq_len=16), *text[:2], tmp_path).why
    assert first.path.name in why and newer.path.name in why and "is unknown" in why


def test_set_that_was_begun_and_has_no_part_is_told(text, tmp_path):
    built = build_shards(SMALL, *text[:2], tmp_path)
    for part in built.part_paths:
        shutil.rmtree(part)
    why = build_shards(SMALL, *text[:2], tmp_path).why
    assert f"{built.path.name} was begun before, and its first part is not complete" in why


def test_seed_counts_for_synthetic_data_only(text, tmp_path):
    def path(settled, tokens, seed):
        return build_shards(SMALL, settled, tokens, tmp_path, seed=seed).path

    assert path(*text[:2], 0) == path(*text[:2], 1)
    tokens = synthetic_tokens(300)
    assert path(SYNTHETIC, tokens, 0) != path(SYNTHETIC, tokens, 1)


def test_reader_thread_ends_with_those_who_wait_for_it(text, tmp_path):
    def endless():
        while True:
            yield 1

    ahead = parts._ahead(endless())
    assert list(islice(ahead, 5)) == [1] * 5
    ahead.close()
    for _ in range(100):
        if not any(thread.name == "ahead" for thread in parts.threading.enumerate()):
            return
        time.sleep(0.05)
    pytest.fail("the thread goes on")


BUILD = """
import sys
from pathlib import Path
from zeroflow.data import slices
from zeroflow.data.build import build_shards
from zeroflow.data.corpus import CorpusConfig
from zeroflow.data.shards import ShardConfig
from zeroflow.data.tokenizer import Tokenizer

config, text, tokenizer, cache, slice_bytes = sys.argv[1:]
slices.SLICE_BYTES = int(slice_bytes)
print("ready", flush=True)
sys.stdin.readline()
built = build_shards(
    ShardConfig.model_validate_json(config),
    CorpusConfig.model_validate_json(text),
    Tokenizer.model_validate_json(tokenizer),
    Path(cache),
)
print(built.model_dump_json())
"""


def start_build(settings: list[str], cache: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", BUILD, *settings, str(cache), "15000"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes)


def test_two_processes_at_once_share_the_work_and_both_succeed(text, tmp_path, monkeypatch):
    settings = [part.model_dump_json() for part in (ALL, *text[:2])]
    processes = [start_build(settings, tmp_path / "both") for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    built = [ShardSet.model_validate_json(answer) for answer in answers]
    assert built[0].replace(reused=False) == built[1].replace(reused=False)

    monkeypatch.setattr(slices, "SLICE_BYTES", 15_000)
    alone = build_shards(ALL, *text[:2], tmp_path / "alone")
    assert digests(built[0]) == digests(alone)


@pytest.mark.slow
def test_build_killed_at_thirty_moments_ends_with_the_bytes_of_an_undisturbed_one(
    text, tmp_path, monkeypatch
):
    monkeypatch.setattr(slices, "SLICE_BYTES", 15_000)
    rng = random.Random(0)
    many = jsonl_corpus(tmp_path / "a.jsonl", [english(rng) for _ in range(1000)])
    undisturbed = build_shards(ALL, many, text.tokenizer, tmp_path / "undisturbed")
    assert undisturbed.parts > 60

    settings = [part.model_dump_json() for part in (ALL, many, text.tokenizer)]
    cache = tmp_path / "killed"

    def complete() -> int:
        return len(list(cache.glob("shards/*/part-*")))

    for _ in range(30):
        process = start_build(settings, cache)
        process.stdout.readline()
        before = complete()
        process.stdin.write("go\n")
        process.stdin.flush()
        while complete() < before + rng.randint(0, 2) and process.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.03)
        assert process.poll() is None, "killed while it builds"
        process.kill()
        process.communicate()
        assert complete() >= before, "no finished part is ever lost"
    built = build_shards(ALL, many, text.tokenizer, cache)
    assert digests(built) == digests(undisturbed)


def digests(built: ShardSet) -> list[dict[str, str]]:
    return [
        {name: hashlib.sha256(data).hexdigest() for name, data in contents(path).items()}
        for path in built.part_paths
    ]


def test_files_are_the_same_in_however_small_pieces_they_are_written(
    small_pieces, text, tmp_path, monkeypatch
):
    whole = build_shards(ALL, *text[:2], tmp_path / "whole")
    monkeypatch.setattr(artifacts, "_WRITE_BYTES", 1000)
    pieces = build_shards(ALL, *text[:2], tmp_path / "pieces")
    for mine, theirs in zip(pieces.part_paths, whole.part_paths, strict=True):
        assert contents(mine) == contents(theirs)


def test_arrow_takes_the_systems_memory_whatever_is_imported_first():
    code = "import sys; sys.path.insert(0, 'flows'); import pretrain, pyarrow as pa; "
    code += "sys.exit(pa.default_memory_pool().backend_name)"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=60
    )
    assert done.stderr.splitlines()[-1] == "system"


@pytest.mark.skipif(os.getuid() != 0, reason="a file system of a given size is made as root")
def test_full_disk_ends_the_build_in_one_message_and_keeps_what_is_complete(
    small_pieces, text, tmp_path
):
    disk = tmp_path / "disk"
    disk.mkdir()
    size = "size=400k"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", disk], check=False)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        many = jsonl_corpus(tmp_path / "a.jsonl", text.texts * 10)
        with pytest.raises(OSError, match=r"no space is left in .* the parts that are complete"):
            build_shards(ALL, many, text.tokenizer, disk)
        complete = list(disk.glob("shards/*/part-*"))
        assert complete and all(parts.existing(part) for part in complete)
        assert not list(disk.glob("shards/*/.*.partial"))
        subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
        built = build_shards(ALL, many, text.tokenizer, disk)
    finally:
        subprocess.run(["umount", disk], check=True)
    assert built.documents == 600
