import random
from itertools import islice
from pathlib import Path

import pytest
import torch
from tiny import MODEL, RandomBatches, training_config

from zeroflow import artifacts
from zeroflow.model.llama import ModelConfig
from zeroflow.training import checkpoint
from zeroflow.training.checkpoint import CheckpointError
from zeroflow.training.loop import TrainState, new_state, train

CONFIG = training_config(steps=6)
BATCHES = RandomBatches(accumulate=2)


def trained(steps: int) -> TrainState:
    state = new_state(MODEL, CONFIG)
    for _ in islice(train(state, BATCHES, CONFIG), steps):
        pass
    return state


def tensors(state: TrainState) -> dict[str, torch.Tensor]:
    """Everything in the state, copied."""
    found = {name: weight.clone() for name, weight in state.model.state_dict().items()}
    for name, parameter in state.model.named_parameters():
        for key, value in state.optimizer.state[parameter].items():
            found[f"{name} {key}"] = value.clone()
    return found


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def flip_a_bit(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position // 8] ^= 1 << position % 8
    file.write_bytes(content)


def test_loaded_state_is_the_saved_one_bit_for_bit(tmp_path):
    saved = trained(3)
    torch.manual_seed(99)
    random_state = torch.get_rng_state()
    path = checkpoint.save(saved, tmp_path, keep=2)
    torch.manual_seed(1)

    loaded = new_state(MODEL, CONFIG.replace(seed=5))
    checkpoint.load(loaded, path)
    assert loaded.step == 3
    assert_equal(tensors(loaded), tensors(saved))
    assert torch.equal(torch.get_rng_state(), random_state)
    names = {name for name in tensors(saved) if name.endswith("exp_avg_sq")}
    assert names and all(tensors(saved)[name].any() for name in names)


def test_resumed_training_equals_uninterrupted_training(tmp_path):
    straight = new_state(MODEL, CONFIG)
    losses = [metrics.loss.item() for metrics in train(straight, BATCHES, CONFIG)]

    path = checkpoint.save(trained(3), tmp_path, keep=1)
    resumed = new_state(MODEL, CONFIG)
    checkpoint.load(resumed, path)
    assert [metrics.loss.item() for metrics in train(resumed, BATCHES, CONFIG)] == losses[3:]
    assert_equal(tensors(resumed), tensors(straight))


def test_saving_leaves_the_state_as_it_is(tmp_path):
    state = trained(2)
    before = tensors(state)
    checkpoint.save(state, tmp_path, keep=1)
    assert_equal(tensors(state), before)


def test_newest_checkpoints_are_kept(tmp_path):
    state = new_state(MODEL, CONFIG)
    for _ in train(state, BATCHES, CONFIG):
        checkpoint.save(state, tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000005", "step-00000006"]
    newest = checkpoint.latest(tmp_path)
    assert newest is not None and checkpoint.step_of(newest) == 6


def test_folder_without_checkpoints_has_no_latest(tmp_path):
    assert checkpoint.latest(tmp_path / "none") is None
    (tmp_path / ".step-00000001.partial").mkdir()
    assert checkpoint.latest(tmp_path) is None


def test_saving_the_same_step_again_keeps_what_is_there(tmp_path):
    state = trained(1)
    path = checkpoint.save(state, tmp_path, keep=1)
    made = path.stat().st_mtime_ns
    assert checkpoint.save(state, tmp_path, keep=1) == path
    assert path.stat().st_mtime_ns == made


def test_damaged_newest_is_set_aside_and_the_one_before_is_used(tmp_path):
    state = trained(1)
    older = checkpoint.save(state, tmp_path, keep=3)
    state.step = 2
    newer = checkpoint.save(state, tmp_path, keep=3)
    [data] = newer.glob("*.distcp")
    flip_a_bit(data, 8 * data.stat().st_size // 2)
    assert checkpoint.latest(tmp_path) == older
    assert not newer.exists() and newer.with_name(f"{newer.name}.damaged-1").exists()
    assert checkpoint.latest(tmp_path) == older


def test_any_flipped_bit_is_noticed(tmp_path):
    path = checkpoint.save(trained(1), tmp_path, keep=1)
    rng = random.Random(0)
    files = sorted(path.iterdir())
    assert len(files) >= 3, "tensors, their index and the manifest"
    for _ in range(60):
        file = rng.choice(files)
        position = rng.randrange(8 * file.stat().st_size)
        flip_a_bit(file, position)
        with pytest.raises(artifacts.DamagedArtifact, match=r"sha256 differs|manifest\.json"):
            artifacts.verify(path)
        flip_a_bit(file, position)
    assert artifacts.verify(path)["step"] == 1


@pytest.mark.parametrize(
    "change", [{"hidden_size": 64}, {"num_key_value_heads": 4}, {"rope_theta": 1e4}]
)
def test_checkpoint_of_another_model_is_refused_with_what_differs(tmp_path, change):
    path = checkpoint.save(trained(1), tmp_path, keep=1)
    other = new_state(MODEL.replace(**change), CONFIG)
    before = tensors(other)
    [(name, value)] = change.items()
    with pytest.raises(CheckpointError, match=f"written with {name} .* this run has {value}"):
        checkpoint.load(other, path)
    assert_equal(tensors(other), before)


def test_checkpoint_of_another_format_is_refused(tmp_path):
    path = checkpoint.save(trained(1), tmp_path, keep=1)
    manifest = artifacts.read_json(path / artifacts.MANIFEST)
    artifacts.write_json(path / artifacts.MANIFEST, manifest | {"format": 99})
    with pytest.raises(CheckpointError, match="format 99, this version reads"):
        checkpoint.load(new_state(MODEL, CONFIG), path)
    with pytest.raises(CheckpointError, match="format 99"):
        checkpoint.load_model(path)


def test_checkpoint_without_its_tensors_is_refused(tmp_path):
    path = checkpoint.save(trained(1), tmp_path, keep=1)
    [data] = path.glob("*.distcp")
    data.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load_model(path)


def test_model_alone_gives_the_same_logits(tmp_path):
    state = trained(2)
    model = checkpoint.load_model(checkpoint.save(state, tmp_path, keep=1))
    tokens = BATCHES.micro_batches(7)[0].inputs
    assert torch.equal(model(tokens), state.model(tokens))
    assert not model.training and isinstance(model.config, ModelConfig)
