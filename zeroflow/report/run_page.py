"""report.md: the page of a finished run."""

from collections.abc import Iterable, Mapping

from zeroflow.checks.check import Check
from zeroflow.checks.overfit import beyond
from zeroflow.checks.preflight import PreflightResult
from zeroflow.data.validation_sample import SampleCounts
from zeroflow.inference.evaluation import Evaluations
from zeroflow.report import evaluation_page, plan_page
from zeroflow.report.pages import Page, Part, Plot, Table, TextBlock
from zeroflow.report.plan import Plan
from zeroflow.report.records import CorpusFigures, RunReport, StageFigures, TimeFigures
from zeroflow.settings.run_config import leaves
from zeroflow.settings.settled import Settled
from zeroflow.text.markup import Markdown, bold, code, escaped, link, shortened
from zeroflow.training import goodput
from zeroflow.training.extension import Extension
from zeroflow.training.metrics import TABLE
from zeroflow.training.recovery import Entry
from zeroflow.training.workload import Workload
from zeroflow.units import count, duration, speed

_LONGEST = 500
"""Maximum number of characters of a setting, which may be a list of thousands of files."""


def page(
    report: RunReport,
    settings: Settled,
    workload: Workload,
    *,
    plan: Plan | None,
    pages: Mapping[str, str],
    evaluations: Evaluations,
) -> Page:
    """Return the page of a run.

    Args:
        pages: addresses of pages in MLflow, by subject.
    """
    folder = settings.folder
    parts: list[Part] = [Markdown(f"# {escaped(report.run)}")]
    if report.data.synthetic_fallback:
        parts.append(Markdown("> **Synthetic data replaced FineWeb-Edu.**"))
    parts += [
        Table(("", ""), _facts(report, workload, pages).items()),
        Plot(folder.loss_plot, "loss against tokens"),
        Plot(folder.overfit_plot, "loss of the overfit check"),
        *metrics_section(report.metrics),
        *evaluation_page.section(evaluations),
        *_stages_section(report.stages),
    ]
    if report.preflight:
        parts += preflight_section(report.preflight)
    parts += [
        *_time_section(report.time),
        Plot(folder.time_plot, "share of the wall time by phase"),
    ]
    if plan:
        parts += plan_page.section(plan, report.plan)
    if report.recoveries:
        parts += _recoveries_section(report.recoveries)
    parts += [Markdown("## Sample"), TextBlock(report.sample), *_settings_section(settings)]
    return Page(tuple(parts))


def preflight_section(result: PreflightResult) -> tuple[Part, ...]:
    """Return the section about the checks before training."""
    rows = [(check.name, _outcome(check), check.figure, check.sentence) for check in result.checks]
    return (
        Markdown("## Pre-flight"),
        Markdown(f"{count(len(rows), 'check')} in {result.seconds:.1f} s."),
        Table(("check", "result", "figure", "meaning"), rows),
    )


def _facts(report: RunReport, workload: Workload, pages: Mapping[str, str]) -> dict[str, str]:
    data, tokenizer, overfit = report.data, report.tokenizer, report.overfit
    facts = {
        "Model": f"{report.size}, {report.parameters:,} parameters",
        **({"Start": f"the weights of {report.init_from}"} if report.init_from else {}),
        # In three rows, because Prefect's page cuts off what is longer than about 90 characters
        "Data": f"{data.name}, {count(data.documents, 'document')}",
        "Revision": data.revision or "none",
        "Epochs": f"{data.epochs:.2f}{_coverage(data)}",
        "Tokenizer": f"{tokenizer.name}, {tokenizer.vocab_size:,} tokens",
        "Trained": f"{count(report.steps, 'step')}, {report.tokens:,} tokens",
        "Training loss": f"{report.train_loss:.4f}",
        "Expected loss": report.expected_loss.verdict,
        "Validation loss": f"{report.first_val_loss:.4f} → {report.val_loss:.4f}{_error(report)} "
        "nats per token",
        **_validated(report.validated),
        "Bits per byte": _bits_per_byte(report),
        "Speed": f"{speed(report.tokens_per_second)} on {workload.devices}, {workload.arithmetic}",
        "Pre-flight": _preflight(report.preflight),
        "Overfit check": f"{'passed' if overfit.passed else 'FAILED'}: loss {overfit.loss:.4f} "
        f"after {count(overfit.steps, 'step')}{beyond(overfit.least_loss)}",
        **_extended(report.extensions or ()),
        "Resume": report.resume,
        "Checkpoint": code(str(report.checkpoint)),
        **_skipped_checkpoints(report.skipped_checkpoints),
    }
    if pages:
        facts["MLflow"] = Markdown(", ".join(link(*item) for item in pages.items()))
    if report.entropy is not None:
        facts["Entropy of the data"] = (
            f"{report.entropy:.4f} nats per token, the loss of a model that knows the source"
        )
    if report.mfu is not None:
        facts["MFU"] = f"{report.mfu:.1%} of the {workload.peak}, (6N + 6·L·H·E·T) FLOPs per token"
    return facts


def _coverage(data: CorpusFigures) -> str:
    if data.covered is None or data.repeated is None:
        return ""
    if data.train_rows == 1:
        return f": the only training row was read{' more than once' if data.repeated else ''}"
    rows = count(data.train_rows, "training row")
    read = f"all {rows}" if data.covered == 1 else f"{data.covered:.1%} of {rows}"
    return f": {read} were read, {data.repeated:.1%} more than once"


def _extended(extensions: Iterable[Extension]) -> dict[str, str]:
    found = "; ".join(map(str, extensions))
    return {"Extension": found} if found else {}


def _skipped_checkpoints(number: int | None) -> dict[str, str]:
    if not number:
        return {}
    return {"Skipped checkpoints": f"{number}, while the one before was still being written"}


def _outcome(check: Check) -> Markdown | str:
    if not check.passed:
        return bold("FAILED")
    return bold("passed with a warning") if check.warning else "passed"


def _error(report: RunReport) -> str:
    return "" if report.val_error is None else f" ± {report.val_error:.4f} (standard error)"


def _bits_per_byte(report: RunReport) -> str:
    if report.val_bpb:
        remark = report.validated.without_unknown if report.validated else ""
        return f"{report.val_bpb:.4f}{remark}"
    if report.data.mode == "synthetic":
        return "none: synthetic data has no bytes"
    counts = report.validated
    if counts and counts.unknown:
        return "none: all scored tokens are unknown or end a document"
    return "none: all scored tokens end a document"


def _validated(counts: SampleCounts | None) -> dict[str, str]:
    if counts is None:
        return {}
    documents = count(counts.documents, "held-out document")
    rows = count(counts.rows, "row")
    return {"Validated on": f"{count(counts.tokens, 'token')} of {documents}, in {rows}"}


def _preflight(result: PreflightResult | None) -> str:
    if result is None:
        return "skipped"
    if result.passed:
        return f"passed: {count(len(result.checks), 'check')}"
    return Markdown("**FAILED**, and skipped by a later command")


def metrics_section(latest: Mapping[str, float]) -> tuple[Part, ...]:
    rows = [
        (metric.label, metric.text(latest[metric.key]))
        for metric in TABLE.values()
        if metric.key in latest
    ]
    return Markdown("## Last logged"), Table(("metric", "value"), rows)


def _stages_section(stages: Mapping[str, StageFigures]) -> tuple[Part, ...]:
    rows = [
        (name, "reused" if stage.reused else "ran", stage.why) for name, stage in stages.items()
    ]
    return (
        Markdown("## Stages"),
        Markdown("Whether the last command reused or ran each stage, and why."),
        Table(("stage", "", "why"), rows),
    )


def _time_section(time: TimeFigures) -> tuple[Part, ...]:
    rows = [
        (goodput.label(phase), f"{time.seconds[phase]:,.1f}", f"{share:.1%}")
        for phase, share in time.shares.items()
    ]
    again = f", {count(time.steps_again, 'step')} trained again" if time.restarts else ""
    return (
        Markdown("## Time"),
        Markdown(
            f"Forward pass, backward pass and optimiser took {time.goodput:.1%} of "
            f"{duration(time.wall_seconds)}. Restarts: {time.restarts}{again}. Tokens/s are "
            f"computed from the {time.training_seconds:,.1f} s of data wait, forward/backward, "
            "optimiser, communication and logging, without the first step of each process."
        ),
        Table(("phase", "seconds", "share"), rows, right=" rr"),
    )


def _recoveries_section(recoveries: Iterable[Entry]) -> tuple[Part, ...]:
    rows = [(f"{entry.step:,}", entry.reason, entry.action) for entry in recoveries]
    return Markdown("## Recoveries"), Table(("from step", "failure", "action"), rows)


def _settings_section(settings: Settled) -> tuple[Part, ...]:
    # The field of --register has another name, which pydantic does not reserve
    rows = [(name.rstrip("_"), shortened(str(value), _LONGEST)) for name, value in leaves(settings)]
    return Markdown("## Settings"), Table(("setting", "value"), rows)
