"""The documents of a training step, computed from the run's job and history."""

import numpy as np

from zeroflow.data import provenance
from zeroflow.data.order import Segment, Skip
from zeroflow.data.provenance import Piece
from zeroflow.data.rows import Rows
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
    steps = job.training.steps
    if not 1 <= step <= steps:
        raise ValueError(f"run {job.run_dir.name} has no step {step}: its steps are 1 to {steps}")
    job = job.replace(skips=skips, segments=job.segments or _segment_of_older_run(job, step))
    rows = job.order.rows(np.array([step - 1]))
    return provenance.pieces(job.shards, job.tokenizer, rows.flatten())


def _segment_of_older_run(job: TrainingJob, step: int) -> tuple[Segment, ...]:
    """Return one segment with the rows that the process that trained `step` read.

    Older versions recorded no segments: after an extension, a run read all rows in a new order. If
    several processes trained the step, the last one counts, because its result replaced the others.
    """
    events = EVENTS.read(job.folder.events)
    read = [e.parts for e in events if isinstance(e, Started) and e.step < step]
    parts = read[-1] if read else job.shards.parts
    return (Segment(batch=0, rows=len(Rows(job.shards.replace(parts=parts), "train"))),)
