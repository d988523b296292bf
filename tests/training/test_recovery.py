from pathlib import Path

import pytest
from tiny import MODEL, training_config

from zeroflow.data.batches import Batches, Skip
from zeroflow.data.corpus import CorpusConfig
from zeroflow.data.shards import Rows, ShardConfig, build
from zeroflow.data.tokenizer import TokenizerConfig, fetch
from zeroflow.generate import SamplingConfig
from zeroflow.tracking import TrackingConfig
from zeroflow.training import events, recovery
from zeroflow.training.checkpoint import Retention
from zeroflow.training.job import Cadence, TrainingFailed, TrainingJob


@pytest.fixture
def job(tmp_path: Path) -> TrainingJob:
    synthetic = CorpusConfig(data_mode="synthetic")
    tokens = fetch(TokenizerConfig(tokenizer_name="synthetic", vocab_size=300), synthetic, tmp_path)
    rows = build(
        ShardConfig(seq_len=12, train_rows=100, validation_rows=2), synthetic, tokens, tmp_path
    )
    (tmp_path / "run").mkdir()
    return TrainingJob(
        run_dir=tmp_path / "run",
        model=MODEL,
        training=training_config(micro_batch_rows=6, accumulate=2),
        cadence=Cadence(log=1, validate_=10, checkpoint=10),
        retention=Retention(keep=1),
        hang_seconds=60,
        roll_back_spikes=False,
        shards=rows,
        validation_rows=2,
        tokenizer=tokens,
        prompt="",
        sampling=SamplingConfig(),
        tracking=TrackingConfig(
            uri="", folder=None, run_name="run", tags={}, params={}, dataset={}
        ),
        peak_flops=None,
    )


def fail(job: TrainingJob, reason: str, step: int | None = None) -> recovery.Entry | None:
    """What is done about a failure, noted in the ledger."""
    ledger = recovery.read(job.run_dir)
    now = recovery.applied(job, ledger)
    entry = recovery.remedy(now, TrainingFailed("it failed", reason, step), ledger)
    if entry:
        events.append(job.run_dir / recovery.LEDGER, entry.model_dump(mode="json"))
    return entry


def rows_of(job: TrainingJob, steps: range) -> list[list[int]]:
    now = recovery.applied(job, recovery.read(job.run_dir))
    batches = Batches(
        Rows(job.shards, "train"),
        end_of_text=0,
        seed=0,
        micro_batch_rows=now.training.micro_batch_rows,
        accumulate=now.training.accumulate,
        skips=now.skips,
    )
    return [batches.row_ids(step).ravel().tolist() for step in steps]


def checkpoint_at(job: TrainingJob, step: int) -> None:
    (job.checkpoints / f"step-{step:08d}").mkdir(parents=True)


def test_out_of_memory_halves_micro_batches_then_computes_again_then_gives_up(job):
    before = rows_of(job, range(3))
    seen = []
    while fail(job, "out of memory"):
        now = recovery.applied(job, recovery.read(job.run_dir)).training
        seen.append((now.micro_batch_rows, now.accumulate, now.compute.activation_checkpointing))
        assert rows_of(job, range(3)) == before, "the same rows in the same order"
    assert seen == [(3, 4, "none"), (1, 12, "none"), (1, 12, "full")]


def test_killed_training_goes_on_until_it_gets_nowhere(job):
    checkpoint_at(job, 10)
    assert [fail(job, "killed") is None for _ in range(3)] == [False, False, True]
    checkpoint_at(job, 20)
    entry = fail(job, "hang")
    assert entry is not None and entry.step == 20, "it has got somewhere"


def test_divergence_leaves_out_the_data_since_the_checkpoint(job):
    plain = rows_of(job, range(40))
    checkpoint_at(job, 10)
    entry = fail(job, "diverged", step=14)
    assert entry is not None and entry.skip == Skip(step=10, batches=4)
    assert "leaves out the data of steps 11 to 14; goes on from step 10" in entry.action
    assert rows_of(job, range(30)) == plain[:10] + plain[14:34]
    ends = [fail(job, "diverged", step=15) is None for _ in range(3)]
    assert ends == [False, False, True], "three windows at most"


def test_wrong_settings_and_errors_of_the_code_are_never_tried_again(job):
    assert fail(job, "error") is None
    assert recovery.read(job.run_dir) == []
