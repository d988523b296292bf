"""Writes the report of a finished run: report.json, report.md and plots, also to MLflow."""

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from zeroflow.checks.overfit import OverfitResult
from zeroflow.checks.preflight import PreflightResult
from zeroflow.data.part_counts import row_bytes
from zeroflow.data.shards import ShardSet
from zeroflow.estimate import history
from zeroflow.estimate.history import Figures, Past
from zeroflow.inference import evaluation
from zeroflow.inference.evaluation import Evaluation
from zeroflow.report import band, plan_page, plots, run_page
from zeroflow.report import plan as plans
from zeroflow.report.band import Band
from zeroflow.report.page_text import as_html
from zeroflow.report.pages import Page, never_fatal
from zeroflow.report.plan import Plan
from zeroflow.report.records import (
    CorpusFigures,
    ExpectedLoss,
    OverfitFigures,
    RunReport,
    StageFigures,
    TimeFigures,
    TokenizerFigures,
    WorkloadFigures,
)
from zeroflow.report.registration import evaluation_scores, tracking_of
from zeroflow.run_folder import RunFolder
from zeroflow.settings import existing
from zeroflow.settings.settled import Settled
from zeroflow.tracking import models, others, tracker
from zeroflow.tracking.store import RunIds, run_ids
from zeroflow.tracking.tracker import Point
from zeroflow.tracking.viewer import links
from zeroflow.training import goodput, metrics, recovery
from zeroflow.training.events import EVENTS, CheckpointSkipped, Saved
from zeroflow.training.extension import extensions
from zeroflow.training.goodput import Account
from zeroflow.training.job import TrainingJob, TrainResult, read_job
from zeroflow.training.metrics import METRICS, MetricsRecord
from zeroflow.training.recovery import Entry
from zeroflow.units import duration

log = logging.getLogger(__name__)


class Finished(NamedTuple):
    """A finished run with the results of its stages."""

    settings: Settled
    job: TrainingJob
    shards: ShardSet
    checked: PreflightResult | None
    """None if there was no pre-flight."""

    trained: TrainResult
    overfit: OverfitResult


class Logs(NamedTuple):
    """Records of training in the run's folder."""

    plan: Plan | None
    """None if it was started by a version without plans."""

    job: TrainingJob
    """The job as it was trained, with the changes of the ledger."""

    recoveries: list[Entry]
    metrics: Sequence[MetricsRecord]
    last_metrics: Mapping[str, float]
    """Last logged value of every metric, by its key in MLflow."""

    skipped_checkpoints: int
    """Number of due checkpoints that were skipped and not saved later."""

    time: Account
    measured: Figures
    """Measured figures, to compare with the plan."""

    mlflow: RunIds | None
    pages: Mapping[str, str]
    """Addresses of pages in MLflow, by subject."""


def write(run: Finished, show: Callable[[Page], None]) -> Path:
    """Write the report of a finished run into its folder, show it, and add it to MLflow.

    Returns:
        The path of report.json.
    """
    folder = run.settings.folder
    expected = band.find(run.job)
    logs = _read(run)
    report = _gather(run, logs, expected)
    _log(report, logs.plan)
    # Before the pages, which may fail, and before MLflow, which may be slow or unreachable
    report.write(folder.report)
    with never_fatal("report"):
        _draw(run, report, logs.metrics, expected)
        workload = run.job.training.workload
        page = run_page.page(
            report,
            run.settings,
            workload,
            plan=logs.plan,
            pages=logs.pages,
            evaluations=evaluation.read(folder),
        )
        page.write(folder.report_page)
        show(page)
    report.replace(mlflow_run_id=_record(run, report, logs)).write(folder.report)
    return folder.report


def add_evaluation(folder: RunFolder, found: Evaluation) -> None:
    """Show an evaluation on the page of its run, and add it to MLflow."""
    job = read_job(folder)
    with never_fatal("report"):
        if (report := RunReport.read_if_exists(folder.report)) is not None:
            run_page.page(
                report,
                existing.load(folder.cache.path, folder.name),
                job.training.workload,
                plan=plans.load(folder),
                pages=links(folder),
                evaluations=evaluation.read(folder),
            ).write(folder.report_page)
    tracking, scores = tracking_of(job), list(evaluation_scores(found, job))
    points = [Point(score.key, score.value, found.step, score.time) for score in scores]
    if tracker.add_evaluation(tracking, folder, points, folder.evaluation, _html(folder)):
        models.add_scores(tracking, folder, found.step, scores)


def _html(folder: RunFolder) -> dict[str, str]:
    """Return the pages of a run as HTML, by file name."""
    return {
        page.with_suffix(".html").name: as_html(page, f"{folder.name}: {page.stem}")
        for page in (folder.report_page, folder.data_page)
        if page.exists()
    }


def _read(run: Finished) -> Logs:
    folder, trained = run.settings.folder, run.trained
    plan, records, time = plans.load(folder), METRICS.read(folder.metrics), goodput.read(folder)
    events = EVENTS.read(folder.events)
    saved = {event.step: event.seconds for event in events if isinstance(event, Saved)}
    skipped = {event.step for event in events if isinstance(event, CheckpointSkipped)}
    seconds = [each for each in saved.values() if each is not None]
    # The plan of an extension is for its own steps. If it has only one step, its speed is unknown
    own = goodput.read(folder, after=plan.steps_done if plan else 0)
    own = own if own.steps else time
    return Logs(
        plan=plan,
        job=recovery.current(run.job),
        recoveries=recovery.read(folder),
        metrics=records,
        last_metrics=metrics.latest(records),
        skipped_checkpoints=len(skipped - saved.keys()),
        time=time,
        mlflow=run_ids(folder),
        pages=links(folder),
        measured=Figures(
            tokens_per_second=(
                own.steps * run.job.training.workload.batch_tokens / own.training
                if own.steps
                else trained.tokens_per_second
            ),
            seconds=own.training,
            memory_bytes=trained.peak_memory_bytes,
            shard_bytes=row_bytes(run.shards),
            checkpoint_bytes=sum(file.stat().st_size for file in trained.checkpoint.glob("*")),
            checkpoint_seconds=statistics.median(seconds) if seconds else None,
        ),
    )


def _gather(run: Finished, logs: Logs, expected: Band | None) -> RunReport:
    settings, job, shards, _, trained, overfit = run
    return RunReport(
        **dict(WorkloadFigures.of(job.training.workload)),
        status="completed" if overfit.passed else "failed",
        run=settings.run_name,
        size=settings.model.name,
        init_from=settings.model.init_from,
        parameters=job.model.parameters,
        steps=trained.steps,
        tokens=trained.tokens,
        train_loss=trained.train_loss,
        first_val_loss=trained.first_val_loss,
        val_loss=trained.val_loss,
        val_error=trained.val_error,
        val_bpb=trained.val_bpb,
        validated=trained.validated,
        entropy=shards.entropy,
        overfit=OverfitFigures(
            passed=overfit.passed,
            loss=overfit.loss,
            steps=overfit.steps,
            least_loss=overfit.least_loss,
        ),
        tokens_per_second=trained.tokens_per_second,
        mfu=trained.mfu,
        peak_memory_bytes=trained.peak_memory_bytes,
        resume=settings.resume_promise,
        recoveries=logs.recoveries,
        data=_corpus(run, logs.job),
        tokenizer=TokenizerFigures(
            name=job.tokenizer.name,
            revision=settings.tokenizer.tokenizer_revision,
            vocab_size=job.tokenizer.vocab_size,
            fingerprint=job.tokenizer.fingerprint,
        ),
        checkpoint=trained.checkpoint,
        skipped_checkpoints=logs.skipped_checkpoints,
        sample=trained.sample,
        time=_time(logs.time),
        expected_loss=_expected_loss(expected, logs.metrics),
        preflight=run.checked and run.checked.replace(identity=None),
        stages=_stages(run),
        extensions=list(extensions(job.training.schedule)) or None,
        plan=plans.compared(logs.plan.predicted, logs.measured) if logs.plan else [],
        metrics=logs.last_metrics,
        mlflow_run_id=logs.mlflow and logs.mlflow.run_id,
    )


def _corpus(run: Finished, job: TrainingJob) -> CorpusFigures:
    settings, shards = run.settings, run.shards
    coverage = job.order.coverage(run.trained.steps)
    return CorpusFigures(
        mode=settings.data.data_mode,
        name=settings.data.name,
        revision=settings.data.data_revision,
        synthetic_fallback=settings.fell_back,
        documents=shards.documents,
        train_rows=shards.train.rows,
        epochs=coverage.epochs,
        covered=coverage.covered,
        repeated=coverage.repeated,
        path=shards.path,
    )


def _time(time: Account) -> TimeFigures:
    return TimeFigures(
        wall_seconds=time.wall,
        training_seconds=time.training,
        goodput=time.goodput,
        seconds=dict(time.seconds),
        shares=dict(time.shares),
        restarts=time.restarts,
        steps_again=time.steps_again,
    )


def _expected_loss(expected: Band | None, records: Sequence[MetricsRecord]) -> ExpectedLoss:
    if expected is None:
        return ExpectedLoss()
    found = expected.verdict(records)
    return ExpectedLoss(verdict=str(found), runs=expected.runs, **found.model_dump())


def _stages(run: Finished) -> dict[str, StageFigures]:
    stages = {
        "tokenizer": run.job.tokenizer,
        "shards": run.shards,
        "pre-flight": run.checked,
        "training": run.trained,
        "overfit check": run.overfit,
    }
    return {
        name: StageFigures(reused=stage.reused, why=stage.why)
        for name, stage in stages.items()
        if stage
    }


def _log(report: RunReport, plan: Plan | None) -> None:
    for line in plan_page.compared_lines(report.plan, plan):
        log.info("%s", line)
    if report.expected_loss.runs:
        log.info("expected loss: %s", report.expected_loss.verdict)


def _draw(
    run: Finished, report: RunReport, records: Sequence[MetricsRecord], expected: Band | None
) -> None:
    plots.loss_curve(run.job, records, expected)
    time = report.time
    plots.time_shares(
        {goodput.label(phase): share for phase, share in time.shares.items()},
        run.settings.folder.time_plot,
        title=f"{duration(time.wall_seconds)} of training by phase",
        good={goodput.label(phase) for phase in goodput.GOOD},
    )


def _record(run: Finished, report: RunReport, logs: Logs) -> str | None:
    """Add the run to the history of the cache, and its report to MLflow.

    Returns:
        The id of the MLflow run; None after a failure.
    """
    folder, tracking = run.settings.folder, run.job.tracking
    ending = tracker.RunEnd(
        files=[
            *(folder.loss_plot, folder.time_plot, folder.overfit_plot),
            *(folder.settings, folder.lengths_plot),
        ],
        pages=_html(folder),
        series={"overfit/loss": run.overfit.curve},
        succeeded=report.overfit.passed,
    )
    if logs.plan:
        past = Past(
            run=report.run,
            steps=report.steps,
            workload=logs.job.training.workload,
            predicted=logs.plan.predicted,
            measured=logs.measured,
        )
        history.append(run.settings.cache_dir, past)
    points = list(metrics.points(logs.metrics))
    others.finish(tracking, folder, points)
    tags = tracking.tags | {"expected_loss": report.expected_loss.verdict}
    return tracker.finish(tracking.replace(tags=tags), folder, points, ending)
