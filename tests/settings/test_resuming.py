import pytest

from zeroflow.settings import resuming
from zeroflow.settings.run_config import RunConfig

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
}


def run(**settings) -> RunConfig:
    return RunConfig.model_validate({"run_name": "mine"} | settings)


def test_given_settings_are_those_that_were_set_to_a_value():
    asked = run(
        data={"data_mode": "auto", "text_column": "body"},
        training={"max_steps": None, "seq_len": 64},
        tokenizer={},
    )
    assert resuming.given(asked) == {
        "run_name": "mine",
        "data": {"text_column": "body"},
        "training": {"seq_len": 64},
    }


def test_repeated_settings_are_not_a_change():
    before = {"seed": 1, "data": {"data_path": ["a", "b"], "text_column": "body"}}
    same = {"seed": 1, "data": {"data_path": ("a", "b")}}
    assert resuming.without(same, before) == {}
    other = {"seed": 2, "data": {"data_path": ("a",), "text_column": "body"}}
    assert resuming.without(other, before) == {"seed": 2, "data": {"data_path": ("a",)}}


def test_given_settings_replace_recorded_ones():
    recorded = run(seed=3, training={"seq_len": 64, "max_steps": 20})
    merged = resuming.merged(recorded, run(training={"max_steps": 40}), {})
    assert merged == run(seed=3, training={"seq_len": 64, "max_steps": 40})


def test_trackers_of_a_run_are_kept_until_none_is_requested():
    recorded = run(log_to=["tensorboard"])
    assert resuming.merged(recorded, run(), {}).trackers == ("tensorboard",)
    without = resuming.merged(recorded, run(log_to=["none"]), {})
    assert without.trackers == () == resuming.merged(without, run(), {}).trackers
    assert resuming.merged(without, run(log_to=["wandb"]), {}).trackers == ("wandb",)
    with pytest.raises(ValueError, match="--log-to none contradicts wandb: drop one of them"):
        run(log_to=["none", "wandb"])


def test_branch_that_is_requested_again_stays_at_its_commit():
    recorded = run(data={"data_mode": "fineweb", "data_revision": "4f5e"})
    again = run(data={"data_mode": "fineweb", "data_revision": "main"})
    assert resuming.merged(recorded, again, {"data": {"data_revision": "main"}}) == recorded


@pytest.mark.parametrize(
    "asked",
    [{"gpus": 2}, {"gpus": 2, "batch_size": 2}, {"batch_size": 1}, {"grad_accum_steps": 8}],
    ids=str,
)
def test_another_split_of_the_batch_is_chosen_anew(asked):
    """The recorded rows and micro-batches multiply to the batch of the recorded GPUs only."""
    batch = {"batch_tokens": 256, "seq_len": 64}
    recorded = run(training=batch | {"gpus": 1, "batch_size": 4, "grad_accum_steps": 1})
    merged = resuming.merged(recorded, run(training=asked), {}).training
    assert merged.batch_tokens == 256
    assert merged.batch_size == asked.get("batch_size")
    assert merged.grad_accum_steps == asked.get("grad_accum_steps")


def test_same_number_of_gpus_keeps_the_split():
    recorded = run(training={"gpus": 2, "batch_size": 4, "grad_accum_steps": 3})
    assert resuming.merged(recorded, run(training={"gpus": 2}), {}) == recorded


def test_run_on_one_gpu_drops_the_zero_stage():
    recorded = run(training={"gpus": 2, "zero_stage": 3})
    assert resuming.merged(recorded, run(training={"gpus": 1}), {}).training.zero_stage is None


@pytest.mark.parametrize(
    ("recorded", "asked", "stage"),
    [
        ({"offload": "optimizer", "zero_stage": 3}, {}, 3),
        ({"offload": "optimizer", "zero_stage": 2}, {"offload": "none"}, None),
        ({"zero_stage": 0}, {"offload": "optimizer"}, None),
        ({"zero_stage": 0}, {"offload": "optimizer", "zero_stage": 3}, 3),
        ({"gpus": 2, "zero_stage": 0}, {"offload": "optimizer"}, None),
        ({"gpus": 2, "zero_stage": 3}, {"offload": "optimizer"}, 3),
        ({"gpus": 2, "zero_stage": 3, "offload": "optimizer"}, {"offload": "none"}, 3),
        ({"gpus": 2, "zero_stage": 3, "offload": "optimizer"}, {"gpus": 1}, 3),
    ],
)
def test_state_may_move_to_the_host_or_back(recorded, asked, stage):
    merged = resuming.merged(run(training=recorded), run(training=asked), {}).training
    assert merged.zero_stage == stage
    assert merged.offload == asked.get("offload", recorded.get("offload", "none"))


@pytest.mark.parametrize(
    ("asked", "group"),
    [
        ({}, 4),
        ({"nodes": 3}, 4),
        ({"nodes": 1, "gpus": 6}, None),
        ({"nodes": 1, "gpus": 6, "shard_group": 3}, 3),
        ({"zero_stage": 0}, None),
        ({"zero_stage": 3}, 4),
    ],
)
def test_shard_group_is_kept_if_it_still_divides_the_gpus(asked, group):
    recorded = run(training={"gpus": 4, "nodes": 2, "zero_stage": 2, "shard_group": 4})
    assert resuming.merged(recorded, run(training=asked), {}).training.shard_group == group


@pytest.mark.parametrize(
    ("asked", "group"),
    [
        ({}, 2),
        ({"nodes": 3}, 2),
        ({"nodes": 1, "gpus": 2}, None),
        ({"shard_group": 2}, None),
        ({"shard_group": 2, "nodes": 1, "gpus": 3}, None),
        ({"reshard_group": 4}, 4),
        ({"zero_stage": 2}, None),
        ({"zero_stage": 2, "gpus": 1, "nodes": 1}, None),
    ],
)
def test_reshard_group_is_kept_if_it_still_divides_the_gpus_that_share_the_state(asked, group):
    recorded = run(training={"gpus": 4, "nodes": 2, "zero_stage": 3, "reshard_group": 2})
    assert resuming.merged(recorded, run(training=asked), {}).training.reshard_group == group


def test_another_model_is_not_mixed_with_the_recorded_one():
    size = resuming.merged(run(model=SHAPE), run(model={"size": "small"}), {})
    assert size.model == run(model={"size": "small"}).model
    shape = resuming.merged(run(model={"size": "small"}), run(model=SHAPE), {})
    assert shape.model == run(model=SHAPE).model


def test_preflight_is_skipped_by_the_command_that_says_so():
    assert not resuming.merged(run(skip_preflight=True), run(), {}).skip_preflight
    assert resuming.merged(run(), run(skip_preflight=True), {}).skip_preflight


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"device": "cpu"}, ""),
        ({"training": {"seq_len": 64, "max_steps": 40, "gpus": 2}}, ""),
        ({"training": {"seq_len": 64, "max_steps": 10}}, "--max-steps 20, now it is 10"),
        ({"training": {"seq_len": 32, "max_steps": 20}}, "--seq-len 64, now it is 32"),
        ({"seed": 9}, "--seed 0, now it is 9"),
    ],
)
def test_difference_is_the_first_setting_that_may_not_change(change, found):
    recorded = run(training={"seq_len": 64, "max_steps": 20})
    other = run(**({"training": {"seq_len": 64, "max_steps": 20}} | change))
    assert resuming.difference(recorded, other) == found


def test_free_settings_do_not_distinguish_runs():
    base = resuming.identity(run())
    assert base == resuming.identity(run(cache_dir="/elsewhere", training={"gpus": 4}))
    assert base == resuming.identity(run(run_name="other"))
    assert base != resuming.identity(run(seed=1))


def test_every_free_setting_exists():
    assert set(resuming.FREE) <= set(resuming.reuse.flat(run().model_dump()))
