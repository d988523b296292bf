"""Reads checkpoints of format 2, which `torch.distributed.checkpoint` wrote.

The index of such a checkpoint is a pickle, and reading a pickle can run code. Therefore only the
few classes that an index needs are allowed.
"""

import pickle
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

_INDEX = ".metadata"

# BytesStorageMetadata is left out: PyTorch unpickles the bytes that it describes, which may be code
_CLASSES = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("TensorStorageMetadata", "ChunkStorageMetadata"),
    )
}
_CLASSES |= {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
}


def stored(path: Path) -> "dict[str, TensorStorageMetadata]":
    """Return the metadata of a checkpoint's tensors, by name.

    Raises:
        ValueError: the index cannot be read, or contains another class.
    """
    index = _index(path).state_dict_metadata
    assert isinstance(index, dict)
    return index


def _index(path: Path) -> Any:
    try:
        with (path / _INDEX).open("rb") as file:
            return _Unpickler(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError) as error:
        raise ValueError(f"{path / _INDEX} cannot be read: {error}") from error


class _Unpickler(pickle.Unpickler):
    """Reads an index, and refuses every class that an index does not need."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _CLASSES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(
            f"it contains {module}.{name}, which no index needs and which could run code: use a "
            "checkpoint from another source"
        )


def _reader(path: Path) -> "FileSystemReader":
    from torch.distributed.checkpoint import FileSystemReader

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            metadata = _index(path)
            metadata.storage_meta.load_id = self.load_id
            return metadata

    return Reader(path)


def read(tensors: dict[str, Tensor], path: Path) -> None:
    """Read `tensors` in place, resharded.

    Raises:
        ValueError: the checkpoint cannot be read.
    """
    import torch.distributed.checkpoint as dcp

    stored(path)  # checked first, because its errors fit on one line
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # no process group
            dcp.load(tensors, storage_reader=_reader(path), no_dist=True)
    except dcp.api.CheckpointException as error:  # a BaseException, which callers do not catch
        raise ValueError(f"{path} cannot be read: {error}") from error


def read_one(path: Path, name: str) -> Tensor:
    entry = stored(path)[name]
    tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
    read({name: tensor}, path)
    return tensor
