"""The metrics of training: their table, records and measurement.

To add a metric, add a field to a record, a line to `TABLE` and the expression that measures it to
`Meter`. MLflow, the report, the plots and the table of a sweep use this table.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Discriminator, Tag

from zeroflow.records import JsonLines, Record, omitted
from zeroflow.tracking.points import Axis, Look, NewPoints, Point
from zeroflow.training import zero
from zeroflow.training.goodput import Account
from zeroflow.training.job import TrainingJob
from zeroflow.training.loop import StepMetrics
from zeroflow.training.state import TrainState
from zeroflow.training.validation import ValidationLoss, bits_per_byte


class _Logged(Record):
    step: int
    """Number of steps done."""

    tokens: int
    """Number of tokens trained on so far."""

    flops: int | None = omitted()
    """FLOPs of the model so far; None in files of older versions."""

    time: float
    """Seconds since the epoch."""


class StepRecord(_Logged):
    """A logged step."""

    loss: float
    """Mean over the targets of the global batch, in nats per token."""

    lr: float
    """Learning rate of the step."""

    grad_norm: float
    """Global norm of the gradient before clipping."""

    update_ratio: float | None = None
    """Largest ratio of the norm of a matrix's update to the norm of its weights; None in files of
    older versions."""

    skipped_updates: int = 0
    """Number of updates skipped so far because of a non-finite loss or gradient."""

    first_epoch: bool = False
    """True as long as no row has been read twice."""

    tokens_per_second: float | None
    """Speed since the last logged step. The first step of a process does not count; None if there
    is no other."""

    peak_memory_mib: float | None = None
    """Highest peak memory of any rank, in MiB; None in files of older versions."""

    goodput: dict[str, float] = {}  # noqa: RUF012, pydantic copies it
    """Fraction of the wall time so far, by phase."""

    mfu: float | None = omitted()
    """Model FLOPs utilisation, from 0 to 1; None if the peak of the device is unknown."""


class ValidationRecord(_Logged):
    """A validation."""

    val_loss: float
    """Mean over the held-out targets, in nats per token."""

    val_error: float | None = omitted()
    """Standard error of val_loss over held-out documents; None in files of older versions."""

    val_bpb: float | None
    """Validation loss in bits per byte of text; None for data that is not text."""

    sample: str
    """Text that the model generated."""


def _tag(content: Any) -> str:
    """Return the tag of a record, given as an object or as its content in the file."""
    if isinstance(content, Mapping):
        return "validation" if "val_loss" in content else "step"
    return "validation" if isinstance(content, ValidationRecord) else "step"


MetricsRecord = Annotated[
    Annotated[StepRecord, Tag("step")] | Annotated[ValidationRecord, Tag("validation")],
    Discriminator(_tag),
]

METRICS: JsonLines[MetricsRecord] = JsonLines(MetricsRecord)
"""metrics.jsonl: every logged step and validation exactly once, also after a resume."""


@dataclass(frozen=True)
class Metric:
    """Presentation of a field of a record."""

    key: str
    """Name of the curve in trackers; a prefix of the names for a field with several values."""

    label: str
    unit: str = ""
    form: str = ".4g"
    """Format of a value, as in `format(value, form)`."""

    by_compute: bool = False
    """True to plot it also against tokens and FLOPs."""

    compared: bool = False
    """True to add a column to the table that compares the runs of a sweep."""

    @property
    def meaning(self) -> str:
        """The label with its unit."""
        return f"{self.label} in {self.unit}" if self.unit else self.label

    def text(self, value: float) -> str:
        return f"{value:{self.form}} {self.unit}".rstrip()


_NATS = "nats per token"

TABLE = {
    "loss": Metric("loss/train", "training loss", _NATS, ".4f", by_compute=True),
    "val_loss": Metric("loss/val", "validation loss", _NATS, ".4f", by_compute=True, compared=True),
    "val_bpb": Metric("loss/val_bpb", "bits per byte", "", ".4f", by_compute=True, compared=True),
    "val_error": Metric("loss/val_standard_error", "standard error of the validation loss", _NATS),
    "lr": Metric("optim/learning_rate", "learning rate"),
    "grad_norm": Metric("optim/grad_norm", "gradient norm"),
    "update_ratio": Metric("optim/update_ratio", "update ratio"),
    "skipped_updates": Metric("optim/skipped_updates", "skipped updates", "", ",.0f"),
    "tokens_per_second": Metric("perf/tokens_per_second", "speed", "tokens/s", ",.0f"),
    "mfu": Metric("perf/mfu", "MFU", "", ".1%"),
    "peak_memory_mib": Metric("perf/peak_memory_mib", "peak memory", "MiB", ",.0f"),
    "goodput": Metric("time", "share of the wall time", "", ".1%"),
}
"""Metrics by field. A field without an entry is not shown."""


def points(records: Iterable[MetricsRecord]) -> Iterator[Point]:
    """Yield the points of `records` for trackers in order, skipping None."""
    for record in records:
        for key, metric, value in _values(record):
            yield Point(key, value, record.step, record.time, "steps", metric.meaning)
            if not metric.by_compute:
                continue
            axes: dict[Axis, int] = {"tokens": record.tokens}
            if record.flops is not None:  # in GFLOPs, because FLOPs overflow MLflow's 64 bits
                axes["gflops"] = record.flops // 10**9
            for axis, position in axes.items():
                yield Point(f"{key}_by_{axis}", value, position, record.time, axis, metric.meaning)


def follow_points(file: Path) -> Look:
    """Return a look at the points of metrics.jsonl, which begins with all of them."""
    records = METRICS.follow(file)

    def look() -> NewPoints:
        found = records.new_records()
        return NewPoints(points(found), records.from_start)

    return look


def latest(records: Iterable[MetricsRecord]) -> dict[str, float]:
    """Return the last value of each metric, by its key in MLflow."""
    return {key: value for record in records for key, _, value in _values(record)}


def _values(record: MetricsRecord) -> Iterator[tuple[str, Metric, float]]:
    for name, metric in TABLE.items():
        value = getattr(record, name, None)
        if isinstance(value, Mapping):
            yield from ((f"{metric.key}/{part}", metric, share) for part, share in value.items())
        elif value is not None:
            yield metric.key, metric, value


class Meter:
    """Measures the metrics. All ranks call it, because some metrics combine all ranks."""

    def __init__(self, job: TrainingJob, account: Account) -> None:
        """
        Args:
            account: time account of the run so far.
        """
        self._job, self._work, self._order = job, job.training.workload, job.order
        self._last = (account.steps, account.training)

    def step(
        self, state: TrainState, metrics: StepMetrics, account: Account, rate: float | None
    ) -> StepRecord:
        """Return the record of the last step. Waits for the device.

        Args:
            account: time account of the run so far.
            rate: tokens per second since the last logged step.
        """
        step, optimizer = state.step, self._work.optimizer
        return StepRecord(
            step=step,
            tokens=self.tokens(step),
            flops=self.tokens(step) * self._work.flops_per_token,
            time=time.time(),
            loss=metrics.loss.item(),
            lr=metrics.learning_rate,
            grad_norm=metrics.grad_norm.item(),
            update_ratio=optimizer.update_ratio(state.optimizer).item(),
            skipped_updates=int(state.skipped[1]),
            first_epoch=self._order.is_first_epoch(step),
            tokens_per_second=rate,
            peak_memory_mib=peak_memory_bytes(self._job) / 2**20,
            goodput=dict(account.shares),
            mfu=self.mfu(rate),
        )

    def validation(
        self, step: int, loss: ValidationLoss, sample: str, bytes_per_token: float | None
    ) -> ValidationRecord:
        """
        Args:
            bytes_per_token: bytes of text per scored token; None for data that is not text.
        """
        return ValidationRecord(
            step=step,
            tokens=self.tokens(step),
            flops=self.tokens(step) * self._work.flops_per_token,
            time=time.time(),
            val_loss=loss.mean,
            val_error=loss.standard_error,
            val_bpb=bits_per_byte(loss.mean, bytes_per_token) if bytes_per_token else None,
            sample=sample,
        )

    def tokens(self, step: int) -> int:
        """Return the number of tokens trained on until the end of `step`."""
        return step * self._work.batch_tokens

    def rate(self, account: Account) -> float | None:
        """Return tokens per second since the last call."""
        steps, seconds = self._last
        self._last = (account.steps, account.training)
        return self.tokens_per_second(account.steps - steps, account.training - seconds)

    def tokens_per_second(self, steps: int, seconds: float) -> float | None:
        """Return the speed; None if `steps`, which exclude first steps of processes, is 0."""
        return self.tokens(steps) / seconds if steps else None

    def mfu(self, tokens_per_second: float | None) -> float | None:
        """Return the model FLOPs utilisation: https://arxiv.org/abs/2204.02311, appendix B."""
        if self._job.peak_flops is None or tokens_per_second is None:
            return None
        return tokens_per_second * self._work.flops_per_token / self._job.peak_flops


def peak_memory_bytes(job: TrainingJob) -> int:
    """Return the highest peak of any rank: tensors on a GPU, resident memory on a CPU."""
    return zero.max_over_ranks(_peak_memory_bytes(job))


def _peak_memory_bytes(job: TrainingJob) -> int:
    if job.training.workload.device == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        # Not getrusage: on Linux its peak starts at the memory of the parent process
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except FileNotFoundError:  # not Linux
        import resource  # missing on Windows, where training needs a GPU

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
