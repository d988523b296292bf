"""Checks of a training step, and of saving and loading a checkpoint."""

import pytest
import torch
from checked import SHARDS, assert_failed, checked_job
from tiny import training_config

from zeroflow.checks import step_checks
from zeroflow.data.build import build_shards
from zeroflow.data.rows import Rows
from zeroflow.training import checkpoint
from zeroflow.training.state import TrainState, new_state


@pytest.fixture
def state() -> TrainState:
    return new_state(training_config(document_mask=True, seq_len=64))


def test_non_finite_step_is_caught(text, tmp_path):
    job = checked_job(tmp_path, build_shards(SHARDS, *text[:2], tmp_path), text.tokenizer)
    state = new_state(job.training)
    torch.nn.init.constant_(state.model.model.norm.weight, torch.inf)
    check = step_checks.micro_batch(state, job.training, Rows(job.shards, "train"))
    assert_failed(check, "non-finite", "--precision")


def test_saved_and_loaded_state_is_bit_identical(state, tmp_path):
    for weights in state.optimizer.state.values():
        weights["exp_avg"].normal_()
    before = {name: tensor.clone() for name, tensor in checkpoint.state_tensors(state).items()}
    assert step_checks.round_trip(state, tmp_path / "saved", "f").passed
    for name, tensor in checkpoint.state_tensors(state).items():
        assert torch.equal(tensor, before[name]), name
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_that_lacks_a_moment_is_caught(state, tmp_path, monkeypatch):
    whole = checkpoint.state_tensors

    def forgetful(state):
        return {name: t for name, t in whole(state).items() if not name.endswith("exp_avg")}

    for weights in state.optimizer.state.values():
        weights["exp_avg"].normal_()
    monkeypatch.setattr(checkpoint, "state_tensors", forgetful)
    assert_failed(
        step_checks.round_trip(state, tmp_path / "saved", "f"), "20 tensors, such as exp_avg of"
    )
    assert list(tmp_path.iterdir()) == []


def test_disk_that_damages_files_is_caught(state, tmp_path, monkeypatch):
    verified = checkpoint.latest

    def damaged(folder):
        file = next(folder.glob("step-*/*.safetensors"))
        file.write_bytes(file.read_bytes()[:-1])
        return verified(folder)

    monkeypatch.setattr(checkpoint, "latest", damaged)
    assert_failed(step_checks.round_trip(state, tmp_path / "saved", "f"), "look at the disk")


def test_full_disk_is_caught(state, tmp_path, monkeypatch):
    usage = type(checkpoint.shutil.disk_usage("."))(100, 99, 1)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: usage)
    assert_failed(
        step_checks.round_trip(state, tmp_path / "saved", "f"), "has room for", "--cache-dir"
    )
