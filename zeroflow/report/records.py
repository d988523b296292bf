"""report.json: results of a finished run, for people and for other programs."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from zeroflow.checks.preflight import PreflightResult
from zeroflow.data.validation_sample import SampleCounts
from zeroflow.device import Precision
from zeroflow.records import Record, omitted
from zeroflow.report.band import Verdict
from zeroflow.report.plan import Compared
from zeroflow.training.extension import Extension
from zeroflow.training.recovery import Entry
from zeroflow.training.workload import Sharding, Workload


class OverfitFigures(Record):
    passed: bool
    loss: float
    """Lowest loss that the check reached."""

    steps: int
    least_loss: float | None = omitted()
    """Lowest loss that a model can reach on the batch of the check; None in older files."""


class CorpusFigures(Record):
    mode: str
    name: str
    revision: str | None
    synthetic_fallback: bool
    """True if synthetic data replaced FineWeb-Edu."""

    documents: int
    train_rows: int
    epochs: float
    """Number of rows read, with repetitions, divided by the number of training rows."""

    covered: float | None = omitted()
    """Fraction of the training rows that were read at least once; None in older files."""

    repeated: float | None = omitted()
    """Fraction of the training rows that were read more than once; None in older files."""

    path: Path
    """Folder of the shards."""


class TokenizerFigures(Record):
    name: str
    revision: str | None
    vocab_size: int
    fingerprint: str


class TimeFigures(Record):
    """Wall time of training by phase."""

    wall_seconds: float
    training_seconds: float
    """Seconds from which tokens per second are computed."""

    goodput: float
    """Fraction of the wall time that contributed to the weights."""

    seconds: dict[str, float]
    """Seconds by phase."""

    shares: dict[str, float]
    """Fractions of the wall time by phase."""

    restarts: int
    steps_again: int
    """Number of steps that were trained again after a restart."""


class ExpectedLoss(Verdict):
    """Comparison of the training loss with that of earlier runs."""

    verdict: str = "unknown: no earlier run trained in the same way"
    """Verdict in words."""

    runs: tuple[str, ...] = ()
    """Names of the earlier runs."""


class StageFigures(Record):
    reused: bool
    """True if the last command reused the stage's result."""

    why: str


class WorkloadFigures(Sharding):
    """Device, number formats and kernels of a run."""

    device: str
    """Name of the device."""

    precision: Precision
    fp8: bool = False

    @classmethod
    def of(cls, workload: Workload) -> Self:
        return cls(
            **workload.sharding.model_dump(),
            device=workload.device_name,
            precision=workload.precision,
            fp8=workload.fp8,
        )


class RunReport(WorkloadFigures):
    """A finished run."""

    @model_validator(mode="before")
    @classmethod
    def _rename_older_fields(cls, content: Any) -> Any:
        if isinstance(content, dict) and "thinned_checkpoints" in content:
            return {"skipped_checkpoints": content["thinned_checkpoints"]} | content
        return content

    status: Literal["completed", "failed"]
    """failed: the overfit check did not pass."""

    run: str
    """Name of the run."""

    size: str
    """Name of the model's size; custom for another shape."""

    init_from: str | None = omitted()
    """Trained model that the run started from; None for random weights."""

    parameters: int
    """Number of parameters of the model; the tied embedding counts once."""

    steps: int
    """Number of optimiser steps of the whole run."""

    tokens: int
    """Number of tokens trained on."""

    train_loss: float
    """Loss of the last step, in nats per token."""

    first_val_loss: float
    """Validation loss before the first step, in nats per token."""

    val_loss: float
    """Validation loss after the last step, in nats per token."""

    val_error: float | None = omitted()
    """Standard error of val_loss over held-out documents; None in files of older versions."""

    validated: SampleCounts | None = omitted()
    """Contents of the held-out rows; None in files of older versions."""

    val_bpb: float | None
    """Final validation loss in bits per byte of text; None for data that is not text."""

    entropy: float | None
    """Loss of a model that knows the source of the data, in nats per token; None if unknown."""

    overfit: OverfitFigures
    tokens_per_second: float | None
    """Speed over all steps except the first of each process."""

    mfu: float | None
    """Model FLOPs utilisation, from 0 to 1; None if the peak of the device is unknown."""

    peak_memory_bytes: int
    """Peak memory of the rank with the highest peak."""

    resume: str
    """Description of how exact a resume of this run is."""

    recoveries: list[Entry] = []  # noqa: RUF012, pydantic copies it
    data: CorpusFigures
    tokenizer: TokenizerFigures
    checkpoint: Path
    """Folder of the checkpoint of the last step."""

    skipped_checkpoints: int | None = omitted()
    """Number of due checkpoints that were skipped, because the one before was still being written.
    None in files of older versions."""

    sample: str
    """Text that the model generated at the end."""

    time: TimeFigures
    expected_loss: ExpectedLoss = ExpectedLoss()
    preflight: PreflightResult | None = None
    stages: dict[str, StageFigures] = {}  # noqa: RUF012
    """Reuse by the last command, for each stage."""

    extensions: list[Extension] | None = omitted()
    """Extensions of the run to more steps; None if there were none."""

    plan: list[Compared] = []  # noqa: RUF012
    """Predicted and measured figures; empty if there was no plan."""

    metrics: dict[str, float] = {}  # noqa: RUF012
    """Last logged value of every metric, by its key in MLflow."""

    mlflow_run_id: str | None = None
    """None if the run is not in MLflow."""
