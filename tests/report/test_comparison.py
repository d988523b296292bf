import math
from typing import Any

import pytest

from zeroflow.model.sizes import SIZES, with_vocabulary
from zeroflow.report.comparison import Comparison, Outcome, PowerLaw, compare, page
from zeroflow.report.pictures import losses_compared
from zeroflow.run_folder import SweepFolder

EXPONENT, FACTOR = 0.05, 20.0
NOTHING_ELSE = {"pictures": [], "failed": []}


def text(sweep: str, found: Comparison, **more: Any) -> str:
    return page(sweep, found, **more).linked


def law(flops: float) -> float:
    return FACTOR * flops**-EXPONENT


def outcome(
    size: str, *, loss: float | None = None, seed: int = 0, gpus: int = 1, stage: int = 0
) -> Outcome:
    """Of a run at 20 tokens a parameter that obeys the law, unless a loss is given."""
    model = with_vocabulary(SIZES[size], 32_000)
    tokens = 20 * model.parameters
    flops_per_token = model.flops_per_token(2048)
    final = law(flops_per_token * tokens) if loss is None else loss
    return Outcome(
        run=f"{size}-{seed}",
        size=size,
        seed=seed,
        learning_rate=1e-3,
        parameters=model.parameters,
        vocabulary=32_000,
        context=2048,
        flops_per_token=flops_per_token,
        tokens=tokens,
        val_loss=final,
        val_bpb=None,
        tokens_per_second=1e5,
        seconds=tokens / 1e5,
        gpus=gpus,
        zero_stage=stage,
        peak_memory_bytes=2**30,
        curve=((0, 10.4), (tokens // 2, final + 0.3), (tokens, final)),
        metrics={"loss/val": final},
    )


def test_law_is_found_again_and_foretells_what_obeys_it():
    found = compare([outcome("medium"), outcome("tiny"), outcome("small")])
    assert [one.size for one in found.runs] == ["tiny", "small", "medium"]
    assert found.law.b == pytest.approx(EXPONENT)
    assert math.exp(found.law.log_a) == pytest.approx(FACTOR)
    assert found.law.b_error == pytest.approx(0, abs=1e-6)
    assert found.largest.size == "medium"
    assert found.largest.loss == pytest.approx(found.largest.measured)
    medium = outcome("medium")
    assert found.next_size.size == "a model with 4 times the parameters of medium", (
        "no size is larger"
    )
    assert found.next_size.flops == 16 * medium.flops
    assert found.next_size.loss == pytest.approx(law(16 * medium.flops))


def test_next_size_is_foretold_at_as_many_tokens_a_parameter():
    found = compare([outcome("tiny"), outcome("small")])
    medium = outcome("medium")
    assert found.next_size.size == "medium"
    assert found.next_size.flops == pytest.approx(medium.flops)
    assert found.next_size.loss == pytest.approx(medium.val_loss)
    assert found.next_size.factor is None and found.law.b_error is None, "two points have no error"
    assert found.largest is None


def test_shapes_of_ones_own_are_told_apart_by_their_parameters():
    own = [outcome(size).replace(run=size, size="custom") for size in ("tiny", "small", "medium")]
    found = compare(own)
    assert found.law.points == 3 and found.law.b == pytest.approx(EXPONENT)
    assert found.largest.size == "custom of 1,147.8M parameters"


def test_best_run_of_a_size_counts():
    worse = outcome("tiny", loss=9.0, seed=1)
    found = compare([worse, outcome("tiny"), outcome("small")])
    assert found.law.b == pytest.approx(EXPONENT)
    assert len(found.runs) == 3


def test_run_whose_loss_is_no_number_is_shown_and_says_nothing_of_the_law():
    broken = [outcome("tiny", loss=math.nan, seed=1), outcome("medium", loss=math.inf)]
    found = compare([*broken, outcome("tiny"), outcome("small")])
    assert found.law.b == pytest.approx(EXPONENT) and found.law.points == 2
    assert [one.run for one in found.runs] == ["tiny-0", "tiny-1", "small-0", "medium-0"]
    assert "| nan |" in text("s", found, pictures=[], failed=[])
    assert compare(broken).law is None


def test_what_all_runs_share_is_told_once():
    shown = text("s", compare([outcome("tiny"), outcome("tiny", seed=1)]), **NOTHING_ELSE)
    assert "| seed |" in shown and "| size |" not in shown and "| peak rate |" not in shown
    assert "Common to all runs: size tiny, bits per byte none, peak rate 0.001, " in shown
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1 and len(rows) == 4
    alone = text("s", compare([outcome("tiny")]), **NOTHING_ELSE)
    assert "| size |" in alone and "Common to all runs" not in alone


def test_errors_are_those_of_least_squares():
    flops = [1e15, 1e16, 1e17, 1e18]
    noise = [1.02, 0.97, 1.03, 0.99]
    fitted = PowerLaw.fitted(flops, [law(x) * n for x, n in zip(flops, noise, strict=True)])
    # by the formulas of a textbook
    x = [math.log(one) for one in flops]
    y = [math.log(law(one) * n) for one, n in zip(flops, noise, strict=True)]
    mean = sum(x) / 4
    squares = sum((one - mean) ** 2 for one in x)
    slope = sum((one - mean) * other for one, other in zip(x, y, strict=True)) / squares
    begin = sum(y) / 4 - slope * mean
    residual = sum((other - begin - slope * one) ** 2 for one, other in zip(x, y, strict=True)) / 2
    assert fitted.b == pytest.approx(-slope)
    assert fitted.b_error == pytest.approx(math.sqrt(residual / squares))
    expected = math.sqrt(residual * (1 / 4 + (math.log(1e20) - mean) ** 2 / squares))
    assert math.log(fitted.factor(1e20)) == pytest.approx(expected)


def test_law_of_losses_that_rise_says_so():
    rising = [outcome("tiny", loss=2.0), outcome("small", loss=3.0)]
    found = compare(rising)
    assert found.law.b < 0
    assert f"C^{-found.law.b:.4f}" in text("s", found, pictures=[], failed=[])


def test_one_size_has_no_law():
    found = compare([outcome("tiny"), outcome("tiny", loss=9.0, seed=1)])
    assert found.law is None and found.next_size is None
    assert "Power law" not in text("s", found, pictures=[], failed=[])


def test_page_and_pictures_tell_all_of_it(tmp_path):
    found = compare([outcome("tiny"), outcome("small"), outcome("medium")])
    drawn = losses_compared(found, SweepFolder(tmp_path))
    shown = text("s", found, pictures=drawn, failed=["s-tiny-seed7"])
    assert "| small-0 | small | " in shown and "**Not finished: s-tiny-seed7**" in shown
    assert f"C^-{EXPONENT:.4f}" in shown and "Test of the law" in shown and "+0.00%" in shown
    assert [path.name for path in drawn] == [
        "loss-by-tokens.png",
        "loss-by-flops.png",
        "loss-by-hours.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    found.write(tmp_path / "comparison.json")
    assert Comparison.read(tmp_path / "comparison.json") == found


def test_runs_are_told_apart_and_the_legend_hides_none(tmp_path, figures):
    sizes = ("tiny", "small", "medium")
    losses_compared(
        compare([outcome(size, seed=n) for size in sizes for n in range(6)]), SweepFolder(tmp_path)
    )
    for figure in figures:
        figure.draw_without_rendering()
        [axes], [legend] = figure.axes, figure.legends
        lines = [line for line in axes.lines if line.get_label()[0] != "C"]
        looks = {(x.get_color(), x.get_linestyle(), x.get_marker()) for x in lines}
        assert len(looks) == len(lines) == 18
        assert legend.get_window_extent().x0 >= axes.get_window_extent().x1
        if axes.get_xscale() == "log":
            assert all(x > 0 for line in lines for x in line.get_xdata())


def test_stages_of_zero_are_told_where_there_are_several_gpus():
    alone = text("s", compare([outcome("tiny"), outcome("tiny", seed=1)]), **NOTHING_ELSE)
    assert "ZeRO" not in alone and "GPUs" not in alone
    runs = [outcome("tiny"), *(outcome("tiny", gpus=2, stage=stage) for stage in (0, 3))]
    shown = text("s", compare(runs), **NOTHING_ELSE)
    head, _, *rows = [line for line in shown.splitlines() if line.startswith("|")]
    names = [cell.strip() for cell in head.split("|")]
    cells = [[cell.strip() for cell in row.split("|")] for row in rows]
    found = [(row[names.index("GPUs")], row[names.index("ZeRO")]) for row in cells]
    assert found == [("1", "none"), ("2", "0"), ("2", "3")]


def test_runs_that_are_named_after_their_sizes_need_no_column_of_those():
    runs = [outcome(size).replace(run=f"s-{size}") for size in ("tiny", "small")]
    shown = text("s", compare(runs), **NOTHING_ELSE)
    assert "| run | validation loss |" in shown and "| small | " in shown
