"""Curves of a run as PNG files, readable on light and dark pages."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from zeroflow.data.arrays import Int64Array
from zeroflow.report.band import Band
from zeroflow.report.comparison import Comparison, Group
from zeroflow.report.outcome import Measure, Outcome
from zeroflow.run_folder import SweepFolder
from zeroflow.tracking.colours import DISTINCT, OKABE_ITO
from zeroflow.training.job import TrainingJob
from zeroflow.training.metrics import TABLE, MetricsRecord, StepRecord, ValidationRecord
from zeroflow.units import count, parameter_count

_BLUE, _ORANGE, *_ = OKABE_ITO

_GREY = "#888888"

_DARK = "#444444"
"""Colour that is readable on grey."""

_STYLES = ("-", "--", "-.", ":")
"""Line styles, used in turn when the colours of a plot repeat."""

_MARKERS = (".", "s", "^", "x")
"""Markers of runs with the same colour."""

_MANY = 6
"""Maximum number of lines of a legend inside the axes; a longer one would cover the curves."""

_TRAINING, _VALIDATION = TABLE["loss"], TABLE["val_loss"]
_LOSS = f"loss ({_TRAINING.unit})"


def loss_curve(job: TrainingJob, records: Sequence[MetricsRecord], expected: Band | None) -> Path:
    """Draw training and validation loss against tokens, over the band of earlier runs."""
    title = f"{job.folder.name}: {parameter_count(job.model.parameters)} parameters"
    figure, axes = new_figure(title, "tokens", _LOSS)
    train = [(r.tokens, r.loss) for r in records if isinstance(r, StepRecord)]
    held_out = [(r.tokens, r.val_loss) for r in records if isinstance(r, ValidationRecord)]
    faint = 0.4 if expected else 1
    axes.plot(*zip(*train, strict=True), color=_BLUE, label=_TRAINING.label, alpha=faint)
    if expected is not None:
        _draw_band(axes, records, expected)
    axes.plot(*zip(*held_out, strict=True), color=_ORANGE, marker="o", label=_VALIDATION.label)
    entropy = job.shards.entropy
    if entropy is not None:
        axes.axhline(entropy, color=_GREY, linestyle=":", label=f"entropy {entropy:.3f}")
    axes.legend()
    return save(figure, job.folder.loss_plot)


def _draw_band(axes: Any, records: Sequence[MetricsRecord], band: Band) -> None:
    """Draw the run's smoothed loss over the mean of earlier runs and the band around it."""
    own, mean, width = band.expected(records)
    # Windows without a common step, as in short runs, are left out, so that lines are not broken
    there = ~np.isnan(mean)
    x, runs = band.middles, count(len(band.runs), "earlier run")
    edged = there & ~np.isnan(width)
    if edged.any():
        edges = ((mean - width)[edged], (mean + width)[edged])
        label = "95 % of such runs stay inside"
        axes.fill_between(x[edged], *edges, color=_GREY, alpha=0.35, linewidth=0, label=label)
    axes.plot(x[there], mean[there], color=_DARK, linestyle="--", label=f"mean of {runs}")
    so_far = ~np.isnan(own)
    label = f"training, mean over {100 / len(own):g} % of the run"
    axes.plot(x[so_far], own[so_far], color=_BLUE, marker=".", label=label)


Scale = Callable[[Outcome], float]
"""Returns the length of one token of a run on the x axis."""


def losses_compared(found: Comparison, folder: SweepFolder) -> list[Path]:
    """Draw the validation loss of every run against tokens, FLOPs and hours, with the power law.

    Runs that differ only in their seeds are drawn faintly, under their mean.
    """
    axis_labels: dict[str, tuple[str, Scale]] = {
        "tokens": ("tokens", lambda one: 1.0),
        "flops": ("training compute (FLOPs)", lambda one: one.flops_per_token),
        "hours": ("training time (hours)", _hours_of_a_token),
    }
    drawn = []
    for name, (label, scale) in axis_labels.items():
        title = f"validation loss by {label.partition(' (')[0]}"
        loss = TABLE[found.measure].label if found.measure == "val_bpb" else _LOSS
        figure, axes = new_figure(title, label, loss)
        by_flops = name == "flops"
        for number, group in enumerate(found.groups):
            # A logarithmic axis has no zero
            _draw_group(axes, group, found.measure, scale, number, after=0 if by_flops else -1)
        if by_flops:
            axes.set_xscale("log")
            _draw_law(axes, found)
        lines = len(axes.get_legend_handles_labels()[1])
        if lines > _MANY:
            figure.set_size_inches(10, max(4, 0.2 * lines))
            figure.legend(loc="outside right upper", fontsize="small")
        elif lines:
            axes.legend(fontsize="small")
        drawn.append(save(figure, folder.loss_plot(name)))
    return drawn


def _hours_of_a_token(one: Outcome) -> float:
    return 1 / one.tokens_per_second / 3600 if one.tokens_per_second else 0.0


def _draw_group(
    axes: Any, group: Group, measure: Measure, scale: Scale, number: int, *, after: int
) -> None:
    """Draw runs that differ only in their seeds, in the same colour and style.

    Args:
        number: number of the group in the plot.
        after: points up to this number of tokens are not drawn.
    """
    style, colour = divmod(number, len(DISTINCT))
    look = {"color": DISTINCT[colour], "linestyle": _STYLES[style % len(_STYLES)]}
    mean = [(tokens, value) for tokens, value in group.curve(measure) if tokens > after]
    for marker, one in enumerate(group.runs):
        points = [(tokens, value) for tokens, value in one.points(measure) if tokens > after]
        ended = "" if one.status == "completed" else f" ({one.status})"
        shown = {"marker": _MARKERS[marker % len(_MARKERS)], "label": f"{one.run}{ended}"}
        faint = {"alpha": 0.35, "linewidth": 0.8}
        axes.plot(
            [tokens * scale(one) for tokens, _ in points],
            [value for _, value in points],
            **look,
            **(faint if mean else shown),
        )
    if mean:
        each = fmean(map(scale, group.completed))
        x, y = [tokens * each for tokens, _ in mean], np.array([value for _, value in mean])
        low, high = y[:, 0] - y[:, 1], y[:, 0] + y[:, 1]
        axes.fill_between(x, low, high, color=DISTINCT[colour], alpha=0.15, linewidth=0)
        label = f"{group.name}: mean of {count(len(group.completed), 'seed')}"
        axes.plot(x, y[:, 0], **look, marker=".", label=label)


def _draw_law(axes: Any, found: Comparison) -> None:
    """Draw the power law up to the next size, with its prediction interval."""
    if (law := found.law) is None:
        return
    ends = [*law.flops, *([found.next_size.flops] if found.next_size else [])]
    span = np.geomspace(min(ends), max(ends), 25).tolist()
    floor = f"{law.floor:.3g} + " if law.has_floor else ""
    label = f"{floor}A · C^{-law.b:.3f}"
    axes.plot(span, [law.loss(flops) for flops in span], color=_GREY, linestyle=":", label=label)
    edges = [edge for flops in span if (edge := law.interval(flops))]
    if edges:
        limits = axes.get_ylim()  # restored below: a wide interval would flatten the curves
        low, high = zip(*edges, strict=True)
        label = "95 % of such runs"
        axes.fill_between(span, low, high, color=_GREY, alpha=0.15, linewidth=0, label=label)
        axes.set_ylim(limits)


def resume_curves(
    undisturbed: Sequence[MetricsRecord],
    killed: Sequence[MetricsRecord],
    path: Path,
    *,
    kills: list[int],
) -> Path:
    """Draw the losses of an undisturbed run, and dashed over them those of a killed run.

    Args:
        kills: steps at which the second run was killed.
    """
    figure, axes = new_figure("losses of the undisturbed and the killed run", "step", _LOSS)
    for records, style, name in ((undisturbed, "-", "undisturbed"), (killed, "--", "killed")):
        for field, colour in (("loss", _BLUE), ("val_loss", _ORANGE)):
            points = [(r.step, getattr(r, field)) for r in records if hasattr(r, field)]
            axes.plot(
                *zip(*points, strict=True),
                color="black" if style == "--" else colour,
                linestyle=style,
                label=f"{TABLE[field].label}, {name}",
            )
    for number, step in enumerate(kills):
        axes.axvline(step, color=_GREY, linestyle=":", label=None if number else "kill")
    axes.legend()
    return save(figure, path)


def overfit_curve(curve: list[float], path: Path, *, limit: float, least: float = 0.0) -> Path:
    """Draw the loss of the overfit check against its steps.

    Args:
        limit: loss that the check had to reach.
        least: lowest loss that a model can reach on the batch.
    """
    figure, axes = new_figure("overfit check: loss of one fixed batch", "step", _LOSS)
    axes.semilogy(range(1, len(curve) + 1), curve, color=_BLUE, label="loss")
    axes.axhline(limit, color=_ORANGE, linestyle="--", label=f"limit {limit:.4g}")
    if least:
        axes.axhline(least, color=_GREY, linestyle=":", label=f"lowest possible {least:.4g}")
    axes.legend()
    return save(figure, path)


def time_shares(shares: dict[str, float], path: Path, *, title: str, good: set[str]) -> Path:
    """Draw a bar for each phase of the wall time; `good` phases have another colour."""
    figure, axes = new_figure(title, "share of the wall time (%)", "")
    names, percent = list(shares), [100 * share for share in shares.values()]
    bars = axes.barh(names, percent, color=[_BLUE if name in good else _ORANGE for name in names])
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    return save(figure, path)


def document_lengths(lengths: Int64Array, path: Path, *, row_tokens: int) -> Path:
    """Draw a histogram of document lengths in tokens, with the length of a row."""
    figure, axes = new_figure("documents by length", "tokens", "documents")
    edges = np.geomspace(1, max(2, int(lengths.max())) + 1, 60)
    axes.hist(lengths, bins=edges, color=_BLUE)
    axes.axvline(row_tokens, color=_ORANGE, linestyle="--", label=f"a row, {row_tokens:,} tokens")
    axes.set_xscale("log")
    axes.legend()
    return save(figure, path)


def new_figure(
    title: str, x: str, y: str, size: tuple[float, float] = (7, 4), rows: int = 1
) -> tuple[Any, Any]:
    """Return a figure and its axes: an array of them if there are several `rows`.

    Args:
        size: width and height in inches.
    """
    # pyplot is not used: it has global state and looks for a display
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    # With a margin, because on a dark page the plot is a white box
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=size, dpi=110, layout=layout, facecolor="white")
    if rows > 1:
        several = figure.subplots(rows, sharex=True)
        several[0].set_title(title)
        several[-1].set_xlabel(x)
        return figure, several
    axes = figure.subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


def save(figure: Any, path: Path) -> Path:
    """Write the plot atomically: a reader finds either the old or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png")
    return partial.replace(path)
