"""A job of two ranks, which train on one or two machines."""

from pathlib import Path

from tiny import MODEL, synthetic_rows, training_config, training_job

from zeroflow.training.job import Cadence, TrainingJob


def job_of_two(
    folder: Path, cache: Path, *, nodes: int, steps: int, checkpoint: int
) -> TrainingJob:
    """
    Args:
        checkpoint: steps between checkpoints.
    """
    shards, tokenizer = synthetic_rows(cache)
    model = MODEL.replace(vocab_size=tokenizer.vocab_size)
    training = training_config(steps=steps, ranks=2, zero_stage=2, nodes=nodes, model=model)
    job = training_job(folder, shards, tokenizer, training)
    return job.replace(cadence=Cadence(log=1, validate_=100, checkpoint=checkpoint))
