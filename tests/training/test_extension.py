"""Extension of a run to more steps: rows, learning rate and intervals, in this process."""

import gc
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from tiny import MODEL, Text, training_config, training_job

from zeroflow.data import slices
from zeroflow.data.build import build_shards
from zeroflow.data.order import Coverage, Segment
from zeroflow.data.shards import ShardConfig, ShardSet
from zeroflow.training import checkpoint, recovery
from zeroflow.training.__main__ import work
from zeroflow.training.extension import extended, extensions
from zeroflow.training.job import Cadence, TrainingJob, read_job
from zeroflow.training.recovery import LEDGER
from zeroflow.training.retention import Retention
from zeroflow.training.schedule import Schedule

SHORT, LONG = 8, 20


@pytest.fixture
def make(text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes the job of a run of so many steps, as a command does, on as much text as it needs."""
    monkeypatch.setattr(slices, "SLICE_BYTES", 6_000)

    def shards(steps: int) -> ShardSet:
        config = ShardConfig(
            seq_len=32, train_rows=4 * steps, validation_rows=1, validation_fraction=0.1
        )
        return build_shards(config, *text[:2], tmp_path)

    def job(steps: int, folder: str = "run", **batch: int) -> TrainingJob:
        model = MODEL.replace(vocab_size=text.tokenizer.vocab_size)
        split = {"micro_batch_rows": 4, "accumulate": 1} | batch
        training = training_config(model=model, **split)
        schedule = Schedule(name="cosine", peak=1e-3, warmup_steps=3, steps=steps)
        training = training.replace(schedule=schedule)
        made = training_job(tmp_path / folder, shards(steps), text.tokenizer, training)
        cadence = Cadence(log=1, validate_=100, checkpoint=4)
        return extended(made.replace(cadence=cadence, retention=Retention(keep=9)))

    return job


def train(job: TrainingJob, *, stop_after: int | None = None) -> None:
    calls = iter(range(1, 10**6))
    job.write(job.folder.job)  # as the flow does
    try:
        work(job, lambda: next(calls) == stop_after)
    finally:
        gc.enable()  # a training process runs without it


def rates(job: TrainingJob) -> list[float]:
    lines = map(json.loads, job.folder.metrics.read_text().splitlines())
    return [line["lr"] for line in lines if "lr" in line]


def test_extended_run_reads_what_it_has_not_read_and_warms_up_again(make, caplog):
    caplog.set_level(logging.INFO, logger="zeroflow")
    short = make(SHORT)
    train(short)
    longer = make(LONG)
    rows, more = short.shards.train.rows, longer.shards.train.rows
    assert longer.segments == (Segment(batch=0, rows=rows), Segment(batch=SHORT, rows=more))
    assert 4 * SHORT <= rows < more
    read = longer.order.rows(np.arange(LONG)).ravel()
    assert read[: 4 * SHORT].tolist() == short.order.rows(np.arange(SHORT)).ravel().tolist()
    assert len(set(read.tolist())) == 4 * LONG, "no row twice"
    assert longer.order.coverage(LONG) == Coverage(4 * LONG / more, 4 * LONG / more, 0)

    train(longer)
    trained = rates(longer)
    plain = Schedule(name="cosine", peak=1e-3, warmup_steps=3, steps=LONG)
    assert trained[:SHORT] == list(map(short.training.schedule.learning_rate, range(SHORT)))
    assert trained[SHORT + 2 :] == list(map(plain.learning_rate, range(SHORT + 2, LONG)))
    rises = np.diff(trained[SHORT - 1 : SHORT + 3])
    assert np.all(rises < 0.4 * plain.learning_rate(SHORT)), "no jump"
    [extension] = extensions(longer.training.schedule)
    assert (extension.step, extension.planned, extension.steps) == (SHORT, SHORT, LONG)
    assert (extension.last, extension.next) == (trained[SHORT - 1], trained[SHORT + 3])
    said = "\n".join(record.getMessage() for record in caplog.records)
    rise = f"rises within 3 steps from {extension.last:.3g} to {extension.next:.3g}"
    assert f"extended at step 8 from 8 to 20 steps: the learning rate {rise}" in said
    assert "stopped before its decay" in said
    assert f"{more:,} training rows instead of {rows:,}: rows that this epoch has not" in said
    again = make(LONG)
    assert (again.training, again.segments) == (longer.training, longer.segments)


def test_extended_run_ends_the_same_if_it_is_stopped_and_split_differently(make):
    train(make(SHORT))
    train(make(SHORT, "stopped"))
    train(make(LONG))
    train(make(LONG, "stopped"), stop_after=3)
    train(make(LONG, "stopped"))
    whole, stopped = make(LONG), make(LONG, "stopped")
    digests = [
        checkpoint.digests(job.folder.checkpoints / f"step-{LONG:08d}") for job in (whole, stopped)
    ]
    assert digests[0] == digests[1]
    other = make(LONG, "stopped", micro_batch_rows=1, accumulate=4)
    assert other.order.rows(np.arange(LONG)).tolist() == whole.order.rows(np.arange(LONG)).tolist()


def test_repeated_steps_before_an_extension_read_the_same_rows(make):
    """The newest checkpoint is damaged, so the extended run resumes from one before it."""
    train(make(SHORT))
    longer = make(LONG)
    longer.write(longer.folder.job)
    before = [checkpoint.digests(longer.folder.checkpoints / f"step-{SHORT:08d}"), rates(longer)]
    (longer.folder.checkpoints / f"step-{SHORT:08d}").rename(longer.run_dir / "damaged")
    again = make(LONG)
    assert (again.training, again.segments) == (longer.training, longer.segments)
    train(again, stop_after=SHORT - 4)
    after = [checkpoint.digests(longer.folder.checkpoints / f"step-{SHORT:08d}"), rates(longer)]
    assert after == before


def test_extension_after_an_extension_and_after_a_window_that_was_skipped(make):
    train(make(SHORT), stop_after=5)
    failure = recovery.TrainingFailed("it diverged", "diverged", 7)
    entry = recovery.remedy(make(SHORT), failure)
    assert entry is not None and (entry.skip.step, entry.skip.batches) == (5, 2)
    job = make(LONG)
    LEDGER.append(job.folder.ledger, entry)
    longer = make(LONG)
    assert [segment.batch for segment in longer.segments] == [0, 7], "after the window"
    longer.write(longer.folder.job)
    longest = make(2 * LONG)
    assert [segment.batch for segment in longest.segments] == [0, 7], "nothing was trained between"
    now = recovery.current(longest)
    read = now.order.rows(np.arange(15)).ravel().tolist()
    skipped = make(SHORT, "other").order.rows(np.arange(5, 7)).ravel().tolist()
    assert len(set(read)) == len(read) and not set(skipped) & set(read)
    first, second = extensions(longest.training.schedule)
    assert (first.step, first.planned, second.step, second.planned) == (5, SHORT, 5, LONG)


def test_run_without_a_checkpoint_begins_with_all_rows(make):
    short = make(SHORT)
    short.write(short.folder.job)
    longer = make(LONG)
    assert longer.segments == () and longer.training.schedule.before is None


def test_job_of_an_older_version_has_one_segment(make):
    short = make(SHORT)
    train(short)
    content = json.loads(short.folder.job.read_text())
    assert content.pop("segments") == [] and content["format"] == 3
    short.folder.job.write_text(json.dumps(content | {"format": 2}))
    assert read_job(short.folder).order.rows(np.arange(9)).tolist() == (
        short.order.rows(np.arange(9)).tolist()
    )
    assert make(LONG).segments[0] == Segment(batch=0, rows=short.shards.train.rows)
