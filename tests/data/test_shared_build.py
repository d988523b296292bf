import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shard_sets import ALL, SMALL, digests
from tiny import apart_from_reuse, files_corpus, jsonl_corpus

from zeroflow.data import build, claims, parts, shared_build, slices
from zeroflow.data.build import build_shards
from zeroflow.data.builders import Builders, in_threads
from zeroflow.data.shared_build import build_together

WORKER = """
import sys
from pathlib import Path
from zeroflow.data import build, claims, parts, shared_build, slices
from zeroflow.data.builders import in_threads
from zeroflow.data.corpus import CorpusConfig
from zeroflow.data.shards import ShardConfig
from zeroflow.data.tokenizer import Tokenizer

config, text, tokenizer, cache, hang = sys.argv[1:]
slices.SLICE_BYTES, claims.LEASE_SECONDS, claims.BEAT_SECONDS = 15_000, 1.0, 0.1
shared_build.POLL_SECONDS = 0.1
config = ShardConfig.model_validate_json(config)
planner = build.planned(
    config,
    CorpusConfig.model_validate_json(text),
    Tokenizer.model_validate_json(tokenizer),
    Path(cache),
    seed=0,
)

def build_part(job):
    if hang == "hang":
        job.path.with_name(f".{job.path.name}.{job.claim}.partial").mkdir()
        print(job.path.name, flush=True)
        sys.stdin.read()
    return parts.build_part(job)

print("ready", flush=True)
with in_threads(1, build_part) as builders:
    done = shared_build.build_together(planner, config, builders)
print(done.built, done.parts, flush=True)
"""


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(slices, "SLICE_BYTES", 15_000)
    monkeypatch.setattr(claims, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(shared_build, "POLL_SECONDS", 0.1)


def run_together(share: Callable[[], None], times: int) -> None:
    """Call `share` in several threads at once; an error in any of them is raised."""
    with ThreadPoolExecutor(times) as threads:
        for called in [threads.submit(share) for _ in range(times)]:
            called.result()


def planner_of(text, cache, config=ALL):
    return build.planned(config, *text[:2], cache, seed=0)


def worker(text, cache, *, hang: bool = False) -> "subprocess.Popen[str]":
    settings = [part.model_dump_json() for part in (ALL, *text[:2])]
    command = [sys.executable, "-c", WORKER, *settings, str(cache), "hang" if hang else ""]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes)


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGSTOP])
def test_processes_share_the_parts_and_take_over_those_of_one_that_dies_or_hangs(
    quick, text, tmp_path, ending
):
    """One process never finishes its first part; the others build the parts that it has claimed."""
    victim = worker(text, tmp_path / "shared", hang=True)
    assert victim.stdout.readline() == "ready\n"
    held = victim.stdout.readline().strip()
    victim.send_signal(ending)
    others = [worker(text, tmp_path / "shared") for _ in range(2)]
    answers = [process.communicate(timeout=120)[0].split() for process in others]
    victim.kill()
    victim.communicate()
    built = [int(answer[1]) for answer in answers]
    alone = build_shards(ALL, *text[:2], tmp_path / "alone")
    assert sum(built) == alone.parts == int(answers[0][2])
    shards = build_shards(ALL, *text[:2], tmp_path / "shared")
    assert shards.reused and shards.part(0).name == held
    assert apart_from_reuse(shards).replace(path=alone.path) == apart_from_reuse(alone)
    assert digests(shards) == digests(alone)
    left = {path.name for path in shards.path.iterdir() if not path.name.startswith("part-")}
    assert not {name for name in left if "partial" in name or "claim" in name}


def test_each_needed_part_is_built_once_and_no_other(quick, text, tmp_path):
    built: list[str] = []
    lock = threading.Lock()

    def noted(job):
        with lock:
            built.append(job.path.name)
        time.sleep(0.02)
        return parts.build_part(job)

    def share():
        with in_threads(2, noted) as builders:
            done.append(build_together(planner_of(text, tmp_path), ALL, builders))

    done = []
    run_together(share, 3)
    alone = build_shards(ALL, *text[:2], tmp_path / "alone")
    assert sorted(built) == [part.name for part in alone.part_paths]
    assert sum(each.built for each in done) == alone.parts == done[0].parts

    few = SMALL.replace(train_rows=8, validation_rows=1)
    one = build_shards(few, *text[:2], tmp_path / "one alone")
    with in_threads(1) as builders:
        assert build_together(planner_of(text, tmp_path / "few", few), few, builders).parts == (
            one.parts
        )


def test_the_same_duplicates_are_left_out_as_by_one_process(quick, text, tmp_path):
    corpus = jsonl_corpus(tmp_path / "twice.jsonl", text.texts * 2).replace(deduplicate=True)
    twice = text._replace(corpus=corpus)
    alone = build_shards(ALL, *twice[:2], tmp_path / "alone")

    def share():
        with in_threads(1) as builders:
            build_together(planner_of(twice, tmp_path / "shared"), ALL, builders)

    run_together(share, 2)
    shared = build_shards(ALL, *twice[:2], tmp_path / "shared")
    assert shared.reused and digests(shared) == digests(alone) and shared.duplicates


def test_failure_of_a_part_ends_the_process_and_releases_its_claim(quick, text, tmp_path):
    def failing(job):
        return lambda: ValueError("bad text")

    planner = planner_of(text, tmp_path)
    with pytest.raises(ValueError, match="bad text"):
        build_together(planner, ALL, Builders(failing, 2))
    assert not list(planner.path.glob(".*claim*"))


@pytest.mark.parametrize("rows", [0, 3])
def test_files_without_text_are_refused_also_if_the_tokenizer_exists(quick, text, tmp_path, rows):
    table = pa.table({"text": pa.array([None] * rows, pa.string())})
    pq.write_table(table, tmp_path / "empty.parquet")
    corpus = files_corpus(str(tmp_path / "empty.parquet"))
    planner = build.planned(ALL, corpus, text.tokenizer, tmp_path, seed=0)
    with (
        in_threads(1) as builders,
        pytest.raises(ValueError, match="of its 0 bytes of text, none is left"),
    ):
        build_together(planner, ALL, builders)
    with pytest.raises(ValueError, match="of its 0 bytes of text, none is left"):
        build_shards(ALL, corpus, text.tokenizer, tmp_path)


def test_parts_that_end_before_an_earlier_one_are_counted(quick, text, tmp_path):
    alone = build_shards(ALL, *text[:2], tmp_path / "alone")
    *_, before_last, last = (part.name for part in alone.part_paths)
    last_exists = threading.Event()

    def build_part(job):
        made = parts.build_part(job)
        if job.path.name == last:
            last_exists.set()
        elif job.path.name == before_last:
            last_exists.wait()
        return made

    with in_threads(2, build_part) as builders:
        done = build_together(planner_of(text, tmp_path / "cache"), ALL, builders)
    assert done.built == done.parts == alone.parts


def test_damaged_part_is_set_aside_and_built_again(quick, text, tmp_path):
    shards = build_shards(ALL, *text[:2], tmp_path)
    before = digests(shards)
    (shards.part(1) / "manifest.json").write_text("{")
    with in_threads(1) as builders:
        done = build_together(planner_of(text, tmp_path), ALL, builders)
    assert done.built == 1 and digests(shards) == before
    assert shards.part(1).with_name("part-00001.damaged-1").exists()
