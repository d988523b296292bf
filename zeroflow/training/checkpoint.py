"""The checkpoints of a run: their format, finding one that is intact, and loading it.

A checkpoint is a directory `step-00000100/`:

    config.json           the model's configuration, in the format of Hugging Face
    model*.safetensors    the weights, by Hugging Face's names
    state*.safetensors    the rest of the state: optimiser and PyTorch's random state
    manifest.json         step and model, and size and sha256 of every file or of its chunks

`transformers` opens it as a model. Each tensor is written whole by one rank, its owner; each rank
writes its own files. Because tensors are whole, any number of ranks can read them at any ZeRO
stage, each rank only the rows of its shard. No file can contain code. The directory gets its name
when all its files are on disk.
"""

import logging
import math
import re
import shutil
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from zeroflow import artifacts
from zeroflow.artifacts import JsonObject
from zeroflow.model.llama import Llama, ModelConfig
from zeroflow.records import Record
from zeroflow.training import older_checkpoints, tensor_files, zero
from zeroflow.training.state import TrainState
from zeroflow.training.tensor_files import BadTensorFile, TensorFiles

log = logging.getLogger(__name__)

_RANDOM_CPU, _RANDOM_CUDA = "random.cpu.rank0", "random.cuda.rank0"
"""Names of the random states. Only that of rank 0 is stored: a step uses no random numbers, and a
checkpoint must not depend on the number of ranks."""

MODEL = "model."
"""Prefix of weights among the tensors of the state."""

_OLDEST_FORMAT = 2
"""Oldest format that is read; see `older_checkpoints`. Format 3 has the same files as format 4, and
one sha256 for each."""


Which = int | Literal["newest", "best"]
"""A checkpoint of a run: that of a step, the newest, or the one with the lowest validation loss."""


class CheckpointError(ValueError):
    """A checkpoint does not belong to the run, or cannot be read."""


class CheckpointFacts(Record):
    """The manifest of a checkpoint, without the list of files."""

    FORMAT: ClassVar[int] = 4

    step: int
    model: ModelConfig
    tokenizer: str
    """Fingerprint of the tokenizer whose ids the model is trained on."""

    val_loss: float | None
    """Validation loss of this exact state, if it was measured."""


def best(folder: Path) -> Path | None:
    """Return the checkpoint with the lowest measured validation loss."""
    losses = {}
    for path in complete(folder):
        try:
            facts = artifacts.read_signed(path / artifacts.MANIFEST)
            loss = CheckpointFacts.model_validate(facts).val_loss
        except ValueError:
            continue  # damaged or of another format: `latest` reports it
        if loss is not None and math.isfinite(loss):
            losses[path] = loss
    return min(losses, key=lambda path: losses[path], default=None)


def unfinished(folder: Path) -> list[int]:
    """Return the steps of checkpoints that are being written or were left half written."""
    return sorted(map(step_of, _partial(folder)))


def clear_unfinished(folder: Path) -> None:
    """Remove checkpoints that killed processes left half written."""
    for path in _partial(folder):
        shutil.rmtree(path, ignore_errors=True)


def _partial(folder: Path) -> list[Path]:
    return list(folder.glob(".step-*.partial"))


def latest(folder: Path) -> Path | None:
    """Return the newest checkpoint whose files verify; set damaged ones aside.

    Raises:
        CheckpointError: its format belongs to another version of zeroflow.
    """
    for path in reversed(complete(folder)):
        try:
            if (step := artifacts.verify(path)["step"]) != step_of(path):
                raise artifacts.DamagedArtifact(f"{path} has the state of step {step}")
            return path
        except artifacts.DamagedArtifact as damage:
            _refuse_unsigned_format(path)
            artifacts.set_aside(path, damage)
    return None


def find(folder: Path, which: Which = "newest") -> Path:
    """Return a checkpoint in `folder` whose files verify.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or its format belongs to
            another version of zeroflow. The message lists the steps of those that exist.
    """
    if which == "newest":
        path = latest(folder)
    elif which == "best":
        path = best(folder)
    else:
        path = next((path for path in complete(folder) if step_of(path) == which), None)
    if path is None:
        steps = ", ".join(str(step_of(path)) for path in complete(folder))
        if not steps:
            raise CheckpointError(f"there is no checkpoint yet in {folder}")
        wanted = "with a validation loss" if which == "best" else f"of step {which}"
        raise CheckpointError(f"{folder} has no checkpoint {wanted}, only of steps {steps}")
    if which != "newest":  # `latest` has verified the newest one
        try:
            artifacts.verify(path)
        except artifacts.DamagedArtifact as damage:
            _refuse_unsigned_format(path)
            raise CheckpointError(f"this checkpoint is damaged: {damage}") from damage
    return path


def newest_step(folder: Path) -> int:
    """Return the step of the newest checkpoint, without verifying it; 0 if there is none."""
    return max(map(step_of, complete(folder)), default=0)


def newest_facts(folder: Path) -> CheckpointFacts | None:
    """Return the facts of the newest checkpoint with a readable manifest; None if there is none.

    Raises:
        CheckpointError: its format belongs to another version of zeroflow.
    """
    found = _newest_readable(folder)
    return found and found[1]


def require_resumable(folder: Path, model: ModelConfig, *, tokenizer: str) -> None:
    """Check that training can resume from the newest checkpoint in `folder`, if there is one.

    Raises:
        CheckpointError: its format, model or tokenizer differs.
    """
    if found := _newest_readable(folder):
        path, facts = found
        _require_same(facts, path, model, tokenizer)


def require_same(path: Path, model: ModelConfig, *, tokenizer: str) -> None:
    """Check that the checkpoint `path` is one of a run.

    Raises:
        CheckpointError: its format, model or tokenizer differs.
    """
    _require_same(_facts(path), path, model, tokenizer)


def _newest_readable(folder: Path) -> tuple[Path, CheckpointFacts] | None:
    for path in reversed(complete(folder)):
        try:
            manifest = artifacts.read_signed(path / artifacts.MANIFEST)
        except artifacts.DamagedArtifact:
            _refuse_unsigned_format(path)
            continue  # `latest` sets it aside
        _require_known_format(path, manifest)
        return path, CheckpointFacts.model_validate(manifest)
    return None


def step_of(path: Path) -> int:
    return int("".join(filter(str.isdigit, path.name)))


def load(state: TrainState, path: Path, *, tokenizer: str) -> None:
    """Load the checkpoint `path` into `state`, in place, and restore PyTorch's random state.

    Args:
        tokenizer: fingerprint of the run's tokenizer.

    Raises:
        CheckpointError: the checkpoint's format, model or tokenizer differs.
    """
    facts = _facts(path)
    if _is_older(path):
        log.warning(
            "%s has format %d, which later versions will not read: the next checkpoint is "
            "written in format %d",
            *(path, _OLDEST_FORMAT, CheckpointFacts.FORMAT),
        )
    _require_same(facts, path, state.model.config, tokenizer)
    tensors = state_tensors(state)
    if _RANDOM_CUDA not in _names(path):
        tensors.pop(_RANDOM_CUDA, None)  # the checkpoint was written on a CPU
    _read(tensors, path)
    torch.set_rng_state(tensors[_RANDOM_CPU])
    if _RANDOM_CUDA in tensors:
        torch.cuda.set_rng_state(tensors[_RANDOM_CUDA])
    state.step = facts.step


def load_model(path: Path) -> Llama:
    """Return the model of a checkpoint on the CPU, without the optimiser."""
    with torch.device("meta"):
        model = Llama(_facts(path).model)
    model = model.to_empty(device="cpu")
    _read({f"model.{name}": tensor for name, tensor in model.state_dict().items()}, path)
    return model.eval()


def read_facts(path: Path) -> CheckpointFacts:
    """Return the facts of the checkpoint `path`.

    Raises:
        CheckpointError: its format belongs to another version of zeroflow.
    """
    return _facts(path)


def digests(path: Path) -> dict[str, str]:
    """Return the sha256 of the bytes of every tensor in a checkpoint, by name."""
    if _is_older(path):
        names = sorted(older_checkpoints.stored(path))
        return {name: tensor_files.digest(older_checkpoints.read_one(path, name)) for name in names}
    with TensorFiles(path) as files:
        return {name: tensor_files.digest(files.read(name)) for name in files}


def state_tensors(state: TrainState) -> dict[str, Tensor]:
    """Return all tensors of the state by name; names do not depend on the number of ranks."""
    tensors = {_RANDOM_CPU: torch.get_rng_state(), "skipped": state.skipped}
    if state.skipped.is_cuda:
        tensors[_RANDOM_CUDA] = torch.cuda.get_rng_state()
    for name, parameter in zero.named_parameters(state.model):
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in state.optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def _read(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        if _is_older(path):
            older_checkpoints.read(tensors, path)
            return
        with TensorFiles(path) as files:
            for name, tensor in tensors.items():
                files.read_into(name.removeprefix(MODEL), tensor)
    except BadTensorFile as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error


def _names(path: Path) -> set[str]:
    """Return the names of the tensors in a checkpoint."""
    if _is_older(path):
        return set(older_checkpoints.stored(path))
    with TensorFiles(path) as files:
        return set(files)


def _is_older(path: Path) -> bool:
    return _manifest(path)["format"] == _OLDEST_FORMAT


def _facts(path: Path) -> CheckpointFacts:
    return CheckpointFacts.model_validate(_manifest(path))


def _manifest(path: Path) -> JsonObject:
    """
    Raises:
        CheckpointError: the format is one that this version does not read.
    """
    manifest: JsonObject = artifacts.read_json(path / artifacts.MANIFEST)
    _require_known_format(path, manifest)
    return manifest


def _require_known_format(path: Path, manifest: JsonObject) -> None:
    if (found := manifest["format"]) not in range(_OLDEST_FORMAT, CheckpointFacts.FORMAT + 1):
        raise CheckpointError(
            f"{path} has checkpoint format {found}, but this version reads {_OLDEST_FORMAT} to "
            f"{CheckpointFacts.FORMAT}: resume with the version that wrote it, or start over under "
            "another --run-name"
        )


def _refuse_unsigned_format(path: Path) -> None:
    """Refuse a manifest of format 1, which has no checksum, and is therefore not damaged."""
    try:
        manifest = artifacts.read_json(path / artifacts.MANIFEST)
    except (OSError, ValueError):
        return
    if isinstance(manifest, dict) and manifest.get("format") == 1 and "sha256" not in manifest:
        _require_known_format(path, manifest)


def _require_same(facts: CheckpointFacts, path: Path, model: ModelConfig, tokenizer: str) -> None:
    for name in ModelConfig.model_fields:
        if (mine := getattr(model, name)) != (other := getattr(facts.model, name)):
            raise CheckpointError(
                f"{path} has a model with {name} {other}, but the model of this run has {mine}"
            )
    if facts.tokenizer != tokenizer:
        raise CheckpointError(
            f"{path} was trained on ids of tokenizer {facts.tokenizer}, but this run has "
            f"tokenizer {tokenizer}: restore the earlier files of the tokenizer and run the same "
            "command again, or use another --run-name"
        )


def complete(folder: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    named = (path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name))
    return sorted(path for path in named if path.is_dir())
