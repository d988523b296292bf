"""Settings of the ZeRO laboratory."""

import pytest

from zeroflow.device import find_device
from zeroflow.lab.study import LabConfig
from zeroflow.settings.refusals import refuse_what_the_device_cannot
from zeroflow.settings.run_config import RunConfig
from zeroflow.settings.zero_lab import ZeroLabRun, lab_run


def asked(**run: object) -> ZeroLabRun:
    given = {"device": "cpu", "training": {"gpus": 2}} | run
    return ZeroLabRun(run=RunConfig.model_validate(given))


def test_open_settings_become_small_on_a_cpu_and_given_ones_are_kept():
    small = lab_run(asked())
    assert small.data.data_mode == "synthetic" and small.model.hidden_size == 128
    assert small.training.grad_accum_steps == 2 and small.training.max_steps == 20
    assert small.run_name == lab_run(asked()).run_name
    training = {"gpus": 4, "batch_tokens": 1024, "max_steps": 7}
    given = lab_run(asked(model={"size": "tiny"}, data={"data_mode": "sample"}, training=training))
    assert given.model.size == "tiny" and given.data.data_mode == "sample"
    assert given.training.batch_tokens == 1024 and given.training.max_steps == 7
    assert given.training.grad_accum_steps is None, "it follows from the batch"
    assert given.run_name != small.run_name


def test_groups_are_planned_at_a_stage_that_shards():
    grouped = lab_run(asked(training={"gpus": 4, "shard_group": 2}))
    refuse_what_the_device_cannot(grouped, find_device("cpu"))
    assert (grouped.training.zero_stage, grouped.training.shard_group) == (3, 2)
    odd = lab_run(asked(training={"gpus": 4, "shard_group": 3}))
    with pytest.raises(ValueError, match="--shard-group 3 does not divide the 4 GPUs"):
        refuse_what_the_device_cannot(odd, find_device("cpu"))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"training": {}}, "add --gpus, such as --gpus 2"),
        ({"training": {"gpus": 2, "nodes": 2}}, "drop --nodes"),
        ({"training": {"gpus": 2, "zero_stage": 1}}, "use --zero-stages"),
        ({"training": {"gpus": 4, "shard_group": 4, "reshard_group": 2}}, "drop it"),
        ({"training": {"gpus": 2, "offload": "optimizer"}}, "set offload in lab, not in"),
        ({"skip_preflight": True}, "no pre-flight"),
        ({"evaluation": {"evaluate_tasks": ["piqa"]}}, "no evaluation"),
        ({"register_": "mine"}, "no model to register"),
    ],
)
def test_settings_that_do_not_apply_are_refused(run, message):
    with pytest.raises(ValueError, match=message):
        lab_run(asked(**run))


def test_slow_links_are_refused_before_anything_starts(monkeypatch):
    slow = asked().replace(lab=LabConfig(bandwidth_gbps=(1.0,)))
    monkeypatch.setattr("shutil.which", lambda tool: None)
    with pytest.raises(ValueError, match="needs ip and tc of iproute2"):
        lab_run(slow)


def test_offload_is_refused_on_a_cpu_and_without_a_stage_that_shards():
    with pytest.raises(ValueError, match=r"--offload optimizer .* but the device is a CPU"):
        lab_run(asked().replace(lab=LabConfig(offload="optimizer")))
    with pytest.raises(ValueError, match="needs ZeRO stage 1, 2 or 3, but --zero-stages is 0"):
        LabConfig(zero_stages=(0,), offload="optimizer")


def test_cap_above_the_memory_of_the_machine_is_refused():
    lab_run(asked().replace(lab=LabConfig(memory_gb=0.1)))
    with pytest.raises(ValueError, match=r"--memory-gb is 1e\+06, but a rank can use .* lower it"):
        lab_run(asked().replace(lab=LabConfig(memory_gb=1e6)))


def test_name_of_a_training_run_is_refused(tmp_path):
    (tmp_path / "runs" / "mine" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"mine is a training run: .* another --run-name"):
        lab_run(asked(run_name="mine", cache_dir=tmp_path))
