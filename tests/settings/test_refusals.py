import sys
from contextlib import nullcontext

import pytest

from zeroflow.device import find_device, known_gpu
from zeroflow.settings import refusals, settle
from zeroflow.settings.run_config import RunConfig


def run(**settings) -> RunConfig:
    return RunConfig.model_validate(settings)


def refused(message: str | None):
    return pytest.raises(ValueError, match=message) if message else nullcontext()


@pytest.mark.parametrize(
    ("name", "title"), [("tensorboard", "TensorBoard"), ("wandb", "Weights & Biases")]
)
def test_tracker_that_is_not_installed_is_refused_with_the_command_that_installs_it(
    name, title, monkeypatch, tmp_path
):
    message = rf"--log-to {name} needs {title}: pip install 'zeroflow\[{name}\]'"
    monkeypatch.setitem(sys.modules, name, None)
    with refused(message):
        settle.require_possible(run(log_to=(name,)))
    # A folder of this name, such as the one that wandb writes, is a package without content
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (tmp_path / name).mkdir()
    with refused(message):
        settle.require_possible(run(log_to=(name,)))


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ({"tokenizer_name": "gpt2"}, None),
        ({"tokenizer_name": "train", "vocab_size": 500}, None),
        ({"tokenizer_name": "auto", "vocab_size": 500}, None),
        ({"tokenizer_name": "gpt2", "vocab_size": 500}, "--vocab-size has no effect .*gpt2"),
        ({"tokenizer_name": "gpt2", "end_of_text": "</s>"}, None),
        ({"tokenizer_name": "train", "end_of_text": "</s>"}, "--end-of-text has no effect"),
    ],
    ids=str,
)
def test_settings_of_a_tokenizer_that_has_its_own_are_refused(tokenizer, message):
    with refused(message):
        refusals.refuse_what_does_nothing(run(tokenizer=tokenizer))


def test_folder_of_tasks_without_tasks_is_refused():
    with refused("--evaluate-task-path has no effect without --evaluate-tasks"):
        refusals.refuse_an_impossible_evaluation(run(evaluation={"evaluate_task_path": "mine"}))


def test_model_without_text_is_not_registered():
    with refused("a registered model writes text, .*: drop --register"):
        refusals.refuse_what_does_nothing(run(register_="a", data={"data_mode": "synthetic"}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, None),
        ({"training": {"gpus": 2, "zero_stage": 3}}, None),
        ({"training": {"zero_stage": 3}}, "--zero-stage 3 .*has one: add --gpus"),
        ({"training": {"gpus": 4, "zero_stage": 1, "shard_group": 2}}, None),
        ({"training": {"gpus": 2, "nodes": 2, "zero_stage": 3, "shard_group": 2}}, None),
        (
            {"training": {"gpus": 6, "zero_stage": 1, "shard_group": 4}},
            "--shard-group 4 does not divide the 6 GPUs of the run: use one of 2, 3, 6, or drop it",
        ),
        ({"training": {"gpus": 4, "shard_group": 2}}, "--shard-group 2 has no effect at ZeRO s"),
        ({"training": {"gpus": 4, "zero_stage": 3, "reshard_group": 2}}, None),
        (
            {"training": {"gpus": 4, "zero_stage": 2, "reshard_group": 2}},
            "--reshard-group 2 has no effect at ZeRO stage 2",
        ),
        (
            {"training": {"gpus": 8, "zero_stage": 3, "shard_group": 4, "reshard_group": 4}},
            "--reshard-group 4 does not divide the 4 GPUs .*: use one of 2, or drop it",
        ),
        ({"training": {"fp8": True}}, "--fp8 needs a GPU"),
    ],
    ids=str,
)
def test_settings_that_a_cpu_does_not_support_are_refused(settings, message):
    with refused(message):
        refusals.refuse_what_the_device_cannot(run(device="cpu", **settings), find_device("cpu"))


@pytest.mark.parametrize(
    ("device", "settings", "message"),
    [
        ("H100", {}, None),
        ("H100", {"zero_stage": 3}, None),
        ("H100", {"fp8": True}, None),
        ("H100", {"gpus": 4, "zero_stage": 3, "reshard_group": 2}, None),
        ("H100", {"gpus": 2, "zero_stage": 0}, "needs ZeRO stage 1, 2 or 3: .*--zero-stage 2"),
        ("cpu", {}, "moves state from the memory of a GPU .*, but the device is a CPU"),
        ("cpu", {"gpus": 2, "zero_stage": 2}, "but the device is a CPU"),
    ],
)
def test_offload_is_refused_where_it_makes_no_sense(device, settings, message):
    there = find_device("cpu") if device == "cpu" else known_gpu(device)
    asked = run(training={"offload": "optimizer", **settings})
    with refused(message):
        refusals.refuse_what_the_device_cannot(asked, there)


@pytest.mark.parametrize(
    ("there", "asked", "message"),
    [
        (4, 1, None),
        (4, 4, None),
        (2, 4, "--gpus 4, but PyTorch sees 2: use fewer"),
    ],
)
def test_more_gpus_than_the_machine_has_are_refused(there, asked, message, monkeypatch):
    monkeypatch.setattr(refusals, "gpu_count", lambda: there)
    with refused(message):
        refusals.refuse_more_gpus_than_there_are(run(training={"gpus": asked}), known_gpu("L4"))


def test_ranks_on_a_cpu_need_no_gpus():
    refusals.refuse_more_gpus_than_there_are(
        run(device="cpu", training={"gpus": 8}), find_device("cpu")
    )
    with refused("starts 100,000 processes, and this machine has memory for .*: use fewer"):
        refusals.refuse_more_gpus_than_there_are(
            run(device="cpu", training={"gpus": 100_000}), find_device("cpu")
        )
    with refused("sees none: --device cpu uses 8 processes"):
        refusals.refuse_more_gpus_than_there_are(run(training={"gpus": 8}), find_device("cpu"))


def test_plan_for_several_gpus_needs_a_name_on_a_machine_without_gpus():
    several = run(training={"gpus": 4})
    refusals.refuse_a_plan_for_no_gpu(several, known_gpu("L4"))
    refusals.refuse_a_plan_for_no_gpu(several.replace(device="cpu"), find_device("cpu"))
    with refused("--gpus 4, but this machine has none: name one with --gpu"):
        refusals.refuse_a_plan_for_no_gpu(several, find_device("cpu"))


def test_stages_are_varied_over_several_gpus_only():
    refusals.refuse_one_rank(run(training={"gpus": 2}), "--zero-stages")
    with refused("--zero-stages needs several GPUs: add --gpus"):
        refusals.refuse_one_rank(run(), "--zero-stages")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, None),
        ({"evaluation": {"evaluate_tasks": ["piqa"]}}, r"pip install 'zeroflow\[eval\]'"),
        ({"evaluation": {"evaluate_path": ["none.txt"]}}, "--evaluate-path none.txt matches no"),
        (
            {"data": {"data_mode": "synthetic"}, "evaluation": {"evaluate_tasks": ["piqa"]}},
            "synthetic data has no loss on texts and tasks: drop --evaluate-path",
        ),
    ],
    ids=str,
)
def test_evaluation_that_would_fail_after_the_training_is_refused(settings, message, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with refused(message):
        refusals.refuse_an_impossible_evaluation(run(**settings))
