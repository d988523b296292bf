"""Assertions on the end of a run: the same bits as another run, and no process left."""

from pathlib import Path

import torch
from patience import wait_until
from pipeline import processes_of
from safetensors.torch import load_file

from zeroflow.run_folder import RunFolder
from zeroflow.training import checkpoint
from zeroflow.training.job import TrainResult
from zeroflow.training.metrics import METRICS


def assert_same_end(stopped: Path, undisturbed: Path, *, but: tuple[str, ...] = ()) -> None:
    """
    Args:
        but: logged numbers that are not compared.
    """
    folders = (RunFolder(stopped), RunFolder(undisturbed))
    newest = [checkpoint.latest(folder.checkpoints) for folder in folders]
    assert newest[0].name == newest[1].name
    ours, theirs = map(read_tensors, newest)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    keys = ("step", "tokens", "loss", "grad_norm", "lr", "val_loss", "sample")
    keys = tuple(key for key in keys if key not in but)
    records, expected = (
        [[getattr(r, key, None) for key in keys] for r in METRICS.read(f.metrics)] for f in folders
    )
    assert records == expected, "every logged number, each once"
    keys = ("train_loss", "val_loss", "first_val_loss", "sample")
    keys = tuple(key for key in keys if key not in but)
    result, expected = (
        [getattr(TrainResult.read(f.training), key) for key in keys] for f in folders
    )
    assert result == expected


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint, read by the libraries of its format."""
    if list(path.glob("*.distcp")):
        return _read_format_2(path)
    tensors: dict[str, torch.Tensor] = {}
    for file in path.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def _read_format_2(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors, read by PyTorch's own converter, with the names of today's files."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    target = path.parent / "all.pt"
    dcp_to_torch_save(path, target)
    tensors: dict[str, torch.Tensor] = torch.load(target, weights_only=True)
    target.unlink()
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def wait_until_gone(cache: Path) -> None:
    wait_until(lambda: not processes_of(cache), "the end of all processes")
