"""Files in the safetensors format: a JSON header, then the raw bytes of tensors.

Source: https://huggingface.co/docs/safetensors/index#format
"""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from zeroflow.training import zero
from zeroflow.training.chunked_files import CHUNK_BYTES
from zeroflow.training.host_memory import HostMemory

if TYPE_CHECKING:
    from safetensors import safe_open

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


class FileLayout(NamedTuple):
    """Positions of the tensors in a file."""

    header: bytes
    spans: dict[str, slice]
    """Bytes of each tensor in the file, by name, in their order."""

    size: int

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "FileLayout":
        """Return the layout of a file with `tensors`, which may be sharded."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}  # required by transformers
        places, end = {}, 0
        for name, tensor in tensors.items():
            begin, end = end, end + tensor.nbytes
            places[name] = (begin, end)
            entries[name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        header = len(text).to_bytes(8, "little") + text
        spans = {
            name: slice(len(header) + begin, len(header) + end)
            for name, (begin, end) in places.items()
        }
        return cls(header, spans, len(header) + end)


class FileImage:
    """A whole file in host memory, which is written while tensors are still being copied to it.

    The next checkpoint reuses the memory.
    """

    def __init__(self, layout: FileLayout, *, pinned: bool) -> None:
        self.layout, self.size = layout, layout.size
        self._memory = HostMemory(self.size, pinned=pinned)
        header = torch.frombuffer(bytearray(layout.header), dtype=torch.uint8)
        self._memory.bytes[: len(header)] = header
        self._changed, self._copies = threading.Condition(), list[_Copy]()
        self.clear()

    def clear(self) -> None:
        """Forget the tensors. Then every tensor has to be put, in the order of the layout."""
        self._copies = [_Copy(end=len(self.layout.header), done=None)]

    def put(self, name: str, tensor: Tensor) -> None:
        """Copy a whole tensor into the file. From a GPU, the copy is only queued."""
        span = self.layout.spans[name]
        self._memory.bytes[span].copy_(_bytes_of(tensor), non_blocking=True)
        done = self._copies[-1].done
        if tensor.is_cuda:
            done = torch.cuda.Event(blocking=True)
            done.record()
        self._add(_Copy(span.stop, done))

    def abandon(self) -> None:
        """Let `read` fail, because the remaining tensors will not be put."""
        self._add(_Copy(end=None, done=None))

    def read(self, begin: int, end: int) -> memoryview:
        """Return the bytes from `begin` to `end`, and wait for their tensors."""

        def last() -> _Copy | None:
            return next(
                (copy for copy in self._copies if copy.end is None or copy.end >= end), None
            )

        with self._changed:
            self._changed.wait_for(last)
            copy = last()
        assert copy
        if copy.end is None:
            raise RuntimeError("a tensor could not be copied")
        if copy.done:
            copy.done.synchronize()
        return self._memory.bytes[begin:end].numpy().data

    def _add(self, copy: "_Copy") -> None:
        with self._changed:
            self._copies.append(copy)
            self._changed.notify_all()


class _Copy(NamedTuple):
    """A tensor that was copied to a file."""

    end: int | None
    """End of the bytes in the file that were copied so far; None after a failure."""

    done: torch.cuda.Event | None
    """Recorded after the last copy from a GPU."""


class FileStream:
    """A file whose tensors are copied from their device chunk by chunk while it is written."""

    def __init__(self, layout: FileLayout, tensors: Mapping[str, Tensor]) -> None:
        self.layout, self.size = layout, layout.size
        header = torch.frombuffer(bytearray(layout.header), dtype=torch.uint8)
        self._parts = [(slice(0, len(header)), header)]
        self._parts += [(layout.spans[name], _bytes_of(t)) for name, t in tensors.items()]
        self._buffers = threading.local()

    def read(self, begin: int, end: int) -> memoryview:
        if not hasattr(self._buffers, "memory"):
            self._buffers.memory = HostMemory(CHUNK_BYTES)
        chunk: Tensor = self._buffers.memory.bytes[: end - begin]
        for span, content in self._parts:
            first, last = max(begin, span.start), min(end, span.stop)
            if first < last:
                part = content[first - span.start : last - span.start]
                chunk[first - begin : last - begin].copy_(part)
        return chunk.numpy().data


TensorFile = FileImage | FileStream


def _bytes_of(tensor: Tensor) -> Tensor:
    """Return the content of a tensor on its device, as a vector of bytes."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


class TensorFiles:
    """The tensors in all files of a folder, by name. A tensor is read when it is requested."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._file_of: dict[str, safe_open] = {}

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

    def _file(self, name: str) -> "safe_open":
        if name not in self._file_of:
            raise BadTensorFile(f"{self._folder} has no tensor {name}")
        return self._file_of[name]


def digest(tensor: Tensor) -> str:
    """Return the sha256 of the bytes of a tensor."""
    return hashlib.sha256(_bytes_of(tensor).cpu().numpy().data).hexdigest()
