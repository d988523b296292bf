"""The job of the ranks, and the result of training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from pydantic import PositiveInt, model_validator

from zeroflow.config import Config
from zeroflow.data.order import Order, Segment, Skip
from zeroflow.data.shards import ShardSet
from zeroflow.data.tokenizer import Tokenizer
from zeroflow.data.validation_sample import SampleCounts
from zeroflow.model.llama import ModelConfig
from zeroflow.records import Record, omitted
from zeroflow.reuse import StageResult
from zeroflow.run_folder import RunFolder
from zeroflow.tracking.config import TrackingConfig
from zeroflow.training import checkpoint
from zeroflow.training.config import TrainingConfig
from zeroflow.training.retention import Retention
from zeroflow.training.sampling import SamplingConfig


class Cadence(Config):
    """Intervals, in steps, of logged losses, validations and checkpoints."""

    log: PositiveInt
    validate_: PositiveInt
    checkpoint: PositiveInt


class RankJob(Record):
    """Settings of any job that runs on several ranks."""

    run_dir: Path
    training: TrainingConfig

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.run_dir)

    @property
    def model(self) -> ModelConfig:
        return self.training.workload.model


class TrainingJob(RankJob):
    """Job of the ranks that train."""

    FORMAT: ClassVar[int] = 3
    PRIVATE: ClassVar[bool] = True

    cadence: Cadence
    retention: Retention
    min_nodes: PositiveInt | None = omitted()
    """Minimum number of machines with which training continues; None for all."""

    local_cache: Path | None = omitted()
    """Folder on a local disk of each machine for copies of the shards; None for no copies."""

    hang_seconds: PositiveInt
    """Time without a finished step, validation or checkpoint after which the ranks are killed."""

    roll_back_spikes: bool
    skips: tuple[Skip, ...] = ()
    """Windows of the data to skip."""

    segments: tuple[Segment, ...] = ()
    """Segments of the data of a run that was extended to more rows; empty for one segment of all
    rows, as in files of older formats."""

    shards: ShardSet
    validation_rows: PositiveInt
    """Number of held-out rows in the sample that a validation scores."""

    tokenizer: Tokenizer
    initial: Path | None = omitted()
    """Folder of the weights that training starts from; None for random weights."""

    prompt: str
    sampling: SamplingConfig
    tracking: TrackingConfig
    compile_cache: Path | None = None
    """Folder for compiled code; None for PyTorch's default."""

    peak_flops: float | None
    """Dense bf16 FLOP/s of all devices, also for 8-bit products. None if unknown or if the run is
    in fp32; then there is no MFU."""

    @property
    def order(self) -> Order:
        """The rows of every step."""
        training, rows = self.training, self.shards.train.rows
        return Order(
            self.segments or [Segment(batch=0, rows=rows)],
            batch_rows=training.workload.batch_rows,
            seed=training.seed,
            skips=self.skips,
        )

    # Files written before format 2

    @model_validator(mode="before")
    @classmethod
    def _from_format_1(cls, fields: Any) -> Any:
        """Read a job with `model` next to `training`, and the workload's fields in `training`."""
        if not isinstance(fields, dict) or "model" not in fields:
            return fields
        training = fields["training"]
        kept = training.keys() & TrainingConfig.model_fields
        workload = {
            **training["compute"],
            **{name: training[name] for name in training.keys() - kept - {"compute"}},
            "device_name": fields["tracking"]["tags"]["device"],
            "model": fields["model"],
            "seq_len": fields["shards"]["row_tokens"] - 1,
        }
        training = {name: training[name] for name in kept} | {"workload": workload}
        others = {name: value for name, value in fields.items() if name != "model"}
        return others | {"training": training}


class TrainResult(StageResult):
    """The result of training to the last step: contents of training.json."""

    checkpoint: Path
    """Folder of the checkpoint of the last step."""

    steps: int
    """Number of steps of the whole run."""

    tokens: int
    """Number of tokens trained on."""

    train_loss: float
    """Loss of the last step, in nats per token."""

    val_loss: float
    """Validation loss after the last step, in nats per token."""

    val_bpb: float | None
    """Validation loss in bits per byte of text; None for data that is not text."""

    val_error: float | None = omitted()
    """Standard error of val_loss; None for one row, and in files of older versions."""

    validated: SampleCounts | None = omitted()
    """Contents of the held-out rows; None in files of older versions."""

    first_val_loss: float
    """Validation loss before the first step, in nats per token."""

    tokens_per_second: float | None
    """Speed over all steps except the first of each process, see `goodput.TRAINING`; None if there
    are no others."""

    mfu: float | None
    """Model FLOPs utilisation, from 0 to 1; None if the peak of the device is unknown."""

    peak_memory_bytes: int
    """Highest peak memory of any rank."""

    sample: str
    """Text that the model generated at the last validation."""


def read_job(folder: RunFolder) -> TrainingJob:
    """Read the job of a run, with paths in the cache where the run is now: it may have moved."""
    found = TrainingJob.read(folder.job)
    tokenizer, cache = found.tokenizer, folder.cache
    if tokenizer.path is not None:
        tokenizer = tokenizer.replace(path=cache.tokenizers / tokenizer.path.name)
    shards = found.shards.replace(path=cache.shards / found.shards.path.name)
    initial = found.initial and cache.models / found.initial.name
    return found.replace(run_dir=folder.path, tokenizer=tokenizer, initial=initial, shards=shards)


def trained_tokenizer(folder: RunFolder) -> Tokenizer | None:
    """Return the tokenizer that a run was trained with, from its job; None without a checkpoint.

    The directory of the tokenizer may be missing.

    Raises:
        CheckpointError: the checkpoints belong to another version of zeroflow.
    """
    facts = checkpoint.newest_facts(folder.checkpoints)
    if facts is None or not folder.job.exists():
        return None
    tokenizer = read_job(folder).tokenizer
    # Earlier versions replaced the job before they refused to resume with another tokenizer
    return tokenizer if tokenizer.fingerprint == facts.tokenizer else None


def finished(job: TrainingJob) -> TrainResult | None:
    """Return the result of the job if it has been trained to its last step."""
    result = read_result(job)
    done = result and result.steps == job.training.steps and result.checkpoint.exists()
    return result if done else None


def why_trained(job: TrainingJob, others: Callable[[], str]) -> str:
    """Return the reason why an unfinished job is trained, and from which step.

    Args:
        others: returns the reason why no other run can be used.
    """
    step = checkpoint.newest_step(job.folder.checkpoints)
    newest = f"its newest checkpoint is from step {step:,} of {job.training.steps:,}"
    if (result := read_result(job)) and result.steps < job.training.steps and step:
        return f"it was trained to step {result.steps:,}, and more steps are requested: {newest}"
    if result and not result.checkpoint.exists():
        return f"{result.checkpoint.name} is missing: {newest if step else 'no checkpoint is left'}"
    if step:
        return f"its training did not end: {newest}"
    if job.folder.job.exists():
        return "an earlier start ended without a checkpoint"
    return others()


def read_result(job: TrainingJob) -> TrainResult | None:
    """Read the result of a job, with the checkpoint's current path: the cache may have moved."""
    if (result := TrainResult.read_if_exists(job.folder.training)) is None:
        return None
    return result.replace(checkpoint=job.folder.checkpoints / result.checkpoint.name)
