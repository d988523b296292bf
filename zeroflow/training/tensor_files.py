"""Files in the safetensors format: a JSON header, then the raw bytes of tensors.

Source: https://huggingface.co/docs/safetensors/index#format
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zeroflow.artifacts import WRITE_BYTES, FileRecord
from zeroflow.training import zero

SUFFIX = ".safetensors"

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of data types in the format, by PyTorch's types."""

_ALIGNMENT = 8
"""The data must begin at a multiple of this, so that 64-bit numbers can be mapped into memory."""


class BadTensorFile(ValueError):
    """A file has another format, or does not contain the requested tensor."""


def write(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write `tensors` in one pass and return the file's entry in a manifest.

    Each tensor is copied from its device when it is written, and hashed at the same time. The
    writer of the safetensors library would need all tensors in host memory at once, and the hash
    would need a second pass over the file.
    """
    header = _header(tensors)
    digest, size = hashlib.sha256(header), len(header)
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as thread:
        _write_all(file, memoryview(header))
        for tensor in tensors.values():
            content = _bytes_of(tensor)
            hashed = thread.submit(digest.update, content)
            _write_all(file, content)
            hashed.result()
            size += len(content)
        os.fsync(file.fileno())
    return FileRecord(size, digest.hexdigest())


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # required by transformers
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _write_all(file: Any, content: memoryview) -> None:
    while content:
        content = content[file.write(content[:WRITE_BYTES]) :]


class TensorFiles:
    """The tensors in all files of a folder, by name. A tensor is read when it is requested."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._file_of: dict[str, Any] = {}

    def __enter__(self) -> "TensorFiles":
        """
        Raises:
            BadTensorFile: a file cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        with ExitStack() as opened:
            for path in sorted(self._folder.glob(f"*{SUFFIX}")):
                try:
                    file = opened.enter_context(safe_open(path, framework="pt"))
                except (OSError, SafetensorError) as error:
                    raise BadTensorFile(f"{path} cannot be read: {error}") from error
                self._file_of |= dict.fromkeys(file.keys(), file)
            self._stack = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._file_of))

    def read(self, name: str) -> Tensor:
        """Return a whole tensor."""
        tensor: Tensor = self._file(name).get_tensor(name)
        return tensor

    def read_into(self, name: str, target: Tensor) -> None:
        """Copy a tensor, or this rank's shard of it, into `target`.

        For a sharded target, only the rows of the shard are read from the file.

        Raises:
            BadTensorFile: there is no such tensor, or it has another shape or type.
        """
        local = zero.local_shard(target)
        if not target.dim():  # safetensors cannot slice a scalar
            stored = self.read(name)
            shape, found = list(stored.shape), stored
        else:
            piece = self._file(name).get_slice(name)
            shape, found = piece.get_shape(), piece[zero.local_rows(target)]
        if shape != list(target.shape) or found.dtype != local.dtype:
            raise BadTensorFile(
                f"{self._folder} has {name} as {shape} of {found.dtype}, but the run needs "
                f"{list(target.shape)} of {local.dtype}"
            )
        local.copy_(found)

    def _file(self, name: str) -> Any:
        if name not in self._file_of:
            raise BadTensorFile(f"{self._folder} has no tensor {name}")
        return self._file_of[name]


def digest(tensor: Tensor) -> str:
    """Return the sha256 of the bytes of a tensor."""
    return hashlib.sha256(_bytes_of(tensor)).hexdigest()
