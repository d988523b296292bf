"""Records in a cache from which a run is predicted: those of earlier runs, and its own."""

from typing import NamedTuple

from zeroflow.data.part_counts import row_bytes
from zeroflow.data.tokenizer import Tokenizer
from zeroflow.estimate import history
from zeroflow.estimate.history import Past
from zeroflow.estimate.run_speed import PastTraining, already_trained
from zeroflow.run_folder import RunFolder
from zeroflow.tracking.models import stored_bytes
from zeroflow.training import checkpoint
from zeroflow.training.job import TrainingJob, trained_tokenizer


class RunRecords(NamedTuple):
    """Earlier runs in the cache, and the part of the planned run that exists."""

    runs: list[Past]
    trained: PastTraining | None
    tokenizer: Tokenizer | None
    """The tokenizer that the planned run was trained with; None without a checkpoint."""

    steps_done: int
    """Step of the newest checkpoint of the planned run."""

    there_bytes: int
    """Bytes of shards and checkpoints that the planned run already has."""

    registered_bytes: int
    """Bytes of weights of the planned run that MLflow's store in the cache already has."""


def read_records(folder: RunFolder) -> RunRecords:
    """Read the records for the prediction of the run in `folder`, which need not exist yet.

    Raises:
        CheckpointError: the checkpoints belong to another version of zeroflow.
    """
    return RunRecords(
        runs=history.read(folder.cache.path),
        trained=already_trained(folder),
        tokenizer=trained_tokenizer(folder),
        steps_done=checkpoint.newest_step(folder.checkpoints),
        there_bytes=_there(folder),
        registered_bytes=_registered(folder),
    )


def _there(folder: RunFolder) -> int:
    if not folder.job.exists():
        return 0
    try:
        saved = sum(file.stat().st_size for file in folder.checkpoints.rglob("*") if file.is_file())
        return saved + row_bytes(TrainingJob.read(folder.job).shards)
    except (OSError, ValueError):  # a checkpoint was just removed, or is of another version
        return 0


def _registered(folder: RunFolder) -> int:
    try:
        return stored_bytes(folder)
    except (OSError, ValueError):  # a model was just deleted, or is being written
        return 0
