"""What a training process is given, and how it is started, watched and stopped.

Training always runs in a process of its own: GPU memory is returned at its exit, and a crash or an
out-of-memory kill leaves the flow alive to say so. torchrun is not between them: one process has
nobody to meet, and torchrun takes seconds to start and is one more that can be killed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import PositiveInt, model_validator

from zeroflow.config import Config
from zeroflow.data.batches import Skip
from zeroflow.data.shards import ShardSet
from zeroflow.data.tokenizer import Tokenizer
from zeroflow.model.llama import ModelConfig
from zeroflow.records import Record
from zeroflow.reuse import StageResult
from zeroflow.run_folder import RunFolder
from zeroflow.tracking.config import TrackingConfig
from zeroflow.training import checkpoint
from zeroflow.training.checkpoint import Retention
from zeroflow.training.config import TrainingConfig
from zeroflow.training.sampling import SamplingConfig

FailureReason = Literal["killed", "hang", "out of memory", "diverged", "error"]
"""killed: the process ended without an error message. diverged: its numbers went wrong."""


class Cadence(Config):
    """After how many steps something is done."""

    log: PositiveInt
    validate_: PositiveInt
    checkpoint: PositiveInt


class RankJob(Record):
    """What ranks need to know to do a job together."""

    run_dir: Path
    training: TrainingConfig

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.run_dir)

    @property
    def model(self) -> ModelConfig:
        return self.training.workload.model


class TrainingJob(RankJob):
    """Everything the training processes of a run need."""

    FORMAT: ClassVar[int] = 2

    cadence: Cadence
    retention: Retention
    hang_seconds: PositiveInt
    """Without a finished step, validation or checkpoint, after which it is taken for hung."""

    roll_back_spikes: bool
    skips: tuple[Skip, ...] = ()
    """Windows of the data that are left out."""

    shards: ShardSet
    validation_rows: PositiveInt
    """Rows in a validation, the first of those that are held out."""

    tokenizer: Tokenizer
    prompt: str
    sampling: SamplingConfig
    tracking: TrackingConfig
    compile_cache: Path | None = None
    """Where compiled code is kept; None where PyTorch keeps it."""

    peak_flops: float | None
    """Dense bf16 FLOP/s of all devices, whatever the precision of the products. None if unknown, or
    if the run is in fp32: then no MFU is given."""

    # Files written before format 2

    @model_validator(mode="before")
    @classmethod
    def _from_format_1(cls, fields: Any) -> Any:
        """Read a job whose `model` stood beside its training, and the workload's fields in it."""
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
    """The result of a finished training, in training.json."""

    checkpoint: Path
    """Folder of the checkpoint of the last step."""

    steps: int
    """Steps of the whole run."""

    tokens: int
    """Tokens trained on."""

    train_loss: float
    """Loss of the last step, in nats per token."""

    val_loss: float
    """Validation loss after the last step, in nats per token."""

    val_bpb: float | None
    """The same in bits per byte of text; None for data that is not text."""

    first_val_loss: float
    """Validation loss before the first step, in nats per token."""

    tokens_per_second: float | None
    """Speed over the seconds of all steps but the first of a process, see `goodput.TRAINING`; None
    if there were no others."""

    mfu: float | None
    """Model FLOPs utilisation, from 0 to 1; None if the peak of the device is not known."""

    peak_memory_bytes: int
    """Peak memory of the rank that held most."""

    sample: str
    """Text that the model generated at the last validation."""


class TrainingFailed(RuntimeError):
    """A training process ended by an error, or was ended."""

    def __init__(
        self, message: str, reason: FailureReason = "error", step: int | None = None
    ) -> None:
        """
        Args:
            step: that the numbers went wrong at.
        """
        super().__init__(message)
        self.reason, self.step = reason, step
        self.will_retry = False
        """Whether something was changed, so that another start has a chance."""

    def add_advice(self, advice: str) -> None:
        if advice:
            self.args = (f"{self}\n{advice}",)


class RunIsBusy(TrainingFailed):
    """Another process has launched one for this run and is there still."""


class TrainingStopped(RuntimeError):
    """A training process was asked to stop, and did so in order."""


def finished(job: TrainingJob) -> TrainResult | None:
    """The result of this job, if it was trained to its last step before."""
    result = read_result(job)
    done = result and result.steps == job.training.steps and result.checkpoint.exists()
    return result if done else None


def why_trained(job: TrainingJob, others: Callable[[], str]) -> str:
    """Why a job that is not finished is not, or from where it goes on.

    Args:
        others: says why no other run serves.
    """
    step = checkpoint.newest_step(job.folder.checkpoints)
    newest = f"its newest checkpoint is of step {step:,} of {job.training.steps:,}"
    if (result := read_result(job)) and result.steps < job.training.steps and step:
        return f"it was trained to step {result.steps:,}, and more are asked for: {newest}"
    if result and not result.checkpoint.exists():
        return f"{result.checkpoint.name} is gone: {newest if step else 'no checkpoint is left'}"
    if step:
        return f"it was not trained to its end: {newest}"
    if job.folder.job.exists():
        return "it was started before, and ended without a checkpoint"
    return others()


def read_result(job: TrainingJob) -> TrainResult | None:
    return TrainResult.read_if_exists(job.folder.training)
