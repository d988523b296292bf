"""Outcome of a run of a sweep, completed or not, for the comparison."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import computed_field

from zeroflow import artifacts
from zeroflow.inference import evaluation
from zeroflow.model.sizes import SIZES
from zeroflow.report.records import RunReport
from zeroflow.run_folder import Cache, RunFolder
from zeroflow.settings import resuming
from zeroflow.settings.existing import load
from zeroflow.settings.settled import Settled
from zeroflow.training import goodput, metrics, ownership
from zeroflow.training.events import EVENTS, Failed
from zeroflow.training.extension import extensions
from zeroflow.training.failures import RunIsBusy
from zeroflow.training.job import TrainingJob
from zeroflow.training.metrics import METRICS, TABLE, ValidationRecord
from zeroflow.training.workload import Sharding
from zeroflow.units import parameter_count

Status = Literal["completed", "failed", "cancelled", "stopped", "running"]
"""failed: training or a check failed. cancelled: on request in Prefect. stopped: ended for another
reason before the last step."""

Measure = Literal["val_loss", "val_bpb"]
"""Field of a validation that is compared."""

COMPARED = [metric for metric in TABLE.values() if metric.compared]
"""Metrics in the table of a sweep."""


class Outcome(Sharding):
    """Outcome of one run so far."""

    run: str
    status: Status = "completed"
    size: str
    seed: int
    setting: str = ""
    """Fingerprint of all settings except the seed."""

    extended: str = ""
    """Steps at which the run was extended, as text; empty for other runs."""

    learning_rate: float
    parameters: int
    tokenizer: str = ""
    """Fingerprint of the tokenizer."""

    vocabulary: int
    context: int
    flops_per_token: int
    tokens: int
    """Tokens trained on until the last validation."""

    val_loss: float
    """Last validation loss, in nats per token."""

    val_bpb: float | None
    tokens_per_second: float | None
    seconds: float
    """Training seconds from which tokens per second are computed."""

    peak_memory_bytes: int
    """Peak memory of each GPU."""

    curve: tuple[tuple[int, float], ...]
    """Tokens and validation loss at every validation."""

    bpb_curve: tuple[tuple[int, float], ...] = ()
    """Tokens and bits per byte at every validation; empty for data that is not text."""

    metrics: dict[str, float] = {}  # noqa: RUF012, pydantic copies it
    """Last logged values of the compared metrics, by key in MLflow."""

    scores: dict[str, str] = {}  # noqa: RUF012
    """Scores of the newest evaluated checkpoint as text, by text or task and name of the figure."""

    @property
    def shape(self) -> str:
        """Name of the size; a custom shape is identified by its number of parameters."""
        if self.size in SIZES:
            return self.size
        return f"{self.size} of {parameter_count(self.parameters)} parameters"

    @computed_field  # type: ignore[prop-decorator]
    @property
    def flops(self) -> float:
        """FLOPs of training so far; a float, because the number may exceed 2^63."""
        return float(self.flops_per_token) * self.tokens

    def points(self, measure: Measure) -> tuple[tuple[int, float], ...]:
        """Return the tokens and the value of `measure` at every validation."""
        return self.curve if measure == "val_loss" else self.bpb_curve


def outcome(cache: Path, name: str) -> Outcome | None:
    """Return the outcome of run `name` so far; None if it has no validation loss.

    Raises:
        OSError, ValueError: its files cannot be read.
    """
    folder = Cache(cache).run(name)
    if not folder.job.exists():
        return None
    job, settings = TrainingJob.read(folder.job).replace(run_dir=folder.path), load(cache, name)
    records = METRICS.read(folder.metrics)
    # By step, because a file that a user has edited may have a step twice
    by_step = {record.step: record for record in records if isinstance(record, ValidationRecord)}
    if not by_step:
        return None
    validations = [by_step[step] for step in sorted(by_step)]
    report = RunReport.read_if_exists(folder.report)
    work, account, latest = job.training.workload, goodput.read(folder), metrics.latest(records)
    last, counted = validations[-1], account.steps * work.batch_tokens
    # Files of older versions have their peak memory in the report only
    peak = latest.get(TABLE["peak_memory_mib"].key, 0) * 2**20
    return Outcome(
        **work.sharding.model_dump(),
        run=name,
        status=_status(job, report),
        size=settings.model.name,
        seed=settings.seed,
        setting=_all_but_the_seed(settings),
        extended=", ".join(f"{e.step:,}" for e in extensions(job.training.schedule)),
        learning_rate=settings.schedule.peak,
        parameters=job.model.parameters,
        tokenizer=job.tokenizer.fingerprint,
        vocabulary=job.tokenizer.vocab_size,
        context=work.seq_len,
        flops_per_token=work.flops_per_token,
        tokens=last.tokens,
        val_loss=last.val_loss,
        val_bpb=last.val_bpb,
        tokens_per_second=counted / account.training if counted else None,
        seconds=account.training,
        peak_memory_bytes=report.peak_memory_bytes if report else round(peak),
        curve=tuple((record.tokens, record.val_loss) for record in validations),
        bpb_curve=tuple((r.tokens, r.val_bpb) for r in validations if r.val_bpb is not None),
        metrics={m.key: latest[m.key] for m in COMPARED if m.key in latest},
        scores=_scores(folder),
    )


def _scores(folder: RunFolder) -> dict[str, str]:
    newest = evaluation.read(folder).newest
    figures = newest.main_figures() if newest else ()
    return {f"{figure.of} {figure.name}": figure.text for figure in figures}


def _status(job: TrainingJob, report: RunReport | None) -> Status:
    if report and report.steps == job.training.steps:  # else the run was extended after the report
        return report.status
    if _is_running(job.folder):
        return "running"
    return "stopped" if failure(job.folder) is None else "failed"


def failure(folder: RunFolder) -> str | None:
    """Return the message of the failure that ended a run; None if it recorded none."""
    last = EVENTS.read(folder.events)[-1:]
    return last[0].message if last and isinstance(last[0], Failed) else None


def failures(folder: RunFolder) -> Iterator[str]:
    """Yield why a run failed: its training, or the overfit check after it."""
    if why := failure(folder):
        yield why
    report = RunReport.read_if_exists(folder.report)
    if report and report.status == "failed":
        yield (
            f"the overfit check reached a loss of only {report.overfit.loss:.4f}: the optimiser or "
            "the gradients may be wrong"
        )


def _is_running(folder: RunFolder) -> bool:
    try:
        with ownership.exclusive(folder.owner_lock, f"run {folder.name} is running"):
            return False
    except RunIsBusy:
        return True


def _all_but_the_seed(settings: Settled) -> str:
    named = resuming.compared(settings.model_dump(mode="json"))
    sharding = {"ranks": settings.ranks, "zero_stage": settings.training.zero_stage}
    if settings.training.shard_group:
        sharding["shard_group"] = settings.training.shard_group
    if settings.training.reshard_group:
        sharding["reshard_group"] = settings.training.reshard_group
    others = {name: str(value) for name, value in named.items() if name != "seed"}
    return artifacts.fingerprint(others | sharding)
