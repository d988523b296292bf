"""Curves of a run as PNG files, readable on light and dark pages."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zeroflow.data.arrays import Int64Array
from zeroflow.report.band import Band
from zeroflow.report.comparison import Comparison
from zeroflow.run_folder import SweepFolder
from zeroflow.training.job import TrainingJob
from zeroflow.training.metrics import TABLE, MetricsRecord, StepRecord, ValidationRecord
from zeroflow.units import count, parameter_count

# Colours of Okabe and Ito, which colour-blind readers can distinguish
_BLUE, _ORANGE, _GREY = "#0072B2", "#E69F00", "#888888"

_DARK = "#444444"
"""Colour that is readable on grey."""

_COLOURS = (_BLUE, _ORANGE, "#009E73", "#CC79A7", "#D55E00")

_STYLES = ("-", "--", "-.", ":")

_MARKERS = (".", "s", "^", "x")

_MANY = 6
"""Maximum number of lines of a legend; a longer one would cover the curves."""

_TRAINING, _VALIDATION = TABLE["loss"], TABLE["val_loss"]
_LOSS = f"loss ({_TRAINING.unit})"


def loss_curve(job: TrainingJob, records: Sequence[MetricsRecord], expected: Band | None) -> Path:
    """Draw training and validation loss against tokens, over the band of earlier runs."""
    title = f"{job.folder.name}: {parameter_count(job.model.parameters)} parameters"
    figure, axes = _figure(title, "tokens", _LOSS)
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
    return _save(figure, job.folder.loss_picture)


def _draw_band(axes: Any, records: Sequence[MetricsRecord], band: Band) -> None:
    """Draw the run's smoothed loss over the mean of earlier runs and the band around it."""
    own, mean, width = band.expected(records)
    # In a short run, windows without a common step would interrupt the lines
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


def losses_compared(found: Comparison, folder: SweepFolder) -> list[Path]:
    """Draw validation loss of every run against tokens, FLOPs and hours, with the power law."""
    drawn = []
    shapes = list(dict.fromkeys(one.shape for one in found.runs))
    for name, label, scale in (
        ("tokens", "tokens", lambda one: 1.0),
        ("flops", "training compute (FLOPs)", lambda one: one.flops_per_token),
        ("hours", "training time (hours)", lambda one: one.seconds / one.tokens / 3600),
    ):
        title = f"validation loss by {label.partition(' (')[0]}"
        figure, axes = _figure(title, label, _LOSS)
        by_flops = name == "flops"
        drawn_of = Counter[str]()
        for one in found.runs:
            # A logarithmic axis has no zero
            points = [(t * scale(one), loss) for t, loss in one.curve if t or not by_flops]
            marker, style = divmod(drawn_of[one.shape], len(_STYLES))
            axes.plot(
                [x for x, _ in points],
                [loss for _, loss in points],
                color=_COLOURS[shapes.index(one.shape) % len(_COLOURS)],
                linestyle=_STYLES[style],
                marker=_MARKERS[marker % len(_MARKERS)],
                label=one.run,
            )
            drawn_of[one.shape] += 1
        if by_flops:
            axes.set_xscale("log")
        if by_flops and found.law is not None:
            ends = [one.flops for one in found.runs]
            ends += [found.next_size.flops] if found.next_size else []
            span = np.geomspace(min(ends), max(ends), 50)
            law = [found.law.loss(flops) for flops in span]
            axes.plot(span, law, color=_GREY, linestyle=":", label=f"C^{-found.law.b:.3f}")
        if len(found.runs) <= _MANY:
            axes.legend(fontsize="small")
        else:
            height = max(4, 0.2 * len(found.runs))
            figure.set_size_inches(10, height)
            figure.legend(loc="outside right upper", fontsize="small")
        drawn.append(_save(figure, folder.loss_picture(name)))
    return drawn


def resume_curves(
    undisturbed: Sequence[MetricsRecord],
    killed: Sequence[MetricsRecord],
    path: Path,
    *,
    kills: list[int],
) -> Path:
    """Draw the losses of an undisturbed and a killed training, the second dashed over the first.

    Args:
        kills: steps at which the second was killed.
    """
    figure, axes = _figure("killed and undisturbed training", "step", _LOSS)
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
    return _save(figure, path)


def overfit_curve(curve: list[float], path: Path, *, limit: float, least: float = 0.0) -> Path:
    """Draw the loss of the overfit check against its steps.

    Args:
        limit: loss that the check had to reach.
        least: least loss that a model can reach on the batch.
    """
    figure, axes = _figure("overfit check: loss of one fixed batch", "step", _LOSS)
    axes.semilogy(range(1, len(curve) + 1), curve, color=_BLUE, label="loss")
    axes.axhline(limit, color=_ORANGE, linestyle="--", label=f"limit {limit:.4g}")
    if least:
        axes.axhline(least, color=_GREY, linestyle=":", label=f"least possible {least:.4g}")
    axes.legend()
    return _save(figure, path)


def time_shares(shares: dict[str, float], path: Path, *, title: str, good: set[str]) -> Path:
    """Draw a bar for each phase of the wall time; the `good` ones have another colour."""
    figure, axes = _figure(title, "share of the wall time (%)", "")
    names, percent = list(shares), [100 * share for share in shares.values()]
    bars = axes.barh(names, percent, color=[_BLUE if name in good else _ORANGE for name in names])
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    return _save(figure, path)


def document_lengths(lengths: Int64Array, path: Path, *, row_tokens: int) -> Path:
    """Draw a histogram of document lengths in tokens, with the length of a row."""
    figure, axes = _figure("documents by length", "tokens", "documents")
    edges = np.geomspace(1, max(2, int(lengths.max())) + 1, 60)
    axes.hist(lengths, bins=edges, color=_BLUE)
    axes.axvline(row_tokens, color=_ORANGE, linestyle="--", label=f"a row, {row_tokens:,} tokens")
    axes.set_xscale("log")
    axes.legend()
    return _save(figure, path)


def _figure(title: str, x: str, y: str) -> tuple[Any, Any]:
    # Not pyplot, which has global state and looks for a display
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    # With a margin: on a dark page, the picture is a white box
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(7, 4), dpi=110, layout=layout, facecolor="white")
    axes = figure.subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, format="png")
    return path
