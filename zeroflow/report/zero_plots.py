"""Plots of the ZeRO laboratory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zeroflow.lab.collectives import GATHER, SCATTER, SUM
from zeroflow.lab.record import SlowLinks, StagePair, ZeroLab
from zeroflow.lab.study import Study
from zeroflow.lab.tensors import PARTS
from zeroflow.lab.timeline import LANES, Lane
from zeroflow.report.plots import new_figure, save
from zeroflow.run_folder import RunFolder
from zeroflow.tracking.colours import DISTINCT, OKABE_ITO

_COLOURS = dict(zip(PARTS, DISTINCT, strict=False))

_LANES: dict[Lane, str] = {
    "forward": "#56B4E9",
    "backward": "#0072B2",
    "optimizer": "#009E73",
    "compute": "#0072B2",
    "gather": "#E69F00",
    "reduce": "#D55E00",
}
"""Colours: communication is orange and red."""


def draw(study: Study, folder: RunFolder) -> list[Path]:
    """Draw all plots of a study."""
    lab = study.lab
    slow = lab.slow_links
    over_links = [bandwidth(slow, lab.ranks, folder.zero_bandwidth_plot)] if slow else []
    return [
        *over_links,
        memory(lab, folder.zero_memory_plot),
        traffic(lab, folder.zero_traffic_plot),
        timelines(study, folder.zero_timeline_plot),
        losses(study, folder.zero_losses_plot),
    ]


def memory(lab: ZeroLab, path: Path) -> Path:
    """Draw the parts of each stage's memory as stacked bars, and marks at the predicted sums.

    Parts are not largest at the same moment, so the peak is lower than the bar.
    """
    figure, axes = new_figure(f"memory of a rank, {lab.ranks} ranks", "ZeRO stage", "")
    most = max(sum(one.memory[part].measured for part in PARTS) for one in lab.stages)
    divisor, unit = _unit(most)
    axes.set_ylabel(unit)
    names, bottoms = [one.name for one in lab.stages], [0.0] * len(lab.stages)
    for part in PARTS:
        sizes = [one.memory[part].measured / divisor for one in lab.stages]
        axes.bar(names, sizes, bottom=bottoms, color=_COLOURS[part], label=part, width=0.6)
        bottoms = [bottom + size for bottom, size in zip(bottoms, sizes, strict=True)]
    foreseen = [sum(one.memory[part].predicted for part in PARTS) / divisor for one in lab.stages]
    axes.plot(names, foreseen, "kx", label="predicted sum")
    peaks = [one.memory["peak"].measured / divisor for one in lab.stages]
    places = range(len(names))
    ends = [place - 0.35 for place in places], [place + 0.35 for place in places]
    axes.hlines(peaks, *ends, color="black", label="measured peak")
    _legend_outside(figure, axes)
    return save(figure, path)


def traffic(lab: ZeroLab, path: Path) -> Path:
    """Draw the bytes of each stage's collectives as stacked bars."""
    figure, axes = new_figure(f"collectives of a step, {lab.ranks} ranks", "ZeRO stage", "")
    kinds = (GATHER, SCATTER, SUM)
    most = max(sum(c.bytes for c in one.collectives.values()) for one in lab.stages)
    divisor, unit = _unit(most)
    axes.set_ylabel(unit)
    names, bottoms = [one.name for one in lab.stages], [0.0] * len(lab.stages)
    for kind, colour in zip(kinds, OKABE_ITO, strict=False):
        counted = [one.collectives.get(kind) for one in lab.stages]
        sizes = [found.bytes / divisor if found else 0.0 for found in counted]
        axes.bar(names, sizes, bottom=bottoms, color=colour, label=kind.replace("_", "-"))
        bottoms = [bottom + size for bottom, size in zip(bottoms, sizes, strict=True)]
    _legend_outside(figure, axes)
    return save(figure, path)


def timelines(study: Study, path: Path) -> Path:
    """Draw a step of each stage: what rank 0 computes, and the collectives in progress."""
    stages = study.lab.stages
    figure, rows = new_figure(
        "a step of rank 0", "milliseconds", "", size=(9, 1 + 1.2 * len(stages)), rows=len(stages)
    )
    used = {span.lane for one in study.measurements for span in one.spans}
    for axes, stage, found in zip(_listed(rows), stages, study.measurements, strict=True):
        for lane in LANES:
            bars = [
                (1000 * span.begin, 1000 * (span.end - span.begin))
                for span in found.spans
                if span.lane == lane
            ]
            height = (0, 0.9) if lane in ("gather", "reduce") else (1, 0.9)
            axes.broken_barh(bars, height, color=_LANES[lane], label=lane)
        axes.set_yticks([0.45, 1.45], ["collectives", "computation"])
        axes.set_ylabel(f"stage {stage.name}")
    handles, labels = _listed(rows)[0].get_legend_handles_labels()
    shown = [(h, name) for h, name in zip(handles, labels, strict=True) if name in used]
    figure.legend(*zip(*shown, strict=True), loc="outside lower center", ncols=len(shown))
    return save(figure, path)


def losses(study: Study, path: Path) -> Path:
    """Draw how far the loss of each stage is from that of one rank, at every step."""
    lab = study.lab
    figure, axes = new_figure(
        f"difference of the loss from one rank, {lab.precision}", "step", "nats per token"
    )
    for stage, found, colour in zip(lab.stages, study.measurements, DISTINCT, strict=False):
        pairs = zip(found.losses, study.one_rank.losses, strict=True)
        off = [abs(ours - theirs) for ours, theirs in pairs]
        axes.plot(
            range(1, len(off) + 1), off, color=colour, marker=".", label=f"stage {stage.name}"
        )
    axes.axhline(lab.noise_floor, color="#888888", linestyle="--", label="noise floor")
    axes.axhline(lab.tolerance, color="#888888", linestyle=":", label="tolerance")
    _legend_outside(figure, axes)
    return save(figure, path)


def bandwidth(found: SlowLinks, ranks: int, path: Path) -> Path:
    """Draw measured and predicted times of a step against the bandwidth of a rank.

    Below, if stages were compared: how much slower the others are than the first, the lines through
    these differences, and the interval in which two stages are equally fast.
    """
    from matplotlib.ticker import LogLocator  # it takes a second

    first = found.links[0].stages[0].stage
    pairs = [pair for pair in found.pairs if pair.stage == first]
    rows = 2 if pairs else 1
    title = f"a step over links of limited bandwidth, {ranks} ranks"
    figure, drawn = new_figure(title, "Gbit/s", "milliseconds", size=(8, 1 + 3 * rows), rows=rows)
    upper, *lower = _listed(drawn)
    limited = sorted((link for link in found.links if link.gbps), key=lambda link: link.gbps or 0)
    x = [link.gbps for link in limited]
    colours = dict(zip([one.stage for one in limited[0].stages], DISTINCT, strict=False))
    for number, (stage, colour) in enumerate(colours.items()):
        times = [link.stages[number] for link in limited]
        measured = [
            (link.gbps, 1000 * one.step_seconds)
            for link, one in zip(limited, times, strict=True)
            if one.step_seconds
        ]
        if measured:
            upper.plot(
                *zip(*measured, strict=True),
                color=colour,
                marker="o",
                linestyle="none",
                label=f"stage {stage}",
            )
        predicted = [1000 * one.predicted_step_seconds for one in times]
        upper.plot(x, predicted, color=colour, linestyle="--", label=f"stage {stage}, predicted")
    upper.set_yscale("log")
    upper.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    upper.yaxis.set_major_formatter("{x:,g}")
    for axes in lower:
        for pair in pairs:
            _draw_pair(axes, pair, found.compared_gbps, colours[pair.other])
        axes.axhline(0, color="#888888", linewidth=0.8)
        axes.set_ylabel(f"slower than stage {first} (ms)")
    upper.set(ylabel="milliseconds", xscale="log")
    upper.set_xticks(x, [f"{gbps:g}" for gbps in x])
    upper.minorticks_off()
    _legend_outside(figure, upper)
    return save(figure, path)


def _draw_pair(axes: Any, pair: StagePair, gbps: Sequence[float], colour: str) -> None:
    x = np.geomspace(min(gbps), max(gbps), 100)
    for line, style in ((pair.measured, "-"), (pair.predicted, "--")):
        if line is not None:
            slope = 8 * line.moved_bytes.value / 1e9
            y = 1000 * (line.computed_seconds.value + slope / x)
            axes.plot(x, y, color=colour, linestyle=style)
    if pair.measured is None:
        return
    values, low, high = (
        1000 * np.array([getattr(point, bound) for point in pair.measured.points])
        for bound in ("value", "low", "high")
    )
    errors = np.abs([values - low, high - values])
    axes.errorbar(gbps, values, errors, color=colour, marker="o", linestyle="none", capsize=3)
    if crossover := pair.measured.crossover_gbps:
        axes.axvspan(crossover.low, crossover.high, color=colour, alpha=0.15)


def _unit(most: int) -> tuple[int, str]:
    """Return a unit in which `most` bytes are a readable number, as bytes and as text."""
    return (2**30, "GiB") if most >= 2**30 else (2**20, "MiB")


def _listed(axes: Any) -> list[Any]:
    return list(getattr(axes, "flat", [axes]))


def _legend_outside(figure: Any, axes: Any) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
