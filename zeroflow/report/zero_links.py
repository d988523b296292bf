"""The part of the laboratory's page about slow links."""

from statistics import fmean

from zeroflow.lab.record import Estimate, SlowLinks, StageDifference, StagePair
from zeroflow.report.pages import Part, Plot, Table
from zeroflow.run_folder import RunFolder
from zeroflow.text.markup import Markdown

_MODEL = (
    "the time without a limit, plus the additional time of the collectives, unless computation "
    "hides it. A collective takes its latency and the time of its bytes, both measured without a "
    "limit; at a lower bandwidth, its bytes need the time that the bandwidth says."
)


def parts(found: SlowLinks | None, folder: RunFolder) -> tuple[Part, ...]:
    """Return the parts about slow links; none if there is nothing about them."""
    if found is None:
        return ()
    return (
        Markdown("### Over slow links"),
        Markdown(_intro(found)),
        _times(found),
        Plot(folder.zero_bandwidth_plot, "time of a step by bandwidth"),
        *_compared(found),
    )


def _intro(found: SlowLinks) -> str:
    own = (
        f"Without a limit, the link carries {found.own_gbps:,.1f} Gbit/s in its largest collective."
    )
    if not (errors := [abs(error) for error in found.errors]):
        return (
            "Time of a step in milliseconds, predicted and not measured, because the links between "
            f"GPUs cannot be limited: {_MODEL} {own} A faster link is not predicted."
        )
    return (
        "Time of a step in milliseconds, and in brackets the prediction of a model: "
        f"{_MODEL} The error of the model is {100 * fmean(errors):.1f} % on average, and at most "
        f"{100 * max(errors):.1f} %. Times are means of the middle half of the rounds, without the "
        f"time in which a rank waited for a core. {own}"
    )


def _times(found: SlowLinks) -> Table:
    head = ("Gbit/s", *(f"stage {one.stage}" for one in found.links[0].stages))
    rows = []
    for link in found.links:
        cells = []
        for one in link.stages:
            predicted = f"({1000 * one.predicted_step_seconds:,.1f})"
            measured = one.step_seconds
            cells.append(predicted if measured is None else f"{1000 * measured:,.1f} {predicted}")
        rows.append(("no limit" if link.gbps is None else f"{link.gbps:g}", *cells))
    return Table(head, rows, "r" * len(head))


def _compared(found: SlowLinks) -> tuple[Part, ...]:
    if not found.pairs:
        return (
            Markdown(
                "The stages are not compared: this needs five steps, and two bandwidths of at most "
                f"half of what the link carries, {found.own_gbps / 2:,.1f} Gbit/s."
            ),
        )
    listed = ", ".join(f"{gbps:g}" for gbps in sorted(found.compared_gbps))
    intro = (
        "Differences of two stages in the same round, and the line through them over 1/bandwidth, "
        f"at {listed} Gbit/s, which is at most half of what the link carries: what the second "
        "stage computes longer, what a rank sends more, and where the line is 0. In brackets are "
        "95 % intervals."
    )
    rows = []
    for pair in found.pairs:
        both = (("measured", pair.measured), ("predicted", pair.predicted))
        name = f"{pair.stage} and {pair.other}"
        for kind, line in both:
            if line is not None:
                rows.append((name, kind, *_cells(pair, line)))
                name = ""
    head = ("stages", "", "computes (ms)", "sends (MB)", "equal at Gbit/s", "faster")
    return (Markdown(intro), Table(head, rows, "  rrr"))


def _cells(pair: StagePair, line: StageDifference) -> tuple[str, str, str, str]:
    crossover = line.crossover_gbps
    return (
        _scaled(line.computed_seconds, 1e3, "+.1f"),
        _scaled(line.moved_bytes, 1e-6, "+.2f"),
        _scaled(crossover, 1, ".2f") if crossover else "none",
        _faster(pair, line),
    )


def _scaled(estimate: Estimate, by: float, form: str) -> str:
    value, low, high = (by * bound for bound in (estimate.value, estimate.low, estimate.high))
    return f"{value:{form}} ({low:{form}} to {high:{form}})"


def _faster(pair: StagePair, line: StageDifference) -> str:
    by_sign = {1: pair.stage, -1: pair.other}
    below, above = (by_sign.get(end.sign) for end in (line.on_slowest, line.on_fastest))
    if below is None or above is None:
        unsure = "any" if below == above else "the lowest" if below is None else "the highest"
        return f"not decided at {unsure} bandwidth"
    if below == above:
        return f"stage {below} at every bandwidth"
    return f"stage {below} below, stage {above} above"
