"""A rank from its newest checkpoint to its end, in this process; see also `flows`."""

import gc
import json
import logging
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import MODEL, synthetic_rows, training_config, training_job

from zeroflow import artifacts
from zeroflow.data.batches import Batches, MicroBatch
from zeroflow.data.order import Skip
from zeroflow.training import checkpoint, chunked_files, session
from zeroflow.training.__main__ import work
from zeroflow.training.failures import Diverged
from zeroflow.training.health import Monitor, Reading
from zeroflow.training.job import Cadence, TrainingJob, finished
from zeroflow.training.retention import Retention
from zeroflow.training.saver import Saver
from zeroflow.training.stopping import Stop
from zeroflow.training.validation import ValidationLoss

STEPS = 12
NO_NATS = np.empty(0)

IS_WRITING = Saver._is_writing


@pytest.fixture(scope="module", autouse=True)
def fast_disk() -> Iterator[None]:
    """Every write ends before the next checkpoint is due; such short steps could be faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saver, "_is_writing", lambda saver: False)
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> TrainingJob:
    """Trained: twelve steps on synthetic rows, logged every 2, validated every 6, saved every 4."""
    folder = tmp_path_factory.mktemp("session")
    shards, tokenizer = synthetic_rows(folder)
    model = MODEL.replace(vocab_size=tokenizer.vocab_size)
    training = training_config(steps=STEPS, peak=1e-3, model=model)
    made = training_job(folder / "undisturbed", shards, tokenizer, training)
    made = made.replace(
        cadence=Cadence(log=2, validate_=6, checkpoint=4), retention=Retention(keep=9)
    )
    train(made)
    return made


@pytest.fixture
def job(undisturbed: TrainingJob, tmp_path: Path) -> TrainingJob:
    """The same, to be trained."""
    return undisturbed.replace(run_dir=tmp_path)


def train(job: TrainingJob, stop: Stop = lambda: False) -> None:
    try:
        work(job, stop)
    finally:
        gc.enable()  # a training process runs without it


def after(calls: int) -> Stop:
    """Asks to stop at the end of that step."""
    asked = iter(range(1, 10**6))
    return lambda: next(asked) >= calls


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def events(job: TrainingJob, name: str) -> list[dict[str, Any]]:
    return [line for line in read(job.folder.events) if line["event"] == name]


def trained_lines(job: TrainingJob) -> list[dict[str, Any]]:
    """What was logged of the steps, but for what a clock or another process makes different."""
    kept = ("step", "tokens", "flops", "loss", "lr", "grad_norm", "update_ratio", "first_epoch")
    return [
        {name: line[name] for name in kept} for line in read(job.folder.metrics) if "lr" in line
    ]


def saved(job: TrainingJob) -> list[int]:
    return sorted(checkpoint.step_of(path) for path in job.folder.checkpoints.glob("step-*"))


def test_training_logs_validates_and_saves_at_its_intervals(undisturbed):
    job = undisturbed
    lines = read(job.folder.metrics)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 4, 6, 8, 10, 12]
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 6, 12]
    # at step 6 with the lowest validation loss until then
    assert saved(job) == [4, 6, 8, 12] == [event["step"] for event in events(job, "saved")]
    assert [event["steps"] for event in events(job, "started")] == [STEPS]
    assert read(job.folder.events)[-1]["event"] == "done"
    assert job.folder.alive.exists()

    result = finished(job)
    assert result is not None and result.steps == STEPS
    assert result.tokens == STEPS * 2 * 32
    assert result.train_loss == lines[-2]["loss"] and result.val_loss == lines[-1]["val_loss"]
    assert result.first_val_loss == lines[0]["val_loss"]
    assert result.first_val_loss == pytest.approx(math.log(300), abs=0.1), "of fresh weights"
    assert checkpoint.step_of(result.checkpoint) == STEPS


def test_validation_loss_is_kept_with_the_checkpoint_of_its_step_alone(undisturbed):
    job = undisturbed
    *_, of_step_6, of_last = (
        line["val_loss"] for line in read(job.folder.metrics) if "val_loss" in line
    )
    manifests = {
        step: artifacts.read_json(job.folder.checkpoints / f"step-{step:08d}" / "manifest.json")
        for step in saved(job)
    }
    assert {step: found["val_loss"] for step, found in manifests.items()} == {
        4: None,
        6: of_step_6,
        8: None,
        12: of_last,
    }


def test_stopped_and_resumed_training_logs_and_ends_like_uninterrupted_training(job, undisturbed):
    train(job, after(5))
    assert saved(job) == [4, 5], "the step that it was stopped in"
    [stopped] = events(job, "stopped")
    assert "step 5" in stopped["message"] and not job.folder.training.exists()
    train(job)
    assert [event["step"] for event in events(job, "started")] == [0, 5]
    assert trained_lines(job) == trained_lines(undisturbed)
    newest = [one.folder.checkpoints / f"step-{STEPS:08d}" for one in (job, undisturbed)]
    assert checkpoint.digests(newest[0]) == checkpoint.digests(newest[1])


def test_steps_after_the_newest_checkpoint_are_logged_again_but_only_once(job):
    train(job, after(6))
    newest = job.folder.checkpoints / "step-00000006"
    newest.rename(newest.with_name("moved-away"))
    train(job)
    steps = [line["step"] for line in read(job.folder.metrics)]
    assert steps == [0, 1, 2, 4, 6, 6, 8, 10, 12, 12]
    assert [event["step"] for event in events(job, "started")] == [0, 4]


def test_state_with_the_lowest_validation_loss_is_saved_and_stays(job, monkeypatch):
    losses = iter([2.0, 3.0, 3.5, 4.0])  # at steps 0, 5, 10 and the last
    monkeypatch.setattr(
        session, "validation_loss", lambda *inputs: ValidationLoss(next(losses), None, NO_NATS)
    )
    every_5 = job.replace(
        cadence=Cadence(log=2, validate_=5, checkpoint=4), retention=Retention(keep=1)
    )
    train(every_5, after(6))
    assert saved(job) == [5, 6]
    train(every_5)
    assert saved(job) == [5, STEPS], "not step 10, whose loss is not the lowest, nor untrained ones"


def test_checkpoints_due_during_a_write_are_skipped_and_the_last_step_is_saved(
    job, monkeypatch, caplog
):
    written, write = threading.Event(), chunked_files.write

    def late(folder, contents):
        assert written.wait(30)
        return write(folder, contents)

    def release_at_step_9() -> bool:
        if next(steps) == 9:
            written.set()
        return False

    steps = iter(range(1, 100))
    monkeypatch.setattr(Saver, "_is_writing", IS_WRITING)
    monkeypatch.setattr(chunked_files, "write", late)
    cadence = Cadence(log=2, validate_=12, checkpoint=2)
    train(job.replace(cadence=cadence), release_at_step_9)
    skipped = [event["step"] for event in events(job, "checkpoint-skipped")]
    assert {2, STEPS} <= set(saved(job)) and skipped[:3] == [4, 6, 8]
    assert sorted(saved(job) + skipped) == [2, 4, 6, 8, 10, 12]
    assert "step 8: checkpoint skipped, because the one before is still being" in caplog.text
    assert finished(job) is not None
    assert all(event["seconds"] > 0 for event in events(job, "saved"))


def test_promised_checkpoints_wait_for_a_slow_disk(job, monkeypatch):
    monkeypatch.setattr(Saver, "_is_writing", lambda saver: True)
    losses = iter([2.0, 3.0, 3.5, 4.0])  # at steps 0, 5, 10 and the last
    monkeypatch.setattr(
        session, "validation_loss", lambda *inputs: ValidationLoss(next(losses), None, NO_NATS)
    )
    cadence = Cadence(log=2, validate_=5, checkpoint=1)
    retention = Retention(keep=9, keep_every=4)
    slow = job.replace(cadence=cadence, retention=retention)
    train(slow, after(7))
    assert saved(job) == [4, 5, 7], "a multiple of keep_every, the best one, that of the stop"
    train(slow)
    assert saved(job) == [4, 5, 7, 8, STEPS]
    assert [event["step"] for event in events(job, "checkpoint-skipped")] == [1, 2, 3, 6, 9, 10, 11]


def broken_from(step: int, monkeypatch: pytest.MonkeyPatch, *, to: int = STEPS) -> None:
    """Losses are not finite in those steps, as the batches claim to hold no target."""
    micro_batches = Batches.micro_batches

    def broken(batches: Batches, number: int) -> list[MicroBatch]:
        found = micro_batches(batches, number)
        is_broken = step - 1 <= number < to
        return [batch._replace(valid=0) for batch in found] if is_broken else found

    monkeypatch.setattr(Batches, "micro_batches", broken)


def test_six_consecutive_non_finite_updates_end_training_at_a_logged_step(job, monkeypatch, caplog):
    broken_from(3, monkeypatch)
    with pytest.raises(Diverged, match=r"step 8 has loss (nan|inf)") as failure:
        train(job.replace(cadence=job.cadence.replace(log=1)))
    assert failure.value.step == 8
    assert [event["step"] for event in events(job, "skipped")] == [3, 4, 5, 6, 7, 8]
    assert [line["step"] for line in trained_lines(job)] == [1, 2]
    assert saved(job) == [], "no state whose update was skipped"
    assert sum("no update" in r.getMessage() for r in caplog.records) == 6


@pytest.mark.parametrize(("log", "checkpoint", "found"), [(10, 12, 10), (12, 9, 9)])
def test_six_skipped_updates_between_logged_steps_end_training_at_the_next_look(
    job, monkeypatch, log, checkpoint, found
):
    broken_from(3, monkeypatch, to=8)
    cadence = Cadence(log=log, validate_=12, checkpoint=checkpoint)
    with pytest.raises(Diverged, match=rf"step {found} has loss \d.*gradient: 6") as failure:
        train(job.replace(cadence=cadence))
    assert failure.value.step == found and saved(job) == []


def test_five_consecutive_skipped_updates_are_tolerated_and_more_if_not_consecutive(
    job, monkeypatch
):
    micro_batches = Batches.micro_batches

    def broken(batches: Batches, number: int) -> list[MicroBatch]:
        found = micro_batches(batches, number)
        is_broken = number + 1 in (2, 3, 4, 5, 6, 8, 9)
        return [batch._replace(valid=0) for batch in found] if is_broken else found

    monkeypatch.setattr(Batches, "micro_batches", broken)
    train(job)
    assert finished(job) is not None
    assert read(job.folder.metrics)[-2]["skipped_updates"] == 7


def test_non_finite_update_in_the_last_step_does_not_finish_the_run(job, monkeypatch):
    broken_from(STEPS, monkeypatch)
    with pytest.raises(Diverged, match=rf"step {STEPS} has loss (nan|inf)"):
        train(job)
    assert finished(job) is None


def test_stop_during_skipped_updates_names_the_newest_checkpoint(job, monkeypatch, caplog):
    caplog.set_level(logging.WARNING, logger="zeroflow")
    broken_from(6, monkeypatch)
    train(job, after(7))
    [stopped] = events(job, "stopped")
    assert "stopped at step 7 without saving it" in stopped["message"]
    assert "step 4" in stopped["message"]


def test_windows_that_are_left_out_are_not_trained_on(job, undisturbed):
    train(job.replace(skips=(Skip(step=4, batches=3),)))
    differ = [
        mine["step"]
        for mine, theirs in zip(trained_lines(job), trained_lines(undisturbed), strict=True)
        if mine["loss"] != theirs["loss"]
    ]
    assert differ == [6, 8, 10, 12]


def test_mfu_is_the_share_of_the_peak_that_is_known(job, undisturbed):
    assert not any("mfu" in line for line in read(undisturbed.folder.metrics))
    train(job.replace(peak_flops=1e12), after(4))
    lines = [line for line in read(job.folder.metrics) if line.get("tokens_per_second")]
    assert [line["step"] for line in lines] == [2, 4], "the first step says nothing"
    for line in lines:
        flops = line["tokens_per_second"] * job.training.workload.flops_per_token
        assert line["mfu"] == pytest.approx(flops / 1e12)


@pytest.mark.parametrize("goes_back", [False, True])
def test_spike_is_a_warning_with_the_command_for_its_documents_or_ends_training(
    job, undisturbed, goes_back, monkeypatch, caplog
):
    step, worst = 6, trained_lines(undisturbed)[3]["update_ratio"]

    def alarms(monitor: Monitor, reading: Reading) -> list[str]:
        return [f"loss {reading.loss:.4f} is unusual"] if reading.update_ratio == worst else []

    monkeypatch.setattr(Monitor, "alarms", alarms)
    if goes_back:
        with pytest.raises(Diverged, match=f"step {step} has .* is unusual"):
            train(job.replace(roll_back_spikes=True))
    else:
        train(job, after(7))
    [spike] = events(job, "spike")
    assert spike["step"] == step and "is unusual" in spike["alarms"][0]
    shown = f"zeroflow documents --run {job.run_dir.name} --step {step} "
    assert any(shown in record.getMessage() for record in caplog.records)
