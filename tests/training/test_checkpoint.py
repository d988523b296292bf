import dataclasses
import errno
import fcntl
import hashlib
import itertools
import math
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
import torch.distributed.checkpoint as dcp
from patience import HANG_SECONDS
from safetensors.torch import load_file
from tiny import (
    MODEL,
    WORKLOAD,
    ArrayRows,
    RandomBatches,
    synthetic_rows,
    training_config,
    training_job,
    with_workload,
)
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from transformers import LlamaForCausalLM

from zeroflow import artifacts
from zeroflow.data.tokenizer import Tokenizer
from zeroflow.model.hugging_face import config_json
from zeroflow.model.llama import ModelConfig
from zeroflow.training import checkpoint, chunked_files, sampling, tensor_files
from zeroflow.training.checkpoint import CheckpointError
from zeroflow.training.config import TrainingConfig
from zeroflow.training.goodput import Clock
from zeroflow.training.loop import train
from zeroflow.training.retention import Retention
from zeroflow.training.sampling import SamplingConfig
from zeroflow.training.saver import Saver
from zeroflow.training.schedule import Schedule
from zeroflow.training.session import Session
from zeroflow.training.state import TrainState, new_state
from zeroflow.training.tensor_files import (
    BadTensorFile,
    FileImage,
    FileLayout,
    FileStream,
    TensorFiles,
)
from zeroflow.training.validation import validation_loss

CONFIG = training_config(steps=6)
TOKENIZER = "0123456789ab"
BATCHES = RandomBatches(accumulate=2)


def trained(
    steps: int, config: TrainingConfig = CONFIG, batches: RandomBatches = BATCHES
) -> TrainState:
    state = new_state(config)
    for _ in islice(train(state, batches, config), steps):
        pass
    return state


def save(state: TrainState, folder: Path, *, keep: int, **facts) -> Path:
    """Save, and wait until it is on the disk."""
    saver = Saver(folder, Retention(keep=keep), tokenizer=TOKENIZER)
    saver.save(state, **facts)
    saver.wait()
    return folder / f"step-{state.step:08d}"


def load(state: TrainState, path: Path) -> None:
    checkpoint.load(state, path, tokenizer=TOKENIZER)


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


def test_loaded_state_is_bit_identical_to_the_saved_one(tmp_path):
    saved = trained(3)
    torch.manual_seed(99)
    random_state = torch.get_rng_state()
    path = save(saved, tmp_path, keep=2)
    torch.manual_seed(1)

    loaded = new_state(CONFIG.replace(seed=5))
    load(loaded, path)
    assert loaded.step == 3
    assert_equal(tensors(loaded), tensors(saved))
    assert torch.equal(torch.get_rng_state(), random_state)
    names = {name for name in tensors(saved) if name.endswith("exp_avg_sq")}
    assert names and all(tensors(saved)[name].any() for name in names)


WARMING_UP = Schedule(name="cosine", peak=1e-2, warmup_steps=5, steps=6)


@pytest.mark.parametrize(
    ("config", "batches"),
    [
        pytest.param(CONFIG, RandomBatches(), id="eager"),
        pytest.param(CONFIG, BATCHES, id="accumulating"),
        pytest.param(CONFIG.replace(schedule=WARMING_UP), BATCHES, id="in the warm-up"),
        pytest.param(
            with_workload(CONFIG, compile=True),
            BATCHES,
            id="compiled",
            marks=[
                pytest.mark.slow,  # the compilations take twenty seconds
                pytest.mark.skipif(not shutil.which("g++"), reason="compiles with g++"),
            ],
        ),
    ],
)
def test_resumed_training_equals_uninterrupted_training(tmp_path, config, batches):
    straight = new_state(config)
    losses = [metrics.loss.item() for metrics in train(straight, batches, config)]

    path = save(trained(3, config, batches), tmp_path, keep=1)
    torch.compiler.reset()  # as in another process
    resumed = new_state(config)
    load(resumed, path)
    assert [metrics.loss.item() for metrics in train(resumed, batches, config)] == losses[3:]
    assert_equal(tensors(resumed), tensors(straight))


def test_training_resumed_right_after_a_validation_equals_one_without_any(tmp_path):
    straight = trained(6)
    state = trained(3)
    rows = np.random.default_rng(0).integers(MODEL.vocab_size, size=(5, 13)).view(ArrayRows)
    validation_loss(state.model, rows, np.arange(5), WORKLOAD)
    ids = Tokenizer(name="ids", path=None, vocab_size=256, end_of_text=0, fingerprint="")
    sampling.generate_ids(state.model, ids, SamplingConfig(tokens=4), context=8)
    path = save(state, tmp_path, keep=1)
    resumed = new_state(CONFIG)
    load(resumed, path)
    for _ in train(resumed, BATCHES, CONFIG):
        pass
    assert_equal(tensors(resumed), tensors(straight))


def save_and_be_killed(folder: Path, moment: str) -> None:
    """For a process of its own, that ends before all chunks or the manifest are written."""

    def kill(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "before the manifest":
        artifacts.seal = kill
    else:
        writes, pwrite = itertools.count(), os.pwrite
        chunked_files.CHUNK_BYTES = 4096
        os.pwrite = lambda *given: kill() if next(writes) == 20 else pwrite(*given)
    save(trained(3), folder, keep=2)


@pytest.mark.parametrize(
    "moment", [pytest.param("between chunks", marks=pytest.mark.slow), "before the manifest"]
)
def test_training_killed_during_a_save_ends_like_uninterrupted_training(tmp_path, moment):
    before = save(trained(2), tmp_path, keep=2)
    process = multiprocessing.get_context("spawn").Process(
        target=save_and_be_killed, args=(tmp_path, moment)
    )
    process.start()
    process.join(HANG_SECONDS)
    assert process.exitcode == -signal.SIGKILL
    assert list(tmp_path.glob(".step-00000003.partial/*.safetensors")), "half written"

    checkpoint.clear_unfinished(tmp_path)
    assert checkpoint.latest(tmp_path) == before and list(tmp_path.iterdir()) == [before]
    resumed = new_state(CONFIG)
    load(resumed, before)
    for _ in train(resumed, BATCHES, CONFIG):
        pass
    assert_equal(tensors(resumed), tensors(trained(6)))


def test_saving_leaves_the_state_as_it_is(tmp_path):
    state = trained(2)
    before = tensors(state)
    save(state, tmp_path, keep=1)
    assert_equal(tensors(state), before)


def test_newest_checkpoints_are_kept(tmp_path):
    state = new_state(CONFIG)
    for _ in train(state, BATCHES, CONFIG):
        save(state, tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000005", "step-00000006"]
    newest = checkpoint.latest(tmp_path)
    assert newest is not None and checkpoint.step_of(newest) == 6


def test_best_and_every_nth_checkpoint_are_kept_with_the_newest(tmp_path):
    losses = {1: math.nan, 2: 3.0, 4: 3.5, 6: 3.2}
    saver = Saver(tmp_path, Retention(keep=1, keep_every=3), tokenizer=TOKENIZER)
    state = new_state(training_config(steps=7))
    for _ in train(state, BATCHES, training_config(steps=7)):
        saver.save(state, val_loss=losses.get(state.step))
    saver.wait()
    steps = [checkpoint.step_of(path) for path in sorted(tmp_path.glob("step-*"))]
    assert steps == [2, 3, 6, 7], "the best, the multiples of three, the newest"
    assert checkpoint.best(tmp_path) == tmp_path / "step-00000002"


def test_checkpoint_is_found_by_its_step_or_as_the_newest_or_the_best(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no checkpoint yet in .*empty"):
        checkpoint.find(tmp_path / "empty")
    state = trained(steps=3)
    for step, loss in ((1, 4.0), (2, 3.0), (3, 5.0)):
        state.step = step
        save(state, tmp_path, keep=9, val_loss=loss)
    for which, step in ((1, 1), ("newest", 3), ("best", 2)):
        assert checkpoint.step_of(checkpoint.find(tmp_path, which)) == step
    with pytest.raises(CheckpointError, match="has no checkpoint of step 4, only of steps 1, 2, 3"):
        checkpoint.find(tmp_path, 4)
    flip_a_bit(tmp_path / "step-00000001" / "model.safetensors", 9999)
    with pytest.raises(CheckpointError, match=r"this checkpoint is damaged: .*sha256 differs"):
        checkpoint.find(tmp_path, 1)
    without = tmp_path / "without"
    save(state, without, keep=9)
    with pytest.raises(CheckpointError, match="with a validation loss, only of steps 3"):
        checkpoint.find(without, "best")


def test_checkpoint_that_was_moved_and_linked_is_used_and_its_link_removed(tmp_path):
    state = trained(1)
    elsewhere = tmp_path / "elsewhere"
    folder = tmp_path / "checkpoints"
    save(state, folder, keep=1)
    (folder / "step-00000001").rename(elsewhere)
    (folder / "step-00000001").symlink_to(elsewhere)
    assert checkpoint.latest(folder) == folder / "step-00000001"
    (folder / "step-00000003").write_text("no checkpoint")
    state.step = 2
    save(state, folder, keep=1)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000003"]
    assert checkpoint.newest_step(folder) == 2
    assert artifacts.verify(elsewhere), "what a person has moved stays"


def test_state_is_saved_as_it_was_when_the_save_began(tmp_path, monkeypatch):
    written = threading.Event()
    write = chunked_files.write

    def late(folder, contents):
        assert written.wait(30)
        return write(folder, contents)

    monkeypatch.setattr(chunked_files, "write", late)
    state = new_state(CONFIG)
    steps = train(state, BATCHES, CONFIG)
    next(steps)
    then = tensors(state)
    saver = Saver(tmp_path, Retention(keep=1), tokenizer=TOKENIZER)
    saver.save(state)
    next(steps)
    assert not list(tmp_path.glob("step-*")), "training continued before the checkpoint was written"
    written.set()
    saver.wait()
    loaded = new_state(CONFIG)
    load(loaded, tmp_path / "step-00000001")
    assert_equal(tensors(loaded), then)


def test_state_too_large_to_copy_is_written_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    saver = Saver(tmp_path, Retention(keep=1), tokenizer=TOKENIZER)
    saver.save(trained(1))
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000001"


def test_checkpoint_that_does_not_fit_is_refused_before_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    saver = Saver(tmp_path, Retention(keep=1), tokenizer=TOKENIZER)
    with pytest.raises(OSError, match=r"a checkpoint takes \d.* MB, but .* has room for 0.0 MB"):
        saver.save(trained(1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.getuid() != 0, reason="a file system of a given size is made as root")
def test_disk_that_fills_up_while_saving_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk]).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        monkeypatch.setattr(Saver, "require_room", lambda self, state: None)  # taken meanwhile
        older = save(trained(1), disk, keep=2)
        with pytest.raises(OSError, match="No space left on device"):
            save(trained(2), disk, keep=2)
        assert checkpoint.latest(disk) == older
        assert [path.name for path in disk.iterdir()] == [older.name]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    path = save(trained(1), tmp_path, keep=1)
    (tmp_path / ".step-00000003.partial").mkdir()
    checkpoint.clear_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_checkpoint_of_another_tokenizer_is_refused(tmp_path):
    path = save(trained(1), tmp_path, keep=1)
    with pytest.raises(CheckpointError, match=f"ids of tokenizer {TOKENIZER}, but this run has"):
        checkpoint.load(new_state(CONFIG), path, tokenizer="other")


def test_folder_without_checkpoints_has_no_latest(tmp_path):
    assert checkpoint.latest(tmp_path / "none") is None
    (tmp_path / ".step-00000001.partial").mkdir()
    assert checkpoint.latest(tmp_path) is None


def test_saving_the_same_step_again_keeps_what_is_there(tmp_path):
    state = trained(1)
    path = save(state, tmp_path, keep=1)
    made = path.stat().st_mtime_ns
    assert save(state, tmp_path, keep=1) == path
    assert path.stat().st_mtime_ns == made


def tensors_of(path: Path) -> Path:
    return path / "model.safetensors"


DAMAGES = {
    "bit flip": lambda path: flip_a_bit(tensors_of(path), 8 * 10_000),
    "truncated": lambda path: os.truncate(tensors_of(path), 10_000),
    "missing": lambda path: tensors_of(path).unlink(),
    "extra": lambda path: (path / "other.safetensors").write_bytes(b"x"),
    "no manifest": lambda path: (path / artifacts.MANIFEST).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_newest_is_set_aside_and_the_one_before_is_used(tmp_path, damage):
    state = trained(1)
    older = save(state, tmp_path, keep=3)
    state.step = 2
    newer = save(state, tmp_path, keep=3)
    DAMAGES[damage](newer)
    assert checkpoint.latest(tmp_path) == older
    assert not newer.exists() and newer.with_name(f"{newer.name}.damaged-1").exists()
    assert checkpoint.latest(tmp_path) == older


def test_any_flipped_bit_is_noticed(tmp_path):
    path = save(trained(1), tmp_path, keep=1)
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
    path = save(trained(1), tmp_path, keep=1)
    other = new_state(with_workload(CONFIG, model=MODEL.replace(**change)))
    before = tensors(other)
    [(name, value)] = change.items()
    both = f"a model with {name} .*, but the model of this run has {value}"
    with pytest.raises(CheckpointError, match=both):
        load(other, path)
    assert_equal(tensors(other), before)


def test_checkpoint_of_another_format_is_refused(tmp_path):
    path = save(trained(1), tmp_path, keep=1)
    manifest = artifacts.read_json(path / artifacts.MANIFEST)
    artifacts.write_json(path / artifacts.MANIFEST, manifest | {"format": 99})
    with pytest.raises(CheckpointError, match="format 99, but this version reads"):
        load(new_state(CONFIG), path)
    with pytest.raises(CheckpointError, match="format 99"):
        checkpoint.load_model(path)


def test_checkpoint_of_the_first_format_is_not_treated_as_damaged(tmp_path):
    """Its manifest had no checksum of its own."""
    path = save(trained(1), tmp_path, keep=1)
    manifest = artifacts.read_json(path / artifacts.MANIFEST)
    del manifest["sha256"]
    artifacts.write_json(path / artifacts.MANIFEST, manifest | {"format": 1})
    with pytest.raises(
        CheckpointError, match="format 1, but this version reads 2 to 4: resume with the"
    ):
        checkpoint.latest(tmp_path)
    assert path.exists()


def test_checkpoint_under_another_step_is_set_aside(tmp_path):
    path = save(trained(1), tmp_path, keep=1)
    path.rename(tmp_path / "step-00000009")
    assert checkpoint.latest(tmp_path) is None
    assert (tmp_path / "step-00000009.damaged-1").exists()


def test_checkpoint_without_its_tensors_is_refused(tmp_path):
    path = save(trained(1), tmp_path, keep=1)
    tensors_of(path).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load_model(path)


def test_model_alone_gives_the_same_logits(tmp_path):
    state = trained(2)
    model = checkpoint.load_model(save(state, tmp_path, keep=1))
    tokens = BATCHES.micro_batches(7)[0].inputs
    assert torch.equal(model(tokens), state.model(tokens))
    assert not model.training and isinstance(model.config, ModelConfig)


def test_checkpoint_of_a_longer_run_is_refused_before_anything_is_trained(tmp_path):
    shards, tokenizer = synthetic_rows(tmp_path)
    config = training_config(steps=2)
    job = training_job(tmp_path / "run", shards, tokenizer, config)
    state = new_state(training_config(steps=5))
    state.step = 5
    saver = Saver(job.folder.checkpoints, Retention(keep=1), tokenizer=tokenizer.fingerprint)
    saver.save(state)
    saver.wait()
    with pytest.raises(ValueError, match=r"step-00000005 is beyond --max-steps 2 of this run"):
        Session(job, Clock(time.time(), device="cpu"))


class Planted:
    """Creates a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


def test_pickle_planted_in_a_checkpoint_is_never_loaded(tmp_path):
    path = save(trained(1), tmp_path / "run", keep=1)
    for name in (".metadata", "state.pt", "model.bin", "__0_0.distcp"):
        (path / name).write_bytes(pickle.dumps(Planted(tmp_path / "ran")))
    checkpoint.load_model(path)
    load(new_state(CONFIG), path)
    assert checkpoint.latest(tmp_path / "run") is None, "files that its manifest does not list"
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Planted(tmp_path / "ran")))
    assert (tmp_path / "ran").exists(), "it would have worked"


def test_checkpoint_opens_as_a_model_of_hugging_face(tmp_path):
    state = trained(2)
    config = config_json(MODEL, context=12, end_of_text=0)
    saver = Saver(tmp_path, Retention(keep=1), tokenizer=TOKENIZER, config=config)
    saver.save(state)
    saver.wait()
    network = LlamaForCausalLM.from_pretrained(tmp_path / "step-00000002")
    tokens = BATCHES.micro_batches(7)[0].inputs
    with torch.no_grad():
        ours, theirs = state.model(tokens), network(tokens).logits
    assert torch.allclose(theirs, ours, atol=1e-5)  # fp32 sums in another order


def save_as_format_2(state: TrainState, folder: Path) -> Path:
    path = folder / f"step-{state.step:08d}"
    with artifacts.new_directory(path) as partial:
        tensors = checkpoint.state_tensors(state)
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(partial), no_dist=True)
        facts = {"step": state.step, "model": MODEL.model_dump(), "tokenizer": TOKENIZER}
        artifacts.seal(partial, facts | {"val_loss": None, "format": 2})
    return path


def test_checkpoint_of_an_earlier_version_is_resumed_with_a_warning(tmp_path, caplog):
    path = save_as_format_2(trained(3), tmp_path)
    assert checkpoint.latest(tmp_path) == path
    resumed = new_state(CONFIG)
    load(resumed, path)
    assert "which later versions will not read" in caplog.text
    for _ in train(resumed, BATCHES, CONFIG):
        pass
    assert_equal(tensors(resumed), tensors(trained(6)))
    logits = checkpoint.load_model(path)(BATCHES.micro_batches(7)[0].inputs)
    assert torch.equal(logits, trained(3).model(BATCHES.micro_batches(7)[0].inputs))


def save_as_format_3(state: TrainState, folder: Path) -> Path:
    """The files of format 4, with one sha256 for each file."""
    path = save(state, folder, keep=9)
    manifest = artifacts.read_signed(path / artifacts.MANIFEST)
    del manifest["files"]
    (path / artifacts.MANIFEST).unlink()
    artifacts.seal(path, manifest | {"format": 3})
    assert "chunk" not in (path / artifacts.MANIFEST).read_text()
    return path


def test_checkpoint_of_format_3_is_verified_and_resumed(tmp_path, caplog):
    path = save_as_format_3(trained(3), tmp_path)
    assert checkpoint.latest(tmp_path) == path
    resumed = new_state(CONFIG)
    load(resumed, path)
    assert "later versions" not in caplog.text
    for _ in train(resumed, BATCHES, CONFIG):
        pass
    assert_equal(tensors(resumed), tensors(trained(6)))
    flip_a_bit(tensors_of(path), 8 * 10_000)
    assert checkpoint.latest(tmp_path) is None
    assert "its sha256 differs" in caplog.text


def test_index_of_an_earlier_version_runs_no_code(tmp_path):
    path = save_as_format_2(trained(1), tmp_path / "checkpoints")
    index = path / ".metadata"
    sound = dcp.FileSystemReader(path).read_metadata()
    planted = [dataclasses.replace(sound, planner_data=Planted(tmp_path / "ran"))]
    as_bytes = sound.state_dict_metadata | {"skipped": BytesStorageMetadata()}
    planted.append(dataclasses.replace(sound, state_dict_metadata=as_bytes))
    for metadata, name in zip(planted, ("Path.touch", "BytesStorageMetadata"), strict=True):
        index.write_bytes(pickle.dumps(metadata))
        for read in (lambda: load(new_state(CONFIG), path), lambda: checkpoint.load_model(path)):
            with pytest.raises(ValueError, match=rf"metadata cannot be read: .*{name}.* run code"):
                read()
    assert not (tmp_path / "ran").exists()
    index.write_bytes(pickle.dumps(sound)[:-50])
    with pytest.raises(ValueError, match=r"metadata cannot be read"):
        checkpoint.load_model(path)


def test_tensor_of_another_shape_or_type_is_refused_with_both(tmp_path):
    write_file(tmp_path, {"x": torch.zeros(3, 2)}, streamed=True)
    with TensorFiles(tmp_path) as files:
        with pytest.raises(BadTensorFile, match=r"has x as \[3, 2\] .*needs \[2, 3\]"):
            files.read_into("x", torch.zeros(2, 3))
        with pytest.raises(BadTensorFile, match=r"of torch.float32, but .* of torch.int64"):
            files.read_into("x", torch.zeros(3, 2, dtype=torch.int64))
        with pytest.raises(BadTensorFile, match="no tensor y"):
            files.read_into("y", torch.zeros(1))


def write_file(
    folder: Path, tensors: dict[str, torch.Tensor], *, streamed: bool
) -> artifacts.ChunkedRecord:
    """Write a.safetensors, from the tensors themselves or from a copy of the whole file."""
    layout = FileLayout.of(tensors)
    content: FileStream | FileImage
    if streamed:
        content = FileStream(layout, tensors)
    else:
        content = FileImage(layout, pinned=False)
        for name, tensor in tensors.items():
            content.put(name, tensor)
    return chunked_files.write(folder, {"a.safetensors": content})["a.safetensors"]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("direct", [False, True])
def test_library_reads_the_files_and_their_records_match(tmp_path, monkeypatch, streamed, direct):
    monkeypatch.setattr(chunked_files, "CHUNK_BYTES", 2 * 4096)
    monkeypatch.setattr(tensor_files, "CHUNK_BYTES", 2 * 4096)
    if not direct:
        monkeypatch.setattr(chunked_files, "_DIRECT", 0)
    written = {
        "scalar": torch.tensor(3.5),
        "bits": torch.tensor([True, False, True]),
        "large": torch.randn(3, 4001),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "half": torch.randn(5, 3, dtype=torch.bfloat16),
        "across": torch.arange(12.0).view(3, 4).T,
        "none": torch.empty(0, 4),
    }
    record = write_file(tmp_path, written, streamed=streamed)
    assert_equal(load_file(tmp_path / "a.safetensors"), written)
    content = (tmp_path / "a.safetensors").read_bytes()
    chunks = [content[at : at + 2 * 4096] for at in range(0, len(content), 2 * 4096)]
    assert len(chunks) == 6 and record == artifacts.ChunkedRecord(
        bytes=len(content),
        chunk_bytes=2 * 4096,
        sha256_of_chunks=tuple(hashlib.sha256(chunk).hexdigest() for chunk in chunks),
    )


def test_chunks_are_written_while_later_tensors_are_still_being_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(chunked_files, "CHUNK_BYTES", 4096)
    parts = {name: torch.randn(4096) for name in "abc"}
    image = FileImage(FileLayout.of(parts), pinned=False)
    written = image.layout.spans["b"].start // 4096 * 4096
    file = tmp_path / "a.safetensors"
    with ThreadPoolExecutor(1) as pool:
        saved = pool.submit(chunked_files.write, tmp_path, {file.name: image})
        image.put("a", parts["a"])
        deadline = time.monotonic() + HANG_SECONDS
        while time.monotonic() < deadline and not (file.exists() and file.stat().st_size):
            time.sleep(0.01)
        size = file.stat().st_size
        image.put("b", parts["b"])
        image.put("c", parts["c"])
    assert 0 < size <= written and saved.result().keys() == {file.name}
    assert_equal(load_file(file), parts)


def test_failed_copy_leaves_no_checkpoint(tmp_path, monkeypatch):
    older = save(trained(1), tmp_path, keep=2)
    put = FileImage.put

    def fails(image, name, tensor):
        if name == "skipped":
            raise torch.OutOfMemoryError("no memory to gather a tensor")
        put(image, name, tensor)

    monkeypatch.setattr(FileImage, "put", fails)
    saver = Saver(tmp_path, Retention(keep=2), tokenizer=TOKENIZER)
    with pytest.raises(torch.OutOfMemoryError):
        saver.save(trained(2))
    saver.wait()
    assert list(tmp_path.iterdir()) == [older]


def test_write_that_waits_for_a_tensor_ends_when_its_copy_fails(tmp_path):
    image = FileImage(FileLayout.of({"x": torch.zeros(3)}), pinned=False)
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(chunked_files.write, tmp_path, {"a.safetensors": image})
        image.abandon()
    with pytest.raises(RuntimeError, match="could not be copied"):
        written.result()


def test_disk_that_refuses_direct_writes_is_written_buffered(tmp_path, monkeypatch):
    real = os.pwrite

    def pwrite(file, content, position):
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "its blocks are larger")
        return real(file, content, position)

    monkeypatch.setattr(os, "pwrite", pwrite)
    written = {"x": torch.randn(100, 100)}
    write_file(tmp_path, written, streamed=False)
    assert_equal(load_file(tmp_path / "a.safetensors"), written)


def test_damaged_chunk_is_named_and_the_checkpoint_before_is_used(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(chunked_files, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(artifacts, "_LARGE_BYTES", 0)
    state = trained(1)
    older = save(state, tmp_path, keep=3)
    state.step = 2
    newer = save(state, tmp_path, keep=3)
    flip_a_bit(newer / "state.safetensors", 8 * 10_000)
    assert checkpoint.latest(tmp_path) == older
    assert "state.safetensors was changed: its sha256 differs in bytes 8192 to 12287" in caplog.text
