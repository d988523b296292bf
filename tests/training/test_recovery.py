import os
import random
import time
from pathlib import Path

import corrupted
import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from tiny import MODEL, Text, jsonl_corpus, training_config, training_job

from zeroflow.data import provenance
from zeroflow.data.build import build_shards
from zeroflow.data.corpus import CorpusConfig
from zeroflow.data.order import Order, Segment, Skip
from zeroflow.data.rows import Rows
from zeroflow.data.shards import ShardConfig
from zeroflow.data.tokenizer import TokenizerConfig
from zeroflow.data.tokenizer_origins import fetch_tokenizer
from zeroflow.tracking.config import TrackingConfig, location
from zeroflow.tracking.store import run_ids
from zeroflow.training import batching, recovery, tracked
from zeroflow.training.events import EVENTS, Skipped, Started
from zeroflow.training.failures import TrainingFailed
from zeroflow.training.job import Cadence, TrainingJob, TrainResult
from zeroflow.training.metrics import METRICS, StepRecord
from zeroflow.training.recovery import LEDGER


@pytest.fixture
def job(tmp_path: Path) -> TrainingJob:
    synthetic = CorpusConfig(data_mode="synthetic")
    tokenizer = fetch_tokenizer(
        TokenizerConfig(tokenizer_name="synthetic", vocab_size=300), synthetic, tmp_path
    )
    shards = build_shards(
        ShardConfig(seq_len=12, train_rows=100, validation_rows=2), synthetic, tokenizer, tmp_path
    )
    config = training_config(micro_batch_rows=6, accumulate=2)
    return training_job(tmp_path / "run", shards, tokenizer, config)


def fail(job: TrainingJob, reason: str, step: int | None = None) -> recovery.Entry | None:
    """What is done about a failure, noted in the ledger."""
    entry = recovery.remedy(job, TrainingFailed("it failed", reason, step))
    if entry:
        LEDGER.append(job.folder.ledger, entry)
    return entry


def rows_of(job: TrainingJob, steps: range) -> list[list[int]]:
    now = recovery.current(job)
    batches = batching.batches(Rows(job.shards, "train"), now.training, now.order)
    return [batches.row_ids(step).ravel().tolist() for step in steps]


def checkpoint_at(job: TrainingJob, step: int) -> None:
    (job.folder.checkpoints / f"step-{step:08d}").mkdir(parents=True)


def test_out_of_memory_halves_micro_batches_then_recomputes_then_gives_up(job):
    before = rows_of(job, range(3))
    seen = []
    while fail(job, "out of memory"):
        now = recovery.current(job).training.workload
        seen.append((now.micro_batch_rows, now.accumulate, now.activation_checkpointing))
        assert rows_of(job, range(3)) == before, "the same rows in the same order"
    assert seen == [(3, 4, "none"), (1, 12, "none"), (1, 12, "full")]


def test_out_of_memory_with_one_row_and_selective_recomputation_recomputes_everything(job):
    workload = job.training.workload.split(1).replace(activation_checkpointing="selective")
    job = job.replace(training=job.training.replace(workload=workload))
    entry = fail(job, "out of memory")
    assert entry is not None and entry.activation_checkpointing
    assert entry.action.startswith("recomputes all activations")
    now = recovery.current(job).training.workload
    assert now.activation_checkpointing == "full"
    assert fail(job, "out of memory") is None


def test_killed_training_is_restarted_while_it_makes_progress(job):
    checkpoint_at(job, 10)
    assert [fail(job, "killed") is None for _ in range(3)] == [False, False, True]
    checkpoint_at(job, 20)
    entry = fail(job, "hang")
    assert entry is not None and entry.step == 20, "it has got somewhere"


def test_another_command_starts_a_new_count(job, monkeypatch):
    checkpoint_at(job, 10)
    assert fail(job, "killed") and fail(job, "killed")
    monkeypatch.setattr(recovery, "PROCESS", recovery.PROCESS + 1)
    assert fail(job, "killed"), "though its process may have the same id, as in a container"


def test_divergence_skips_the_data_since_the_checkpoint(job):
    plain = rows_of(job, range(40))
    checkpoint_at(job, 10)
    entry = fail(job, "diverged", step=14)
    assert entry is not None and entry.skip == Skip(step=10, batches=4)
    assert "skips batches 11 to 14 of the data, which steps 11 to 14 read; res" in entry.action
    assert rows_of(job, range(30)) == plain[:10] + plain[14:34]
    # The checkpoint is gone, and the run diverges again after an earlier one
    (job.folder.checkpoints / "step-00000010").rmdir()
    checkpoint_at(job, 6)
    assert fail(job, "diverged", step=9)
    assert rows_of(job, range(30)) == plain[:6] + plain[9:10] + plain[14:37]
    third = fail(job, "diverged", step=9)
    assert third is not None and third.action.startswith(
        "skips batches 10 to 16 of the data, which steps 7 to 9 read; "
    ), "two of them behind the first window"
    assert rows_of(job, range(30)) == plain[:6] + plain[16:40]
    assert fail(job, "diverged", step=15) is None, "three windows at most"


def test_wrong_settings_and_errors_in_the_code_are_never_retried(job):
    assert fail(job, "error") is None
    assert recovery.read(job.folder) == []


STEPS, SPIKE = 88, 73


@pytest.fixture
def noisy_job(job: TrainingJob, text: Text, tmp_path: Path) -> TrainingJob:
    """Words in any order, a row of noise in the batch of step `SPIKE`, and a real MLflow store."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(["the", "after", "war"], k=3000)) for _ in range(20)]
    texts.insert(10, "".join(rng.choices("#%&*+<=>@^~|{}[]", k=31)))
    corpus = jsonl_corpus(tmp_path / "noisy.jsonl", texts)
    config = ShardConfig(seq_len=32, train_rows=10**6, validation_rows=8, validation_fraction=0.05)
    shards = build_shards(config, corpus, text.tokenizer, tmp_path)
    everything = provenance.pieces(shards, text.tokenizer, np.arange(shards.train.rows))
    [noise] = [piece.row for piece in everything if piece.document == "d10"]
    whole = [Segment(batch=0, rows=shards.train.rows)]

    def batch_of_spike(seed: int) -> list[int]:
        order = Order(whole, batch_rows=4, seed=seed)
        return order.rows(np.array([SPIKE - 1])).ravel().tolist()

    seed = next(seed for seed in range(10**4) if noise in batch_of_spike(seed))
    uri, folder = location(tmp_path)
    model = MODEL.replace(vocab_size=text.tokenizer.vocab_size)
    of_workload = {"model": model, "seq_len": 32, "micro_batch_rows": 4}
    return job.replace(
        training=training_config(seed=seed, steps=STEPS, peak=3e-3, **of_workload),
        cadence=Cadence(log=1, validate_=STEPS, checkpoint=5),
        roll_back_spikes=True,
        shards=shards,
        tokenizer=text.tokenizer,
        prompt="The",
        tracking=TrackingConfig(
            uri=uri,
            folder=folder,
            run_name="run",
            tags={},
            params={"seed": str(seed)},
            dataset={"name": "noisy", "digest": "abc", "source": "noisy"},
        ),
    )


def train_with_retries(job: TrainingJob) -> TrainResult:
    """As the flow's task does."""
    while True:
        try:
            return recovery.train(job, lambda event: None)
        except TrainingFailed as failure:
            if not failure.will_retry:
                raise


@pytest.mark.slow
def test_diverged_training_rolls_back_skips_the_data_and_finishes(noisy_job, monkeypatch):
    """Once as noise in the data makes a spike, once as no number is finite any more.

    Meanwhile the clock is set to and fro by days.
    """
    launch = tracked.launch
    monkeypatch.setattr(
        tracked, "launch", lambda _, *rest, **more: launch("corrupted", *rest, **more)
    )
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "helpers"), prepend=os.pathsep)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", corrupted.jumping_time)
        assert train_with_retries(noisy_job).steps == STEPS

    spike, broken = recovery.read(noisy_job.folder)
    assert spike.reason == broken.reason == "diverged"
    assert f"step {SPIKE} has " in spike.message and "usually below" in spike.message
    assert spike.skip == Skip(step=70, batches=SPIKE - 70), "from the newest checkpoint on"
    found = EVENTS.read(noisy_job.folder.events)
    last = corrupted.AT_STEP + 5
    skipped = [event.step for event in found if isinstance(event, Skipped)]
    assert skipped == [*range(corrupted.AT_STEP, last + 1)], "six in a row"
    assert f"step {last} has loss nan" in broken.message
    assert broken.skip == Skip(step=75, batches=last - 75)
    assert [event.step for event in found if isinstance(event, Started)] == [0, 70, 75]

    logged = METRICS.read(noisy_job.folder.metrics)
    steps = [record for record in logged if isinstance(record, StepRecord)]
    times = [record.time for record in steps]
    assert max(times) - min(times) > 6 * 86_400 and times != sorted(times)
    assert [record.step for record in steps] == [*range(1, STEPS + 1)]
    assert max(record.loss for record in steps[60:]) < 1.8, "without the spike"

    # MLflow takes no point back: steps that were left keep what was seen of them first
    run_id = run_ids(noisy_job.folder).run_id
    client = MlflowClient(noisy_job.tracking.uri)
    history = {p.step: p.value for p in client.get_metric_history(run_id, "loss/train")}
    assert len(client.get_metric_history(run_id, "loss/train")) == len(history) == STEPS
    differ = {r.step for r in steps if history[r.step] != r.loss}
    assert differ == {71, 72, 73, 76, 77}
    assert history[SPIKE] > 2.0, "the spike"
    assert client.get_run(run_id).data.tags["recoveries"] == "2"
    assert "ledger.jsonl" in {file.path for file in client.list_artifacts(run_id)}
