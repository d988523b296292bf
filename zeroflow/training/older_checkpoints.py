"""Tensors of checkpoints of format 2, as `torch.distributed.checkpoint` wrote them.

Its index is a pickle, which could run code when it is read: only the few classes of an index are
let through.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def stored(path: Path) -> dict[str, Any]:
    """Return the metadata of a checkpoint's tensors, by name."""
    from torch.distributed.checkpoint import FileSystemReader

    return FileSystemReader(path).read_metadata().state_dict_metadata


def read(tensors: dict[str, Tensor], path: Path) -> None:
    """Read `tensors` in place, resharded.

    Raises:
        ValueError: the checkpoint cannot be read.
    """
    import torch.distributed.checkpoint as dcp

    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # no process group
            dcp.load(tensors, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    except dcp.api.CheckpointException as error:  # a BaseException, which no caller catches
        raise ValueError(f"{path} cannot be read: {error}") from error


def read_one(path: Path, name: str) -> Tensor:
    entry = stored(path)[name]
    tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
    read({name: tensor}, path)
    return tensor
