import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hub import english
from shard_sets import ALL, SMALL, SYNTHETIC, digests, synthetic_tokenizer
from tiny import apart_from_reuse, contents, jsonl_corpus

from zeroflow.data import build, holdout, parts, slices
from zeroflow.data.build import build_shards
from zeroflow.data.builders import Builders, in_threads
from zeroflow.data.corpus import CorpusConfig, resolve_corpus
from zeroflow.data.part_plan import PLAN
from zeroflow.data.rows import Rows
from zeroflow.data.shards import ShardConfig, ShardSet


def test_longer_run_adds_parts_and_keeps_existing_ones(small_pieces, text, tmp_path):
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
    # the run that needs few parts reads few, even if others were built since
    again = build_shards(SMALL, *text[:2], tmp_path)
    assert again.reused and apart_from_reuse(again) == apart_from_reuse(few)
    lacking = f"{few.parts} existing part: {few.train.rows} of 400 rows to train on, "
    assert more.why.startswith(f"{few.parts} of {more.parts} parts reused: {lacking}")
    assert contents(few.path) == after


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


def test_vocabulary_that_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    config = SMALL.replace(token_type="uint16")
    with pytest.raises(ValueError, match=r"65537 tokens, more than uint16.*--token-type int32"):
        build_shards(config, SYNTHETIC, synthetic_tokenizer(65_537), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_parts_are_built_ahead_only_as_far_as_the_run_is_likely_to_need_them(
    small_pieces, text, tmp_path
):
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
        shards = build_shards(ALL, *text[:2], tmp_path / "all", builders=few)
    assert max(at_once) == 3 + 1 and len(started) == shards.parts


def test_queued_parts_are_cancelled_at_the_end_and_after_an_error(small_pieces, text, tmp_path):
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


def test_part_that_was_built_ahead_and_is_not_needed_may_fail(
    small_pieces, text, tmp_path, monkeypatch
):
    monkeypatch.setattr(holdout, "FEW_DOCUMENTS", 20)  # otherwise, all are read before
    monkeypatch.setattr(holdout, "_MEASURED_BYTES", 0)
    file = tmp_path / "a.jsonl"
    jsonl_corpus(file, text.texts)
    file.write_text(file.read_text() + "\nno json")
    corpus = resolve_corpus(CorpusConfig(data_mode="files", data_path=(str(file),))).corpus
    one = build_shards(SMALL, corpus, text.tokenizer, tmp_path / "one")
    with in_threads(99) as builders:
        many = build_shards(SMALL, corpus, text.tokenizer, tmp_path / "many", builders=builders)
    assert many == one.replace(path=many.path)
    with in_threads(99) as builders, pytest.raises(ValueError, match="is not JSON"):
        build_shards(ALL, corpus, text.tokenizer, tmp_path / "many", builders=builders)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seq_len": 33}, "--seq-len 32 instead of 33"),
        ({"validation_fraction": 0.5}, "--validation-fraction 0.1 instead of 0.5"),
        ({"token_type": "uint16"}, "--token-type int32 instead of uint16"),
        ({"packing": "concat"}, "--packing best-fit instead of concat"),
    ],
)
def test_each_setting_that_changes_the_bytes_changes_the_name_and_is_named_in_the_reason(
    text, tmp_path, change, told, caplog
):
    caplog.set_level("INFO", logger="zeroflow")
    first = build_shards(SMALL, *text[:2], tmp_path)
    assert first.why == "none exists yet"
    other = build_shards(SMALL.replace(**change), *text[:2], tmp_path)
    assert other.path != first.path and not other.reused
    assert other.why == f"{first.path.name} has {told}"
    assert f"building shards: {first.path.name} has {told}" in caplog.messages


def test_file_of_the_corpus_that_changed_is_named(text, tmp_path):
    for name in ("a", "b"):
        corpus = jsonl_corpus(tmp_path / "texts" / f"{name}.jsonl", text.texts[:9])
    corpus = resolve_corpus(corpus.replace(data_path=(f"{tmp_path}/texts/*",), data_revision=None))
    first = build_shards(SMALL, corpus.corpus, text.tokenizer, tmp_path)
    jsonl_corpus(tmp_path / "texts" / "b.jsonl", text.texts[:8])
    changed = resolve_corpus(corpus.corpus.replace(data_revision=None))
    why = build_shards(SMALL, changed.corpus, text.tokenizer, tmp_path).why
    before, now = corpus.corpus.data_revision, changed.corpus.data_revision
    assert f"{first.path.name} has revision {before} instead of {now}, file b.jsonl " in why
    assert "a.jsonl" not in why


def test_set_that_differs_in_fewer_fields_is_the_one_to_compare_with(text, tmp_path):
    far = SMALL.replace(packing="concat", token_type="uint16")
    near = build_shards(SMALL, *text[:2], tmp_path)
    build_shards(far, *text[:2], tmp_path)
    why = build_shards(SMALL.replace(seq_len=16), *text[:2], tmp_path).why
    assert f"the most similar of 2, {near.path.name}, has --seq-len 32 instead of 16" in why


def test_set_of_another_format_or_without_a_record_is_named_in_the_reason(
    text, tmp_path, monkeypatch
):
    first = build_shards(SMALL, *text[:2], tmp_path)
    monkeypatch.setattr(build, "FORMAT", 6)
    newer = build_shards(SMALL, *text[:2], tmp_path)
    assert newer.why == f"{first.path.name} has format 5 instead of 6"
    for shards in (first, newer):
        (shards.path / PLAN).unlink()
    why = build_shards(SMALL.replace(seq_len=16), *text[:2], tmp_path).why
    assert first.path.name in why and newer.path.name in why and "unknown: no record" in why


def test_set_without_a_complete_part_is_named_in_the_reason(text, tmp_path):
    shards = build_shards(SMALL, *text[:2], tmp_path)
    for part in shards.part_paths:
        shutil.rmtree(part)
    why = build_shards(SMALL, *text[:2], tmp_path).why
    assert f"an earlier build of {shards.path.name} stopped before its first part" in why


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
    shards = [ShardSet.model_validate_json(answer) for answer in answers]
    assert shards[0].replace(reused=False) == shards[1].replace(reused=False)

    monkeypatch.setattr(slices, "SLICE_BYTES", 15_000)
    alone = build_shards(ALL, *text[:2], tmp_path / "alone")
    assert digests(shards[0]) == digests(alone)


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
        process.kill()  # on a busy machine it may have ended before
        process.communicate()
        assert complete() >= before, "no finished part is ever lost"
    shards = build_shards(ALL, many, text.tokenizer, cache)
    assert digests(shards) == digests(undisturbed)


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
        with pytest.raises(OSError, match=r"no space is left in .* Complete parts are kept"):
            build_shards(ALL, many, text.tokenizer, disk)
        complete = list(disk.glob("shards/*/part-*"))
        assert complete and all(parts.existing_part(part) for part in complete)
        assert not list(disk.glob("shards/*/.*.partial"))
        subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
        shards = build_shards(ALL, many, text.tokenizer, disk)
    finally:
        subprocess.run(["umount", disk], check=True)
    assert shards.documents == 600
