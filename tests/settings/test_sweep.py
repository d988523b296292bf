"""Settings of a sweep, and the runs that follow from them."""

import pytest
from pydantic import ValidationError

from zeroflow.settings.run_config import RunConfig
from zeroflow.settings.sweep import SweepConfig, cells


def test_every_combination_is_a_run_whose_name_shows_it():
    sweep = SweepConfig(
        sweep_name="s",
        sizes=("tiny", "small"),
        seeds=(0, 1),
        learning_rates=(1e-3,),
        run={"training": {"max_steps": 7}},
    )
    runs = cells(sweep)
    assert [cell.run_name for cell in runs] == [
        "s-tiny-seed0-lr0.001",
        "s-tiny-seed1-lr0.001",
        "s-small-seed0-lr0.001",
        "s-small-seed1-lr0.001",
    ]
    assert [(cell.model.size, cell.seed) for cell in runs] == [
        ("tiny", 0),
        ("tiny", 1),
        ("small", 0),
        ("small", 1),
    ]
    assert all(cell.sweep == "s" and cell.training.max_steps == 7 for cell in runs)
    assert all(cell.training.learning_rate == 1e-3 for cell in runs)


def test_zero_stages_are_varied_like_other_settings():
    sweep = SweepConfig(sweep_name="s", zero_stages=(0, 3), run={"training": {"gpus": 2}})
    runs = cells(sweep)
    assert [cell.run_name for cell in runs] == ["s-tiny-zero0", "s-tiny-zero3"]
    assert [cell.training.zero_stage for cell in runs] == [0, 3]
    grouped = {"training": {"gpus": 8, "shard_group": 4, "reshard_group": 2}}
    in_groups = cells(SweepConfig(sweep_name="s", zero_stages=(0, 3), run=grouped))
    assert [cell.training.shard_group for cell in in_groups] == [None, 4]
    assert [cell.training.reshard_group for cell in in_groups] == [None, 2]
    assert all(cell.training.gpus == 2 for cell in runs)


def test_other_settings_are_those_of_the_run():
    [cell] = cells(SweepConfig(sweep_name="s", run={"model": {"size": "small"}}))
    assert cell == RunConfig(model={"size": "small"}, sweep="s", run_name="s-small")


def test_models_of_an_existing_sweep_can_be_registered():
    sweep = SweepConfig(sizes=("tiny",))
    registered = SweepConfig(sizes=("tiny",), run={"register_": "mine"})
    assert registered.name == sweep.name
    assert [cell.register_ for cell in cells(registered)] == ["mine"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"run": {"run_name": "mine"}}, "drop it"),
        ({"sizes": ["tiny"], "run": {"model": {"size": "small"}}}, "--sizes and --size both set"),
        ({"sizes": ["tiny"], "run": {"model": {"init_from": "run:a"}}}, "--sizes and --init-from"),
        ({"seeds": [1], "run": {"seed": 2}}, "a sweep sets --seed of its runs: drop it"),
        ({"learning_rates": [1e-3], "run": {"training": {"learning_rate": 1}}}, "--learning-rate"),
        ({"seeds": [1, 1]}, "a value twice"),
        ({"zero_stages": [0, 1]}, "--zero-stages needs several GPUs: add --gpus"),
        (
            {"zero_stages": [1], "run": {"training": {"gpus": 2, "zero_stage": 3}}},
            "sets --zero-stage of its runs",
        ),
        ({"sizes": ["huge"]}, "tiny"),
    ],
)
def test_contradictions_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        SweepConfig(**settings)


def test_learning_rates_that_differ_in_a_late_digit_are_different_runs():
    sweep = SweepConfig(sweep_name="s", learning_rates=(1e-3, 1.000_000_1e-3, 3e-5))
    assert [cell.run_name for cell in cells(sweep)] == [
        "s-tiny-lr0.001",
        "s-tiny-lr0.0010000001",
        "s-tiny-lr3e-05",
    ]


def test_name_follows_from_what_is_varied():
    one, same, other = (SweepConfig(seeds=seeds) for seeds in ((0, 1), (0, 1), (0, 2)))
    assert one.name == same.name != other.name
