"""Jobs for the pre-flight checks, and assertions on failed checks."""

from pathlib import Path

from tiny import SHAPE, training_config, training_job

from zeroflow.checks.check import Check
from zeroflow.data.shards import ShardConfig, ShardSet
from zeroflow.data.tokenizer import Tokenizer
from zeroflow.model.sizes import with_vocabulary
from zeroflow.training.job import TrainingJob

SHARDS = ShardConfig(seq_len=32, train_rows=40, validation_rows=2, validation_fraction=0.1)


def checked_job(folder: Path, shards: ShardSet, tokenizer: Tokenizer) -> TrainingJob:
    """Return a job in `folder/run` that steps over two micro-batches."""
    model = with_vocabulary(SHAPE, tokenizer.vocab_size)
    batch = {"document_mask": True, "micro_batch_rows": 4, "accumulate": 2}
    return training_job(folder / "run", shards, tokenizer, training_config(model=model, **batch))


def assert_failed(check: Check, *words: str) -> None:
    """Assert that `check` failed, and that each of `words` is in its figure or sentence."""
    assert not check.passed, check
    for word in words:
        assert word in f"{check.figure}. {check.sentence}", check
