"""Parts built by Dask workers: the same bytes, and the same failures."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from patience import HANG_SECONDS
from pipeline import free_port
from tiny import apart_from_reuse, contents

from zeroflow.data.build import build_shards, planned
from zeroflow.data.builders import in_threads
from zeroflow.data.corpus import CorpusConfig, resolve_corpus
from zeroflow.data.on_dask import on_dask
from zeroflow.data.shards import ShardConfig

ROWS = ShardConfig(seq_len=32, train_rows=10, validation_rows=1)


def test_dask_worker_builds_the_same_shards_as_a_thread_and_its_failures_arrive_unchanged(
    text, tmp_path
):
    alone = build_shards(ROWS, *text[:2], tmp_path / "alone")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\nno JSON\n')
    bad = CorpusConfig(data_mode="files", data_path=(str(tmp_path / "bad.jsonl"),))
    with on_dask(1, None) as build, in_threads(1, build) as builders:
        by_dask = build_shards(ROWS, *text[:2], tmp_path / "dask", builders=builders)
        assert all(map(ignores_ctrl_c, workers())), "they would print tracebacks"
        with pytest.raises(ValueError, match=r"bad\.jsonl, line 2"):
            corpus = resolve_corpus(bad).corpus
            build_shards(ROWS, corpus, text.tokenizer, tmp_path / "bad", builders=builders)
    assert apart_from_reuse(by_dask) == apart_from_reuse(alone).replace(path=by_dask.path)
    for mine, theirs in zip(by_dask.part_paths, alone.part_paths, strict=True):
        assert contents(mine) == contents(theirs)


def workers() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    found = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    assert found
    return found


def ignores_ctrl_c(process: psutil.Process) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    [mask] = re.findall(r"SigIgn:\t(\w+)", status)
    return bool(int(mask, 16) >> (signal.SIGINT - 1) & 1)


def test_no_worker_is_started_if_there_is_nothing_to_build(text, tmp_path):
    """The address is that of nobody."""
    build_shards(ROWS, *text[:2], tmp_path)
    address = f"tcp://127.0.0.1:{free_port()}"
    with on_dask(1, address) as build, in_threads(1, build) as builders:
        assert build_shards(ROWS, *text[:2], tmp_path, builders=builders).reused


def test_missing_scheduler_is_named(text, tmp_path, monkeypatch):
    import dask

    address = f"tcp://127.0.0.1:{free_port()}"
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "1s"}),
        on_dask(1, address) as build,
        in_threads(1, build) as builders,
        pytest.raises(ValueError, match=f"--dask-address {address}: no Dask scheduler answers"),
    ):
        build_shards(ROWS, *text[:2], tmp_path, builders=builders)


LEAVES = """
import os, sys, threading, time
from zeroflow.data.builders import in_threads
from zeroflow.data.on_dask import on_dask
from zeroflow.data.part_job import PartJob

if __name__ == "__main__":  # Dask's workers import this program again
    job = PartJob.model_validate_json(sys.argv[1])
    try:
        with on_dask(2, None) as build, in_threads(1, build) as builders:
            builders.start(job)
            time.sleep(0.5)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        os._exit(130)
"""


@pytest.mark.slow
def test_interrupt_while_workers_start_leaves_no_message(text, tmp_path):
    """Python warned of leaked semaphores, and Dask of workers without a scheduler."""
    planner = planned(ROWS, *text[:2], tmp_path, seed=0)
    program = tmp_path / "leaves.py"
    program.write_text(LEAVES)
    command = [sys.executable, str(program), planner.job(0).model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
