"""The documents that a step of a run trains on, found again from its job and its history."""

from zeroflow.data import provenance
from zeroflow.data.batches import Skip
from zeroflow.data.provenance import Piece
from zeroflow.data.rows import Rows
from zeroflow.training import batching
from zeroflow.training.events import EVENTS, Started
from zeroflow.training.job import TrainingJob


def documents_of_step(job: TrainingJob, step: int) -> list[Piece]:
    """The pieces of documents that optimiser step `step` (from 1, as logged) trains on.

    Raises:
        ValueError: the job has no such step.
    """
    return _pieces(job, step, job.skips)


def documents_left_out(job: TrainingJob, step: int) -> list[Piece]:
    """What `step` trained on before a roll-back left it out; empty for most steps.

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
    """Parts of the shards that were read by the process that trained `step`.

    A run that is extended reads more parts, and so another order of rows, from then on. Of several
    processes that trained the step, the last one counts: it replaced what the others did.
    """
    events = EVENTS.read(job.folder.events)
    read = [e.parts for e in events if isinstance(e, Started) and e.step < step]
    return read[-1] if read else job.shards.parts
