"""What a finished run says of itself: report.json, report.md and pictures."""

import logging
from pathlib import Path
from typing import Any

from zeroflow import artifacts, records
from zeroflow.checks.overfit import OverfitResult
from zeroflow.checks.preflight import PreflightResult
from zeroflow.data.shards import ShardSet
from zeroflow.device import Device
from zeroflow.records import Line
from zeroflow.report import band, pictures, plan_page
from zeroflow.report import plan as plans
from zeroflow.report.band import Band
from zeroflow.report.pages import quoted, table_cell
from zeroflow.settings.run_config import leaves
from zeroflow.settings.settled import Settled
from zeroflow.tracking import tracker
from zeroflow.tracking.store import run_facts
from zeroflow.tracking.viewer import links
from zeroflow.training import goodput, recovery
from zeroflow.training.job import TrainingJob, TrainResult
from zeroflow.training.workload import Workload
from zeroflow.units import duration, speed

log = logging.getLogger(__name__)


def write(
    run: Settled,
    job: TrainingJob,
    shards: ShardSet,
    device: Device,
    checked: PreflightResult | None,
    trained: TrainResult,
    overfit: OverfitResult,
) -> Path:
    """Write the report of a finished run into its directory and add it to MLflow.

    Args:
        checked: what the pre-flight found, if there was one.

    Returns:
        the path of report.json
    """
    folder = run.folder
    lines = records.read(folder.metrics)
    expected = band.find(job)
    loss_picture = pictures.loss_curve(job, lines, expected)
    spent = goodput.read(folder)
    time_picture = pictures.time_shares(
        {goodput.label(phase): share for phase, share in spent.shares.items()},
        folder.time_picture,
        title=f"where {duration(spent.wall)} of training went",
        good={goodput.label(phase) for phase in goodput.GOOD},
    )
    report = _figures(run, job, shards, device, trained, overfit) | {"time": _time(spent)}
    report["expected_loss"] = _compared_with_earlier_runs(expected, lines)
    report["preflight"] = checked and checked.model_dump(mode="json", exclude={"identity"})
    stages = {
        "tokenizer": job.tokenizer,
        "shards": shards,
        "pre-flight": checked,
        "training": trained,
        "overfit check": overfit,
    }
    report["stages"] = {
        name: {"reused": stage.reused, "why": stage.why} for name, stage in stages.items() if stage
    }
    compared = plans.hold(run, job, shards, trained, spent.training)
    report["plan"] = [row._asdict() | {"miss": row.miss} for row in compared]
    for row in compared:
        log.info("plan of %s: %s predicted, %s measured %s", *plan_page.cells(row))
    markdown = folder.report_page
    pages = links(folder)
    text = _markdown(report, run, job.training.workload, checked, compared, pages)
    markdown.write_text(text, encoding="utf-8")
    opened = run_facts(folder)
    report["mlflow_run_id"] = opened["run_id"] if opened else None
    artifacts.write_json(folder.report, report)  # before MLflow, which may be slow or away
    verdict = report["expected_loss"]["verdict"]
    if expected:
        log.info("expected loss: %s", verdict)
    report["mlflow_run_id"] = tracker.finish(
        job.tracking.replace(tags=job.tracking.tags | {"expected_loss": verdict}),
        folder,
        lines,
        files=[
            *(markdown, loss_picture, time_picture, folder.overfit_picture, folder.settings),
            *(folder.data_page, folder.lengths_picture),
        ],
        step=trained.steps,
        metrics={
            "loss/val_final": trained.val_loss,
            "overfit/steps": overfit.steps,
            **plans.metrics(compared),
        },
        series={"overfit/loss": overfit.curve},
        succeeded=overfit.passed,
    )
    artifacts.write_json(folder.report, report)
    return folder.report


def preflight_section(result: PreflightResult) -> str:
    """A section about the checks before training."""
    rows = "\n".join(
        f"| {check.name} | {'passed' if check.passed else '**FAILED**'} | {check.figure} | "
        f"{table_cell(check.sentence)} |"
        for check in result.checks
    )
    return (
        f"## Pre-flight\n\n{len(result.checks)} checks in {result.seconds:.1f} s.\n\n"
        f"| check | | found | |\n|---|---|---|---|\n{rows}\n\n"
    )


def _figures(
    run: Settled,
    job: TrainingJob,
    shards: ShardSet,
    device: Device,
    trained: TrainResult,
    overfit: OverfitResult,
) -> dict[str, Any]:
    work = job.training.workload
    epochs = work.batch_rows * trained.steps / shards.train.rows
    return {
        "status": "completed" if overfit.passed else "failed",
        "run": run.run_name,
        "size": run.model.name,
        "parameters": job.model.parameters,
        "steps": trained.steps,
        "tokens": trained.tokens,
        "train_loss": trained.train_loss,
        "first_val_loss": trained.first_val_loss,
        "val_loss": trained.val_loss,
        "val_bpb": trained.val_bpb,
        "entropy": shards.entropy,
        "overfit": {"passed": overfit.passed, "loss": overfit.loss, "steps": overfit.steps},
        "tokens_per_second": trained.tokens_per_second,
        "mfu": trained.mfu,
        "peak_memory_bytes": trained.peak_memory_bytes,
        "device": device.name,
        "gpus": work.ranks,
        "zero_stage": work.zero_stage,
        "precision": work.precision,
        "fp8": work.fp8,
        "resume": run.resume_promise,
        "recoveries": [entry.model_dump(mode="json") for entry in recovery.read(run.folder)],
        "data": {
            "mode": run.data.data_mode,
            "name": run.data.name,
            "revision": run.data.data_revision,
            "synthetic_fallback": run.fell_back,
            "documents": shards.documents,
            "train_rows": shards.train.rows,
            "epochs": epochs,
            "path": str(shards.path),
        },
        "tokenizer": {
            "name": job.tokenizer.name,
            "revision": run.tokenizer.tokenizer_revision,
            "vocab_size": job.tokenizer.vocab_size,
            "fingerprint": job.tokenizer.fingerprint,
        },
        "checkpoint": str(trained.checkpoint),
        "sample": trained.sample,
    }


def _told(checked: PreflightResult | None) -> str:
    if checked is None:
        return "skipped"
    if checked.passed:
        return f"passed: {len(checked.checks)} checks"
    return "**FAILED**, and was skipped then"


def _stages_section(stages: dict[str, Any]) -> str:
    rows = "\n".join(
        f"| {name} | {'reused' if stage['reused'] else 'ran'} | {table_cell(stage['why'])} |"
        for name, stage in stages.items()
    )
    return (
        "## Stages\n\nWhat the last command reused and what it ran, and why.\n\n"
        f"| stage | | why |\n|---|---|---|\n{rows}\n\n"
    )


def _compared_with_earlier_runs(expected: Band | None, lines: list[Line]) -> dict[str, Any]:
    """In words and figures."""
    if expected is None:
        return {"verdict": "unknown: no earlier run trained in the same way", "runs": []}
    found = expected.verdict(lines)
    return {"verdict": str(found), "runs": list(expected.runs), **found._asdict()}


def _time(spent: goodput.Account) -> dict[str, Any]:
    """Seconds of the wall time of training by phase, and what follows from them."""
    return {
        "wall_seconds": spent.wall,
        "training_seconds": spent.training,
        "goodput": spent.goodput,
        "seconds": spent.seconds,
        "shares": spent.shares,
        "restarts": spent.restarts,
        "steps_again": spent.steps_again,
    }


def _time_section(time: dict[str, Any], picture: Path) -> str:
    rows = "\n".join(
        f"| {goodput.label(phase)} | {time['seconds'][phase]:,.1f} | {share:.1%} |"
        for phase, share in time["shares"].items()
    )
    again = f", {time['steps_again']:,} steps trained again" if time["restarts"] else ""
    return (
        f"## Time\n\n{time['goodput']:.1%} of {duration(time['wall_seconds'])} went into forward, "
        f"backward and optimiser. Restarts: {time['restarts']}{again}. Tokens/s are over the "
        f"{time['training_seconds']:,.1f} s of data wait, forward/backward, optimiser, "
        f"communication and logging, without the first step of a process.\n\n"
        f"| phase | seconds | share |\n|---|---:|---:|\n{rows}\n\n"
        f"![share of the wall time by phase]({picture.name})\n\n"
    )


def _markdown(
    report: dict[str, Any],
    run: Settled,
    work: Workload,
    checked: PreflightResult | None,
    compared: list[plans.Compared],
    pages: dict[str, str],
) -> str:
    data, overfit = report["data"], report["overfit"]
    bpb = report["val_bpb"]
    rows = {
        "Model": f"{report['size']}, {report['parameters']:,} parameters",
        "Data": f"{data['name']}, revision {data['revision'] or 'none'}, "
        f"{data['documents']:,} documents, {data['epochs']:.2f} epochs",
        "Tokenizer": f"{report['tokenizer']['name']}, {report['tokenizer']['vocab_size']:,} tokens",
        "Trained": f"{report['steps']:,} steps, {report['tokens']:,} tokens",
        "Training loss": f"{report['train_loss']:.4f}",
        "Expected loss": report["expected_loss"]["verdict"],
        "Validation loss": f"{report['first_val_loss']:.4f} → {report['val_loss']:.4f} "
        "nats per token",
        "Bits per byte": f"{bpb:.4f}" if bpb else "none: synthetic data has no bytes",
        "Speed": f"{speed(report['tokens_per_second'])} on {work.devices}, {work.arithmetic}",
        "Pre-flight": _told(checked),
        "Overfit check": f"{'passed' if overfit['passed'] else 'FAILED'}: loss "
        f"{overfit['loss']:.4f} after {overfit['steps']} steps",
        "Resume": report["resume"],
        "Checkpoint": f"`{report['checkpoint']}`",
    }
    if pages:
        rows["MLflow"] = ", ".join(f"[{what}]({page})" for what, page in pages.items())
    if report["entropy"] is not None:
        rows["Entropy of the data"] = f"{report['entropy']:.4f} nats per token, the least possible"
    if report["mfu"] is not None:
        twice = " (that of fp8 is twice as high)" if work.fp8 else ""
        rows["MFU"] = (
            f"{report['mfu']:.1%} of the dense bf16 peak{twice}, (6N + 6·L·D·T) FLOPs a token"
        )
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    recovered = "\n".join(
        f"| {entry['step']:,} | {entry['reason']} | {entry['action']} |"
        for entry in report["recoveries"]
    )
    if recovered:
        recovered = (
            f"## Recoveries\n\n| from step | failure | action |\n|---|---|---|\n{recovered}\n\n"
        )
    warning = "> **Synthetic data stood in for FineWeb-Edu.**\n\n" if run.fell_back else ""
    plan = plans.load(run.folder)
    planned = plan_page.section(plan, compared) if plan else ""
    settings = "\n".join(f"| {name} | {table_cell(str(value))} |" for name, value in leaves(run))
    return (
        f"# {report['run']}\n\n{warning}| | |\n|---|---|\n{table}\n\n"
        f"![loss against tokens]({run.folder.loss_picture.name})\n\n"
        f"![loss of the overfit check]({run.folder.overfit_picture.name})\n\n"
        f"{_stages_section(report['stages'])}"
        f"{preflight_section(checked) if checked else ''}"
        f"{_time_section(report['time'], run.folder.time_picture)}{planned}{recovered}"
        f"## Sample\n\n{quoted(report['sample'])}\n\n"
        f"## Settings\n\n| setting | value |\n|---|---|\n{settings}\n"
    )
