"""The documents that a step was trained on."""

from pathlib import Path

from zeroflow.data import provenance
from zeroflow.data.batches import Skip
from zeroflow.data.provenance import Piece
from zeroflow.data.rows import Rows
from zeroflow.inference.trained import job
from zeroflow.training import batching
from zeroflow.training.events import EVENTS, Started
from zeroflow.training.job import TrainingJob


def documents(cache: Path, name: str, step: int) -> list[Piece]:
    """The documents that optimiser step `step` (from 1, as logged) of run `name` trains on.

    Raises:
        ValueError: there is no such run, or it has no such step.
    """
    found = job(cache, name)
    return _pieces(found, step, found.skips)


def left_out(cache: Path, name: str, step: int) -> list[Piece]:
    """The documents that `step` had before a roll-back left them out; of most steps none.

    Raises:
        ValueError: as for `documents`.
    """
    found = job(cache, name)
    gone = []
    for number, skip in enumerate(found.skips):
        if skip.step < step <= skip.step + skip.batches:
            gone += _pieces(found, step, found.skips[:number])
    return gone


def _pieces(found: TrainingJob, step: int, skips: tuple[Skip, ...]) -> list[Piece]:
    config = found.training
    if not 1 <= step <= config.steps:
        raise ValueError(
            f"run {found.run_dir.name} has no step {step}: its steps are 1 to {config.steps}"
        )
    shards = found.shards.replace(parts=_parts_read(found, step))
    rows = batching.batches(Rows(shards, "train"), config, skips).row_ids(step - 1)
    return provenance.pieces(shards, found.tokenizer, rows.flatten())


def _parts_read(job: TrainingJob, step: int) -> int:
    """Parts of the shards that were read for `step`; a run that is extended has more.

    Of several processes that did the step, the last one counts: what the others did was not kept.
    """
    events = EVENTS.read(job.folder.events)
    read = [e.parts for e in events if isinstance(e, Started) and e.step < step]
    return read[-1] if read else job.shards.parts
