import math
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from zeroflow.model.sizes import SIZES, with_vocabulary
from zeroflow.report.comparison import Comparison, compare
from zeroflow.report.comparison_page import page
from zeroflow.report.outcome import Outcome
from zeroflow.report.plots import losses_compared
from zeroflow.run_folder import SweepFolder

EXPONENT, FACTOR = 0.05, 20.0
NOTHING_ELSE: dict[str, Any] = {"plots": [], "unfinished": {}, "reasons": {}}


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
        setting=f"{size} {gpus} {stage}",
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


def test_law_is_recovered_from_losses_that_obey_it_and_predicts_others():
    found = compare([outcome("medium"), outcome("tiny"), outcome("small")])
    assert [one.size for one in found.runs] == ["tiny", "small", "medium"]
    assert found.law.b == pytest.approx(EXPONENT)
    assert math.exp(found.law.log_a) == pytest.approx(FACTOR)
    assert not found.law.has_floor and found.law.freedom == 1
    assert found.largest.size == "medium"
    assert found.largest.loss == pytest.approx(found.largest.measured)
    medium = outcome("medium")
    assert found.next_size.size == "a model with 4 times the parameters of medium", (
        "no size is larger"
    )
    assert found.next_size.flops == 16 * medium.flops
    assert found.next_size.loss == pytest.approx(law(16 * medium.flops))
    assert found.next_size.interval == pytest.approx([found.next_size.loss] * 2, rel=1e-4)


def test_next_size_is_predicted_with_the_same_tokens_per_parameter():
    found = compare([outcome("tiny"), outcome("small")])
    medium = outcome("medium")
    assert found.next_size.size == "medium"
    assert found.next_size.flops == pytest.approx(medium.flops)
    assert found.next_size.loss == pytest.approx(medium.val_loss)
    assert found.next_size.interval is None, "two points have no error"
    assert found.largest is None


def test_custom_shapes_are_distinguished_by_their_parameters():
    own = [outcome(size).replace(run=size, size="custom") for size in ("tiny", "small", "medium")]
    found = compare(own)
    assert found.law.points == 3 and found.law.b == pytest.approx(EXPONENT)
    assert found.largest.size == "custom of 1,147.8M parameters"


def test_best_run_of_a_size_counts():
    worse = outcome("tiny", loss=9.0, seed=1)
    found = compare([worse, outcome("tiny"), outcome("small")])
    assert found.law.b == pytest.approx(EXPONENT)
    assert len(found.runs) == 3


def test_run_with_a_nan_loss_is_shown_but_not_fitted():
    broken = [outcome("tiny", loss=math.nan, seed=1), outcome("medium", loss=math.inf)]
    found = compare([*broken, outcome("tiny"), outcome("small")])
    assert found.law.b == pytest.approx(EXPONENT) and found.law.points == 2
    assert [one.run for one in found.runs] == ["tiny-0", "tiny-1", "small-0", "medium-0"]
    assert "| nan |" in text("s", found, **NOTHING_ELSE)
    assert compare(broken).law is None


def test_values_common_to_all_runs_are_shown_once():
    shown = text("s", compare([outcome("tiny"), outcome("tiny", seed=1)]), **NOTHING_ELSE)
    assert "| seed |" in shown and "| size |" not in shown and "| peak rate |" not in shown
    assert (
        "Common to all runs: status completed, size tiny, bits per byte none, peak rate 0.001, "
        in shown
    )
    runs, _, _ = shown.partition("## Means")
    rows = [line for line in runs.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1 and len(rows) == 4
    alone = text("s", compare([outcome("tiny")]), **NOTHING_ELSE)
    assert "| size |" in alone and "Common to all runs" not in alone


def test_law_of_losses_that_rise_says_so():
    rising = [outcome("tiny", loss=2.0), outcome("small", loss=3.0)]
    found = compare(rising)
    assert found.law.b < 0
    assert f"C^{-found.law.b:.4f}" in text("s", found, **NOTHING_ELSE)


def test_one_size_has_no_law():
    found = compare([outcome("tiny"), outcome("tiny", loss=9.0, seed=1)])
    assert found.law is None and found.next_size is None
    assert "Power law" not in text("s", found, **NOTHING_ELSE)


def test_page_and_plots_show_the_whole_comparison(tmp_path):
    found = compare([outcome("tiny"), outcome("small"), outcome("medium")])
    drawn = losses_compared(found, SweepFolder(tmp_path))
    why = "loss is nan at step 3: lower --learning-rate"
    failed = {"unfinished": {"s-tiny-seed7": "failed"}, "reasons": {"s-tiny-seed7": why}}
    shown = text("s", found, plots=drawn, **failed)
    assert f"`s-tiny-seed7` failed: {why}" in shown.replace("\\", "")
    assert "fails again if its settings are the reason" in shown
    assert "| small-0 | small | " in shown and "**Not completed: s-tiny-seed7 (failed)**" in shown
    assert "Common to all runs: status completed, " in shown
    assert f"C^-{EXPONENT:.4f}" in shown and "Test of the law" in shown and "+0.00%" in shown
    assert "95 % interval" in shown and "Student's t with 1 degree of freedom" in shown
    assert "The floor that the loss approaches could not be fitted" in shown
    assert [path.name for path in drawn] == [
        "loss-by-tokens.png",
        "loss-by-flops.png",
        "loss-by-hours.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    found.write(tmp_path / "comparison.json")
    assert Comparison.read(tmp_path / "comparison.json") == found


def lines_of(figure: Figure) -> list[Line2D]:
    """Lines of a legend, without that of the power law."""
    [axes] = figure.axes
    labelled, labels = axes.get_legend_handles_labels()
    return [x for x, label in zip(labelled, labels, strict=True) if "mean" in label or "-" in label]


def test_runs_are_distinguishable_and_the_legend_covers_none(tmp_path, figures):
    """Eighteen settings of one size: colours first, then dashes."""
    runs = [outcome("tiny", loss=3 + n / 100, gpus=2 + n).replace(run=f"t-{n}") for n in range(18)]
    losses_compared(compare(runs), SweepFolder(tmp_path))
    for figure in figures:
        figure.draw_without_rendering()
        [axes], [legend] = figure.axes, figure.legends
        looks = [(line.get_color(), line.get_linestyle()) for line in axes.lines]
        assert len(set(looks)) == len(looks) == 18
        assert len({colour for colour, _ in looks}) >= 10
        assert legend.get_window_extent().x0 >= axes.get_window_extent().x1
        if axes.get_xscale() == "log":
            assert all(x > 0 for line in axes.lines for x in line.get_xdata())


def seeds(count: int, **more: Any) -> list[Outcome]:
    """Runs of tiny whose losses are 3.0, 3.1 and so on."""
    return [
        outcome("tiny", loss=3 + n / 10, seed=n).replace(run=f"s-tiny-seed{n}", **more)
        for n in range(count)
    ]


def test_means_over_seeds_are_in_the_table_and_the_plots(tmp_path, figures):
    alone, other = outcome("small"), seeds(4)[3].replace(status="cancelled")
    found = compare([*seeds(3), alone, other])
    shown = text("s", found, **NOTHING_ELSE)
    assert "## Means over seeds" in shown
    assert "| tiny | 3 | 3.1000 ± 0.1000 | none |" in shown, "a cancelled run does not count"
    losses_compared(found, SweepFolder(tmp_path))
    [axes] = figures[0].axes
    mean, small = lines_of(figures[0])
    assert mean.get_label() == "s-tiny: mean of 3 seeds" and small.get_label() == "small-0"
    tokens = alone.replace(**dict(seeds(1)[0])).tokens
    expected = [(0, 10.4), (tokens // 2, 3.4), (tokens, 3.1)]
    assert [*zip(*mean.get_data(), strict=True)] == [pytest.approx(point) for point in expected]
    faint = [line for line in axes.lines if line.get_alpha()]
    assert len(faint) == 4 and {line.get_color() for line in faint} == {mean.get_color()}
    assert "Means over seeds" not in text("s", compare([alone, *seeds(1)]), **NOTHING_ELSE)


def test_extended_runs_are_named_and_are_not_in_one_mean_with_others():
    runs = [outcome("tiny", loss=3.0 + seed / 10, seed=seed) for seed in range(4)]
    assert "extended" not in text("s", compare(runs), **NOTHING_ELSE).split("## Means")[0]
    early = [one.replace(extended="20") for one in runs[:2]]
    found = compare([*early, *runs[2:]])
    assert [len(group.runs) for group in found.groups] == [2, 2]
    assert "| extended at step |" in text("s", found, **NOTHING_ELSE)


def test_mean_over_seeds_covers_steps_at_which_all_were_validated():
    first, second = seeds(2)
    second = second.replace(curve=tuple((t, x) for t, x in second.curve if t in (0, second.tokens)))
    second = second.replace(curve=((0, 10.4), (7, 9.0), *second.curve[1:]))
    [group] = compare([first, second]).groups
    assert [(tokens, mean.mean) for tokens, mean in group.curve("val_loss")] == [
        (0, pytest.approx(10.4)),
        (first.tokens, pytest.approx(3.05)),
    ]


def of_tokenizer(size: str, tokenizer: str, *, loss: float, bpb: float) -> Outcome:
    run = outcome(size, loss=loss)
    curve = ((0, 4.0), (run.tokens, bpb))
    metrics = {"loss/val": loss, "loss/val_bpb": bpb}
    return run.replace(
        run=f"{size}-{tokenizer}",
        setting=f"{size} {tokenizer}",
        tokenizer=tokenizer,
        val_bpb=bpb,
        bpb_curve=curve,
        metrics=metrics,
    )


def test_runs_with_different_tokenizers_are_compared_by_bits_per_byte(tmp_path, figures):
    """A small vocabulary has low losses per token, and many tokens."""
    words = of_tokenizer("tiny", "words", loss=2.0, bpb=1.4)
    small = of_tokenizer("small", "words", loss=1.9, bpb=1.3)
    usual = of_tokenizer("tiny", "usual", loss=3.4, bpb=1.2)
    found = compare([words, small, usual])
    assert found.measure == "val_bpb"
    assert [one.run for one in found.runs] == ["tiny-usual", "tiny-words", "small-words"]
    assert found.law.losses == (1.2, 1.3), "the best of each size"
    shown = text("s", found, **NOTHING_ELSE)
    assert "different tokenizers, so their losses are not comparable" in shown
    assert "L is the loss in bits per byte" in shown
    losses_compared(found, SweepFolder(tmp_path))
    [axes] = figures[0].axes
    assert axes.get_ylabel() == "bits per byte"
    assert sorted(line.get_ydata()[-1] for line in lines_of(figures[0])) == [1.2, 1.3, 1.4]

    alike = compare([words, small])
    assert alike.measure == "val_loss" and alike.law.losses == (2.0, 1.9)
    assert "tokenizers" not in text("s", alike, **NOTHING_ELSE)


def test_incomplete_runs_are_shown_but_not_fitted(tmp_path, figures):
    partly = outcome("medium", loss=9.0).replace(status="cancelled", run="s-medium")
    begun = partly.replace(tokens=0, curve=((0, 10.4),), run="s-begun", status="running", seconds=0)
    found = compare([outcome("tiny"), outcome("small"), partly, begun])
    assert found.law.points == 2
    shown = text("s", found, **NOTHING_ELSE)
    assert "| medium | cancelled | medium | 9.0000 |" in shown
    assert "| begun | running | medium |" in shown
    losses_compared(found, SweepFolder(tmp_path))
    assert "s-medium (cancelled)" in [line.get_label() for line in lines_of(figures[0])]


def test_times_of_short_and_long_runs_are_readable():
    short, long = (outcome("tiny", seed=n).replace(seconds=s) for n, s in ((0, 4.0), (1, 9e3)))
    shown = text("s", compare([short, long]), **NOTHING_ELSE)
    assert "| 4 s |" in shown and "| 2 h 30 min |" in shown


def test_zero_stages_are_shown_for_several_gpus():
    alone = text("s", compare([outcome("tiny"), outcome("tiny", seed=1)]), **NOTHING_ELSE)
    assert "ZeRO" not in alone and "GPUs" not in alone
    runs = [outcome("tiny"), *(outcome("tiny", gpus=2, stage=stage) for stage in (0, 3))]
    shown = text("s", compare(runs), **NOTHING_ELSE)
    head, _, *rows = [line for line in shown.splitlines() if line.startswith("|")]
    names = [cell.strip() for cell in head.split("|")]
    cells = [[cell.strip() for cell in row.split("|")] for row in rows]
    found = [(row[names.index("GPUs")], row[names.index("ZeRO")]) for row in cells]
    assert found == [("1", "none"), ("2", "0"), ("2", "3")]


def test_runs_that_are_named_after_their_sizes_have_no_size_column():
    runs = [outcome(size).replace(run=f"s-{size}") for size in ("tiny", "small")]
    shown = text("s", compare(runs), **NOTHING_ELSE)
    assert "| run | validation loss |" in shown and "| small | " in shown
