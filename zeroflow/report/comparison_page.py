"""comparison.md: the page of a sweep."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from zeroflow.report.comparison import Comparison, Group, Mean, Prediction
from zeroflow.report.outcome import COMPARED, Measure, Outcome
from zeroflow.report.pages import Page, Part, Plot, Table
from zeroflow.report.power_law import PowerLaw
from zeroflow.text.markup import Markdown, bold, code, escaped
from zeroflow.training.metrics import TABLE, Metric
from zeroflow.units import binary, count, duration, parameter_count, speed

_OF_GPUS = ("GPUs", "ZeRO")
"""Columns that are left out if every run has one GPU."""

_TEXT = ("run", "status", "size")
"""Columns that are aligned on the left."""

_ALWAYS = (TABLE["val_loss"].label,)
"""Columns that are shown even if all of their values are the same."""


def page(
    sweep: str,
    found: Comparison,
    *,
    plots: Sequence[Path],
    unfinished: Mapping[str, str],
    reasons: Mapping[str, str],
) -> Page:
    """Return the page of a sweep as Markdown.

    Args:
        sweep: name of the sweep, the prefix of its runs' names.
        unfinished: status of every run that is not completed, including runs without a loss.
        reasons: why runs failed, by name, as far as they recorded it.
    """
    spent = duration(sum(one.seconds for one in found.runs))
    parts: list[Part] = [
        Markdown(f"# Sweep {escaped(sweep)}"),
        Markdown(
            f"{count(len(found.runs), 'run')}, {spent} of training. "
            f"{'Their names begin' if len(found.runs) != 1 else 'Its name begins'} with "
            f"{code(f'{sweep}-')}."
        ),
        *_runs_section(sweep, found),
    ]
    if found.mixes_tokenizers:
        parts.append(
            escaped(
                "The runs have different tokenizers, so their losses are not comparable: "
                "plots and the power law show bits per byte."
            )
        )
    if unfinished:
        listed = ", ".join(f"{run} ({status})" for run, status in unfinished.items())
        named = bold(f"Not completed: {listed}")
        parts.append(Markdown(f"{named}. {_how_to_resume(unfinished)}"))
        parts += [Markdown(f"{code(run)} failed: {escaped(why)}") for run, why in reasons.items()]
    parts += _seeds_section(sweep, found.groups)
    parts += _evaluation_section(sweep, found.runs)
    parts += [Plot(plot, plot.name) for plot in plots]
    if found.law:
        sentences = _sentences(found, found.law)
        parts += [Markdown("## Power law"), *map(escaped, sentences)]
    return Page(tuple(parts))


def _how_to_resume(unfinished: Mapping[str, str]) -> str:
    advice = "To resume them, repeat the command, or retry the flow run of a worker in Prefect."
    if "failed" in unfinished.values():
        advice += " A failed run fails again if its settings are the reason."
    return advice


def _runs_section(sweep: str, found: Comparison) -> Iterator[Part]:
    """Yield the table of all runs, and a sentence about what they have in common."""
    if not found.runs:
        return
    columns: dict[str, list[str]] = {
        "run": [one.run.removeprefix(f"{sweep}-") for one in found.runs],
        "status": [one.status for one in found.runs],
        "size": [one.size for one in found.runs],
        **{metric.label: [_cell(metric, one) for one in found.runs] for metric in COMPARED},
        "extended at step": [one.extended or "never" for one in found.runs],
        "seed": [str(one.seed) for one in found.runs],
        "GPUs": [str(one.ranks) for one in found.runs],
        "ZeRO": [one.zero for one in found.runs],
        "peak rate": [f"{one.learning_rate:g}" for one in found.runs],
        "vocabulary": [f"{one.vocabulary:,}" for one in found.runs],
        "parameters": [parameter_count(one.parameters) for one in found.runs],
        "tokens": [parameter_count(one.tokens) for one in found.runs],
        "FLOPs": [f"{one.flops:.3g}" for one in found.runs],
        "time": [duration(one.seconds) for one in found.runs],
        "tokens/s": [speed(one.tokens_per_second).removesuffix(" tokens/s") for one in found.runs],
        "memory": [binary(one.peak_memory_bytes) for one in found.runs],
    }
    if all(one.ranks == 1 for one in found.runs):
        columns = {name: cells for name, cells in columns.items() if name not in _OF_GPUS}
    if not any(one.extended for one in found.runs):
        del columns["extended at step"]
    if columns["run"] == columns["size"]:
        del columns["size"]
    # Columns with equal values become a sentence: Prefect's page is too narrow for all columns
    alike = {
        column: cells[0]
        for column, cells in columns.items()
        if len(cells) > 1 and len(set(cells)) == 1 and column not in _ALWAYS
    }
    shown = {column: cells for column, cells in columns.items() if column not in alike}
    right = "".join(" " if column in _TEXT else "r" for column in shown)
    yield Table(list(shown), list(zip(*shown.values(), strict=True)), right)
    if alike:
        yield escaped(f"Common to all runs: {', '.join(map(' '.join, alike.items()))}.")


def _cell(metric: Metric, one: Outcome) -> str:
    value = one.metrics.get(metric.key)
    return "none" if value is None else format(value, metric.form)


def _seeds_section(sweep: str, groups: Sequence[Group]) -> Iterator[Part]:
    """Yield the table of means over seeds, if any setting has several."""
    several = [group for group in groups if group.mean("val_loss")]
    if not several:
        return
    yield Markdown("## Means over seeds")
    measures: tuple[Measure, ...] = ("val_loss", "val_bpb")
    rows = [
        (
            group.name.removeprefix(f"{sweep}-"),
            str(len(group.completed)),
            *(_mean_cell(group.mean(measure)) for measure in measures),
        )
        for group in several
    ]
    head = ("runs", "seeds", *(TABLE[measure].label for measure in measures))
    yield Table(head, rows, right=" rrr")
    yield escaped(
        "± is the standard deviation of a single run. A mean is over completed runs with the same "
        "settings and extensions."
    )


def _evaluation_section(sweep: str, runs: Sequence[Outcome]) -> Iterator[Part]:
    """Yield the table of scores on texts and tasks, if any run was evaluated."""
    names = list(dict.fromkeys(name for one in runs for name in one.scores))
    if not names:
        return
    yield Markdown("## Evaluation")
    rows = [
        (one.run.removeprefix(f"{sweep}-"), *(one.scores.get(name, "none") for name in names))
        for one in runs
    ]
    yield Table(("run", *names), rows, right=" " + "r" * len(names))
    yield escaped("± is the standard error.")


def _mean_cell(mean: Mean | None) -> str:
    return "none" if mean is None else f"{mean.mean:.4f} ± {mean.deviation:.4f}"


def _sentences(found: Comparison, law: PowerLaw) -> Iterator[str]:
    unit = "bits per byte" if found.measure == "val_bpb" else "nats per token"
    floor = f"{law.floor:.4g} + " if law.has_floor else ""
    yield (
        f"L = {floor}{math.exp(law.log_a):.4g} · C^{-law.b:.4f}, fitted to the best completed run "
        f"of each of {law.points} sizes. L is the loss in {unit}, C the number of FLOPs of a run."
    )
    if not law.has_floor:
        yield (
            "The floor that the loss approaches could not be fitted, which needs four sizes. Far "
            "from these sizes, the loss will be higher than this law predicts."
        )
    if law.freedom < 1:
        yield "Two sizes give no error estimate."
    else:
        yield (
            f"Intervals should contain 95 % of such runs, by Student's t with "
            f"{count(law.freedom, 'degree')} of freedom."
        )
    if found.next_size:
        sentence = f"Next size: {_described(found.next_size)}"
        yield f"{sentence}, with the same number of tokens per parameter as the largest size."
    if found.largest and found.largest.measured is not None:
        difference = found.largest.measured / found.largest.loss - 1
        yield (
            f"Test of the law: the smaller sizes alone predict {_described(found.largest)}. The "
            f"measured loss was {found.largest.measured:.4f}, a difference of {difference:+.2%}."
        )


def _described(prediction: Prediction) -> str:
    between = ""
    if prediction.interval:
        low, high = prediction.interval
        between = f" (95 % interval {low:.4f} to {high:.4f})"
    return f"{prediction.size}, {prediction.flops:.3g} FLOPs: loss {prediction.loss:.4f}{between}"
