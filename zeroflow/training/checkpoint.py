"""Save a TrainState, find the newest good one, load it.

A checkpoint is a directory `step-00000100/` with the tensors as PyTorch writes them
(`torch.distributed.checkpoint`, which reshards on load), the rest of the state in the manifest,
and the sha256 of every file: PyTorch's loader returns wrong values for most flipped bits without
an error. It appears under its name when all of it is on the disk.
"""

import logging
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from zeroflow import artifacts
from zeroflow.model.llama import Llama, ModelConfig
from zeroflow.training.loop import TrainState

log = logging.getLogger(__name__)

_FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that does not belong to the model or cannot be read."""


def save(state: TrainState, folder: Path, *, keep: int) -> Path:
    """Write `state` as `folder/step-N`, then remove all but the newest `keep`."""
    path = folder / f"step-{state.step:08d}"
    if path.exists():
        return path
    with artifacts.new_directory(path) as partial:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # of one process
            dcp.save(_tensors(state), storage_writer=FileSystemWriter(partial), no_dist=True)
        facts = {"format": _FORMAT, "step": state.step, "model": state.model.config.model_dump()}
        artifacts.seal(partial, facts)
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def latest(folder: Path) -> Path | None:
    """The newest checkpoint whose files are what was written; damaged ones are set aside."""
    for path in reversed(_all(folder)):
        try:
            artifacts.verify(path)
            return path
        except artifacts.DamagedArtifact as damage:
            artifacts.set_aside(path, damage)
    return None


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def load(state: TrainState, path: Path) -> None:
    """Set `state` to what `path` holds, in place.

    Raises:
        CheckpointError: it was written by another format or for another model.
    """
    manifest = _manifest(path)
    _require_same_model(state.model.config, ModelConfig(**manifest["model"]), path)
    tensors = _tensors(state)
    if not _has(path, "random.cuda"):
        tensors.pop("random.cuda", None)  # it was written by a run on a CPU
    _read(tensors, path)
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"])
    state.step = manifest["step"]


def load_model(path: Path) -> Llama:
    """The model of a checkpoint, on the CPU, without the optimiser."""
    with torch.device("meta"):
        model = Llama(ModelConfig(**_manifest(path)["model"]))
    model = model.to_empty(device="cpu")
    _read({f"model.{name}": tensor for name, tensor in model.state_dict().items()}, path)
    return model.eval()


def _tensors(state: TrainState) -> dict[str, Tensor]:
    """Every tensor of the state by a name that depends on no device count."""
    tensors = {"random.cpu": torch.get_rng_state()}
    if next(state.model.parameters()).is_cuda:
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    for name, parameter in state.model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in state.optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def _read(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # of one process
            dcp.load(tensors, storage_reader=FileSystemReader(path), no_dist=True)
    except dcp.api.CheckpointException as error:  # a BaseException, which nobody would catch
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _has(path: Path, name: str) -> bool:
    return name in FileSystemReader(path).read_metadata().state_dict_metadata


def _manifest(path: Path) -> dict[str, Any]:
    manifest = artifacts.read_json(path / artifacts.MANIFEST)
    if manifest["format"] != _FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {manifest['format']}, this version reads {_FORMAT}"
        )
    return manifest


def _require_same_model(ours: ModelConfig, theirs: ModelConfig, path: Path) -> None:
    for name in ModelConfig.model_fields:
        if (mine := getattr(ours, name)) != (other := getattr(theirs, name)):
            raise CheckpointError(f"{path} was written with {name} {other}, this run has {mine}")


def _all(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name))
