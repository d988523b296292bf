"""report.json: what a finished run says about itself, for people and for other programs."""

from pathlib import Path
from typing import Literal, Self

from zeroflow.checks.preflight import PreflightResult
from zeroflow.device import Precision
from zeroflow.records import Record
from zeroflow.report.band import Verdict
from zeroflow.report.plan import Compared
from zeroflow.training.recovery import Entry
from zeroflow.training.workload import Workload
from zeroflow.training.zero import Stage


class OverfitFigures(Record):
    passed: bool
    loss: float
    """Lowest loss that the check reached."""

    steps: int


class CorpusFigures(Record):
    mode: str
    name: str
    revision: str | None
    synthetic_fallback: bool
    """True if synthetic data stood in for FineWeb-Edu."""

    documents: int
    train_rows: int
    epochs: float
    path: Path
    """Folder of the shards."""


class TokenizerFigures(Record):
    name: str
    revision: str | None
    vocab_size: int
    fingerprint: str


class TimeFigures(Record):
    """Where the wall time of the training went."""

    wall_seconds: float
    training_seconds: float
    """Seconds that tokens per second are over."""

    goodput: float
    """Share of the wall time that trained the model."""

    seconds: dict[str, float]
    """By phase."""

    shares: dict[str, float]
    """By phase."""

    restarts: int
    steps_again: int
    """Steps that were trained a second time after a restart."""


class ExpectedLoss(Verdict):
    """The training loss, compared with that of earlier runs."""

    verdict: str = "unknown: no earlier run trained in the same way"
    """In words."""

    runs: tuple[str, ...] = ()
    """The earlier runs."""


class StageFigures(Record):
    reused: bool
    """True if the last command had nothing to do."""

    why: str


class WorkloadFigures(Record):
    """What the run was computed on, and how."""

    device: str
    """Name of the device."""

    gpus: int = 1
    """Ranks; with a CPU, processes that share its cores."""

    zero_stage: Stage = 0
    precision: Precision
    fp8: bool = False

    @classmethod
    def of(cls, workload: Workload) -> Self:
        return cls(
            device=workload.device_name,
            gpus=workload.ranks,
            zero_stage=workload.zero_stage,
            precision=workload.precision,
            fp8=workload.fp8,
        )


class RunReport(WorkloadFigures):
    """A finished run."""

    status: Literal["completed", "failed"]
    """failed: the overfit check did not pass."""

    run: str
    """Name of the run."""

    size: str
    """Name of the model's size; custom for another shape."""

    parameters: int
    """Parameters of the model, with the tied embedding once."""

    steps: int
    """Optimiser steps of the whole run."""

    tokens: int
    """Tokens trained on."""

    train_loss: float
    """Loss of the last step, in nats per token."""

    first_val_loss: float
    """Validation loss before the first step, in nats per token."""

    val_loss: float
    """Validation loss after the last step, in nats per token."""

    val_bpb: float | None
    """The same in bits per byte of text; None for data that is not text."""

    entropy: float | None
    """Lowest possible loss in nats per token, for data of which it is known."""

    overfit: OverfitFigures
    tokens_per_second: float | None
    """Speed over all steps but the first of a process."""

    mfu: float | None
    """Model FLOPs utilisation, from 0 to 1; None if the peak of the device is not known."""

    peak_memory_bytes: int
    """Peak memory of the rank that held most."""

    resume: str
    """How exact a resume of this run is."""

    recoveries: list[Entry] = []  # noqa: RUF012, pydantic copies it
    data: CorpusFigures
    tokenizer: TokenizerFigures
    checkpoint: Path
    """Folder of the checkpoint of the last step."""

    sample: str
    """Text that the model generated at the end."""

    time: TimeFigures
    expected_loss: ExpectedLoss = ExpectedLoss()
    preflight: PreflightResult | None = None
    stages: dict[str, StageFigures] = {}  # noqa: RUF012
    """What the last command reused, by stage."""

    plan: list[Compared] = []  # noqa: RUF012
    """What was predicted and measured; empty if there was no plan."""

    metrics: dict[str, float] = {}  # noqa: RUF012
    """Last logged value of every metric, by its key in MLflow."""

    mlflow_run_id: str | None = None
    """None if the run is not in MLflow."""
