"""The documents of a training step, recovered from the run's job and history."""

from zeroflow.data import provenance
from zeroflow.data.batches import Skip
from zeroflow.data.provenance import Piece
from zeroflow.data.rows import Rows
from zeroflow.training import batching
from zeroflow.training.events import EVENTS, Started
from zeroflow.training.job import TrainingJob


def documents_of_step(job: TrainingJob, step: int) -> list[Piece]:
    """Return the pieces of documents that step `step` (from 1, as logged) trains on.

    Raises:
        ValueError: the job has no such step.
    """
    return _pieces(job, step, job.skips)


def documents_left_out(job: TrainingJob, step: int) -> list[Piece]:
    """Return the pieces that `step` trained on before a roll-back; empty for most steps.

    Raises:
        ValueError: the job has no such step.
    """
    left_out = []
    for number, skip in enumerate(job.skips):
        if skip.step < step <= skip.step + skip.batches:
            left_out += _pieces(job, step, job.skips[:number])
    return left_out


def _pieces(job: TrainingJob, step: int, skips: tuple[Skip, ...]) -> list[Piece]:
    config = job.training
    if not 1 <= step <= config.steps:
        raise ValueError(
            f"run {job.run_dir.name} has no step {step}: its steps are 1 to {config.steps}"
        )
    shards = job.shards.replace(parts=_parts_read(job, step))
    rows = batching.batches(Rows(shards, "train"), config, skips).row_ids(step - 1)
    return provenance.pieces(shards, job.tokenizer, rows.flatten())


def _parts_read(job: TrainingJob, step: int) -> int:
    """Return the number of parts read by the process that trained `step`.

    An extended run reads more parts, which changes the order of rows from then on. If several
    processes trained the step, the last one counts: it replaced the work of the others.
    """
    events = EVENTS.read(job.folder.events)
    read = [e.parts for e in events if isinstance(e, Started) and e.step < step]
    return read[-1] if read else job.shards.parts
