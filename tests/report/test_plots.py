"""Content of the plots, read from the figures that are drawn."""

import numpy as np
import pytest
from logged import step_record, validation_record
from matplotlib.colors import to_hex
from matplotlib.image import imread

from zeroflow.report import plots


def curves(figure) -> dict[str, list[tuple[float, float]]]:
    """Points of every labelled line of a figure with one panel."""
    [axes] = figure.axes
    drawn = {x.get_label(): x for x in axes.lines if not x.get_label().startswith("_")}
    return {
        label: [(float(x), float(y)) for x, y in zip(*found.get_data(), strict=True)]
        for label, found in drawn.items()
    }


def test_resume_plot_shows_both_runs_and_every_kill(tmp_path, figures):
    both = [validation_record(0, 5.0), step_record(1, 4.9)]
    undisturbed = [*both, step_record(4, 4.0), validation_record(4, 4.0)]
    killed = [*both, step_record(4, 4.5), validation_record(4, 4.6)]
    path = tmp_path / "proof.png"
    assert plots.resume_curves(undisturbed, killed, path, kills=[1, 3]) == path
    found = curves(figures[0])
    assert found["training loss, undisturbed"] == [(1, 4.9), (4, 4.0)]
    assert found["training loss, killed"] == [(1, 4.9), (4, 4.5)]
    assert found["validation loss, killed"] == [(0, 5.0), (4, 4.6)]
    kills = [x for x in figures[0].axes[0].lines if set(x.get_xdata()) in ({1}, {3})]
    assert len(kills) == 2


def test_overfit_check_shows_its_loss_from_step_1_and_the_limit(tmp_path, figures):
    plots.overfit_curve([4.0, 2.0, 0.05], tmp_path / "overfit.png", limit=0.1)
    assert curves(figures[0])["loss"] == [(1, 4.0), (2, 2.0), (3, 0.05)]
    [limit] = [x for x in figures[0].axes[0].lines if set(x.get_ydata()) == {0.1}]
    assert "0.1" in limit.get_label()
    assert figures[0].axes[0].get_yscale() == "log"
    assert len(figures[0].axes[0].lines) == 2


def test_overfit_plot_shows_the_lowest_possible_loss(tmp_path, figures):
    plots.overfit_curve([4.0, 0.3], tmp_path / "overfit.png", limit=0.316, least=0.216)
    levels = {x.get_label(): x.get_ydata()[0] for x in figures[0].axes[0].lines[1:]}
    assert levels == {"limit 0.316": 0.316, "lowest possible 0.216": 0.216}


def test_bars_are_as_long_as_their_shares_and_goodput_has_its_own_colour(tmp_path, figures):
    shares = {"start": 0.25, "forward/backward": 0.6, "optimiser": 0.15}
    good = {"forward/backward", "optimiser"}
    plots.time_shares(shares, tmp_path / "time.png", title="where it went", good=good)
    [axes] = figures[0].axes
    widths = dict(zip(shares, (bar.get_width() for bar in axes.patches), strict=True))
    assert widths == pytest.approx({name: 100 * share for name, share in shares.items()})
    colours = [to_hex(bar.get_facecolor()) for bar in axes.patches]
    assert colours[1] == colours[2] != colours[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(shares)
    bottom, top = axes.get_ylim()
    assert bottom > top, "the first phase is on top"


@pytest.mark.parametrize("lengths", [[1], [1, 1, 500, 7000], range(1, 3000)])
def test_every_document_is_in_the_histogram(lengths, tmp_path, figures):
    lengths = np.array(list(lengths))
    plots.document_lengths(lengths, tmp_path / "lengths.png", row_tokens=257)
    [axes] = figures[0].axes
    assert sum(bar.get_height() for bar in axes.patches) == len(lengths)
    [row] = [x for x in axes.lines if set(x.get_xdata()) == {257}]
    assert "257" in row.get_label()


def test_plots_have_an_opaque_background(tmp_path):
    plot = plots.overfit_curve([2.0, 1.0], tmp_path / "overfit.png", limit=0.1)
    pixels = imread(plot)
    assert (pixels[..., 3] == 1).all(), "else labels are lost on a dark page"
    assert (pixels[0, 0, :3] == 1).all()
