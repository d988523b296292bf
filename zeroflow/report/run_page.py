"""report.md: the page of a finished run."""

from collections.abc import Iterable, Mapping

from zeroflow.checks.preflight import PreflightResult
from zeroflow.report import plan_page
from zeroflow.report.pages import quoted, table_cell
from zeroflow.report.plan import Plan
from zeroflow.report.records import RunReport, StageFigures, TimeFigures
from zeroflow.run_folder import RunFolder
from zeroflow.settings.run_config import leaves
from zeroflow.settings.settled import Settled
from zeroflow.training import goodput
from zeroflow.training.metrics import TABLE
from zeroflow.training.recovery import Entry
from zeroflow.training.workload import Workload
from zeroflow.units import duration, speed


def markdown(
    report: RunReport,
    settings: Settled,
    workload: Workload,
    *,
    plan: Plan | None,
    pages: Mapping[str, str],
) -> str:
    """Return the page of a run as Markdown.

    Args:
        pages: addresses of pages in MLflow, by their subject.
    """
    folder = settings.folder
    parts = [f"# {report.run}"]
    if report.data.synthetic_fallback:
        parts.append("> **Synthetic data stood in for FineWeb-Edu.**")
    parts += [
        _table(("", ""), _facts(report, workload, pages).items()),
        f"![loss against tokens]({folder.loss_picture.name})",
        f"![loss of the overfit check]({folder.overfit_picture.name})",
        metrics_section(report.metrics),
        _stages_section(report.stages),
    ]
    if report.preflight:
        parts.append(preflight_section(report.preflight))
    parts.append(_time_section(report.time, folder))
    if plan:
        parts.append(plan_page.section(plan, report.plan))
    if report.recoveries:
        parts.append(_recoveries_section(report.recoveries))
    parts += [f"## Sample\n\n{quoted(report.sample)}", _settings_section(settings)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def preflight_section(result: PreflightResult) -> str:
    """Return the section about the checks before training."""
    rows = (
        (check.name, "passed" if check.passed else "**FAILED**", check.figure, check.sentence)
        for check in result.checks
    )
    table = _table(("check", "", "found", ""), rows)
    return f"## Pre-flight\n\n{len(result.checks)} checks in {result.seconds:.1f} s.\n\n{table}"


def _facts(report: RunReport, workload: Workload, pages: Mapping[str, str]) -> dict[str, str]:
    data, tokenizer, overfit = report.data, report.tokenizer, report.overfit
    facts = {
        "Model": f"{report.size}, {report.parameters:,} parameters",
        "Data": f"{data.name}, revision {data.revision or 'none'}, "
        f"{data.documents:,} documents, {data.epochs:.2f} epochs",
        "Tokenizer": f"{tokenizer.name}, {tokenizer.vocab_size:,} tokens",
        "Trained": f"{report.steps:,} steps, {report.tokens:,} tokens",
        "Training loss": f"{report.train_loss:.4f}",
        "Expected loss": report.expected_loss.verdict,
        "Validation loss": f"{report.first_val_loss:.4f} → {report.val_loss:.4f} nats per token",
        "Bits per byte": f"{report.val_bpb:.4f}"
        if report.val_bpb
        else "none: synthetic data has no bytes",
        "Speed": f"{speed(report.tokens_per_second)} on {workload.devices}, {workload.arithmetic}",
        "Pre-flight": _preflight(report.preflight),
        "Overfit check": f"{'passed' if overfit.passed else 'FAILED'}: loss {overfit.loss:.4f} "
        f"after {overfit.steps} steps",
        "Resume": report.resume,
        "Checkpoint": f"`{report.checkpoint}`",
    }
    if pages:
        facts["MLflow"] = ", ".join(f"[{what}]({page})" for what, page in pages.items())
    if report.entropy is not None:
        facts["Entropy of the data"] = f"{report.entropy:.4f} nats per token, the least possible"
    if report.mfu is not None:
        facts["MFU"] = f"{report.mfu:.1%} of the {workload.peak}, (6N + 6·L·D·T) FLOPs a token"
    return facts


def _preflight(result: PreflightResult | None) -> str:
    if result is None:
        return "skipped"
    if result.passed:
        return f"passed: {len(result.checks)} checks"
    return "**FAILED**, then skipped"


def metrics_section(latest: Mapping[str, float]) -> str:
    rows = (
        (metric.label, metric.text(latest[metric.key]))
        for metric in TABLE.values()
        if metric.key in latest
    )
    return f"## Last logged\n\n{_table(('metric', 'value'), rows)}"


def _stages_section(stages: Mapping[str, StageFigures]) -> str:
    rows = (
        (name, "reused" if stage.reused else "ran", stage.why) for name, stage in stages.items()
    )
    table = _table(("stage", "", "why"), rows)
    return f"## Stages\n\nStages that the last command reused or ran, and why.\n\n{table}"


def _time_section(time: TimeFigures, folder: RunFolder) -> str:
    rows = "\n".join(
        f"| {goodput.label(phase)} | {time.seconds[phase]:,.1f} | {share:.1%} |"
        for phase, share in time.shares.items()
    )
    again = f", {time.steps_again:,} steps trained again" if time.restarts else ""
    return (
        f"## Time\n\n{time.goodput:.1%} of {duration(time.wall_seconds)} went into forward, "
        f"backward and optimiser. Restarts: {time.restarts}{again}. Tokens/s are computed from the "
        f"{time.training_seconds:,.1f} s of data wait, forward/backward, optimiser, "
        f"communication and logging, without the first step of each process.\n\n"
        f"| phase | seconds | share |\n|---|---:|---:|\n{rows}\n\n"
        f"![share of the wall time by phase]({folder.time_picture.name})"
    )


def _recoveries_section(recoveries: Iterable[Entry]) -> str:
    rows = ((f"{entry.step:,}", entry.reason, entry.action) for entry in recoveries)
    return f"## Recoveries\n\n{_table(('from step', 'failure', 'action'), rows)}"


def _settings_section(settings: Settled) -> str:
    rows = ((name, str(value)) for name, value in leaves(settings))
    return f"## Settings\n\n{_table(('setting', 'value'), rows)}"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(map(table_cell, row))} |" for row in rows]
    return "\n".join(lines)
