"""The documents of a step, found from the directory of a run."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny import contents

from zeroflow.cli import commands
from zeroflow.data import slices
from zeroflow.data.build import build_shards
from zeroflow.data.order import Skip
from zeroflow.data.rows import Rows
from zeroflow.data.tokenizer_origins import fetch_tokenizer
from zeroflow.inference.trained import job as load_job
from zeroflow.model.build import build_model
from zeroflow.settings.job import training_job
from zeroflow.settings.run_config import RunConfig
from zeroflow.settings.settle import settle
from zeroflow.training import batching
from zeroflow.training.documents import documents_left_out, documents_of_step
from zeroflow.training.events import EVENTS, Started
from zeroflow.training.job import TrainingJob

TRAINING = {"seq_len": 32, "batch_size": 2, "grad_accum_steps": 2, "validation_tokens": 32}


def prepared(text, cache: Path, *, steps: int) -> TrainingJob:
    """A run that is about to be trained."""
    asked = RunConfig(
        run_name="mine",
        cache_dir=cache,
        device="cpu",
        data=text.corpus.model_dump(),
        tokenizer={"tokenizer_name": "train", "vocab_size": 400},
        training=TRAINING | {"max_steps": steps},
    )
    settled = settle(asked)
    run = settled.run
    tokenizer = fetch_tokenizer(run.tokenizer, run.data, cache)
    shards = build_shards(run.shard_config, run.data, tokenizer, cache)
    model = build_model(run.network(tokenizer.vocab_size), run.folder)
    job = training_job(settled, model, shards, tokenizer, tags={})
    job.write(job.folder.job)
    return job


def begin(job: TrainingJob, step: int) -> None:
    """Note that a process began to train at `step`."""
    started = Started(time=0.0, step=step, steps=job.training.steps, parts=job.shards.parts)
    EVENTS.append(job.folder.events, started)


def trained_on(job: TrainingJob, step: int) -> list[int]:
    """Rows whose tokens training reads for `step`, from 1."""
    batches = batching.batches(Rows(job.shards, "train"), job.training, job.order)
    ids = batches.row_ids(step - 1).flatten()
    inputs = [row for batch in batches.micro_batches(step - 1) for row in batch.inputs.tolist()]
    assert inputs == Rows(job.shards, "train")[ids][:, :-1].tolist()
    return ids.tolist()


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(slices, "SLICE_BYTES", 15_000)


def test_documents_of_a_step_are_those_of_its_batch(text, tmp_path, small_parts):
    job = prepared(text, tmp_path, steps=6)
    begin(job, 0)
    for step in (1, 2, 6):
        pieces = documents_of_step(load_job(tmp_path, "mine"), step)
        assert list(dict.fromkeys(piece.row for piece in pieces)) == trained_on(job, step)


def test_command_prints_one_line_per_piece(text, tmp_path, capsys, console):
    prepared(text, tmp_path, steps=6)
    of_run = ["documents", "--run=mine", f"--cache-dir={tmp_path}", "--step=2"]
    capsys.readouterr()
    assert commands.main(of_run) == 0
    pieces, table = (
        documents_of_step(load_job(tmp_path, "mine"), 2),
        capsys.readouterr().out.splitlines(),
    )
    assert table[0].split() == list(pieces[0]._fields)
    assert len(table) == 1 + len(pieces)
    assert table[1].split()[:4] == [*map(str, pieces[0][:3]), pieces[0].document]
    assert commands.main([*of_run, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [piece._asdict() | {"left_out": False} for piece in pieces]


def test_skipped_windows_are_listed_separately(text, tmp_path, capsys, console):
    job = prepared(text, tmp_path, steps=6)
    unskipped = [trained_on(job, step) for step in range(1, 7)]
    job = job.replace(skips=(Skip(step=2, batches=2),))
    job.write(job.folder.job)
    for step, read_at in ((2, 2), (3, 5), (4, 6)):
        rows = [piece.row for piece in documents_of_step(load_job(tmp_path, "mine"), step)]
        assert list(dict.fromkeys(rows)) == trained_on(job, step) == unskipped[read_at - 1]
        gone = [piece.row for piece in documents_left_out(load_job(tmp_path, "mine"), step)]
        assert list(dict.fromkeys(gone)) == (unskipped[step - 1] if step in (3, 4) else [])
    of_run = ["documents", "--run=mine", f"--cache-dir={tmp_path}", "--step=3"]
    capsys.readouterr()
    assert commands.main(of_run) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "before a roll-back, which skipped them:" and "since then:" in table
    assert commands.main([*of_run, "--json"]) == 0
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for mark, at in ((True, 3), (False, 5)):
        rows = [item["row"] for item in objects if item["left_out"] is mark]
        assert list(dict.fromkeys(rows)) == unskipped[at - 1]


@pytest.mark.parametrize("step", [0, 7, -1])
def test_step_that_a_run_does_not_have_is_refused(text, tmp_path, step):
    prepared(text, tmp_path, steps=6)
    with pytest.raises(ValueError, match=f"no step {step}: its steps are 1 to 6"):
        documents_of_step(load_job(tmp_path, "mine"), step)


@pytest.mark.parametrize("recorded", [True, False])
def test_steps_before_an_extension_have_the_rows_of_that_time(
    text, tmp_path, small_parts, recorded
):
    """Older versions recorded no segments, and permuted all rows anew from then on."""
    short = prepared(text, tmp_path, steps=6)
    begin(short, 0)
    (short.folder.checkpoints / "step-00000004").mkdir(parents=True)
    longer = prepared(text, tmp_path, steps=100)
    begin(longer, 4)
    assert longer.shards.parts > short.shards.parts
    assert [segment.batch for segment in longer.segments] == [0, 4]
    if not recorded:
        longer = longer.replace(segments=())
        longer.write(longer.folder.job)
    for step, job in ((4, short), (5, longer), (100, longer)):
        rows = [piece.row for piece in documents_of_step(load_job(tmp_path, "mine"), step)]
        assert list(dict.fromkeys(rows)) == trained_on(job, step)
    assert recorded == (trained_on(short, 4) == trained_on(longer, 4))


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    if subprocess.run(["mount", "--bind", folder, folder], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.skipif(os.getuid() != 0, reason="a file system is made read-only as root")
def test_read_only_cache_is_read_from_and_refused_for_a_run(console, text, tmp_path, capsys):
    cache = tmp_path / "cache"
    begin(prepared(text, cache, steps=4), 0)

    before = contents(cache)
    with read_only(cache):
        assert commands.main(["documents", "--run=mine", "--step=1", f"--cache-dir={cache}"]) == 0
        assert "tokens  words" in capsys.readouterr().out
        assert commands.main(["prove-resume", f"--cache-dir={cache}"]) == 1
        error = capsys.readouterr().err
    assert f"error: cannot write to {cache} (Read-only file system)" in error
    assert "name another --cache-dir" in error
    assert contents(cache) == before
