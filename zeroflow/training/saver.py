"""Write checkpoints in background threads, while training continues."""

import errno
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor

from zeroflow import artifacts
from zeroflow.artifacts import ChunkedRecord, JsonObject
from zeroflow.training import checkpoint, chunked_files, zero
from zeroflow.training.checkpoint import MODEL, CheckpointFacts
from zeroflow.training.retention import Retention, retire
from zeroflow.training.state import TrainState
from zeroflow.training.tensor_files import SUFFIX, FileImage, FileLayout, FileStream, TensorFile
from zeroflow.units import decimal

_OVERHEAD_BYTES = 2**20
"""Maximum size of a checkpoint's index, manifest and directory."""


class Saver:
    """Writes checkpoints of a state into a folder, in background threads.

    Training waits until the previous write has ended and the state is copied to host memory, in the
    form of the files. From a GPU, the write begins with the first copied chunk. The next checkpoint
    reuses the memory, because pinning it takes time. On one rank, if the copy would take more than
    half of the free memory, training waits for the write instead.

    Every rank calls `save`. A sharded state is gathered one tensor at a time, and each tensor is
    copied and written by one rank, its owner. So a host needs memory for the tensors that its ranks
    own, and a device for one gathered tensor.
    """

    def __init__(
        self,
        folder: Path,
        retention: Retention,
        *,
        tokenizer: str,
        config: JsonObject | None = None,
        on_saved: Callable[[Path, float], None] = lambda path, seconds: None,
    ) -> None:
        """
        Args:
            tokenizer: fingerprint of the tokenizer whose ids the model is trained on.
            config: content of config.json; None if no one will open the checkpoint as a model.
            on_saved: called in rank 0's writing thread when a checkpoint is complete, with its path
                and the seconds since training began to wait for the copy.
        """
        self._folder, self._retention, self._tokenizer = folder, retention, tokenizer
        self._config, self._on_saved = config, on_saved
        self._group = zero.side_group()
        self._images: dict[str, FileImage] = {}
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(
        self, state: TrainState, *, val_loss: float | None = None, promised: bool = True
    ) -> bool:
        """Start writing `state` as `folder/step-N`, unless it exists.

        Args:
            val_loss: validation loss of this state, if it was measured.
            promised: wait for the previous write to end; otherwise nothing is saved before it ends.

        Returns:
            False if nothing was saved because the previous write has not ended.

        Raises:
            OSError: the disk lacks space, so nothing was written; or the previous write failed.
        """
        if not promised and zero.is_any(self._is_writing()):
            return False
        self.wait()
        path = self._folder / f"step-{state.step:08d}"
        if zero.on_rank0(path.exists):
            return True
        zero.on_rank0(lambda: self.require_room(state))
        tensors = checkpoint.state_tensors(state)
        facts = CheckpointFacts(
            step=state.step,
            model=state.model.config,
            tokenizer=self._tokenizer,
            val_loss=val_loss,
        )
        files = _own_files(tensors)
        began = time.perf_counter()
        if zero.ranks() == 1 and not self._may_copy(tensors):
            whole = {
                file: {name: zero.full_tensor(tensor) for name, tensor in own.items()}
                for file, own in files.items()
            }
            streams = {name: FileStream(FileLayout.of(own), own) for name, own in whole.items()}
            self._write(path, streams, facts, began)
            return True
        on_gpu = any(t.is_cuda for name, t in tensors.items() if name.startswith(MODEL))
        self._prepare(files, pinned=on_gpu)
        thread = threading.Thread(
            target=self._write_aside,
            args=(path, self._images, facts, began),
            name="checkpoint",
            daemon=True,
        )
        if on_gpu:
            thread.start()
        self._copy(tensors, files)
        if not on_gpu:  # the threads that hash would slow down the copy, for which training waits
            thread.start()
        self._thread = thread
        return True

    def wait(self) -> None:
        """Wait until the current write has ended.

        Raises:
            OSError: the write failed.
        """
        if self._thread:
            self._thread.join()
            self._thread = None
        if failure := self._failure:
            self._failure = None
            raise failure

    def require_room(self, state: TrainState) -> None:
        """Check that a checkpoint of `state` fits on the disk.

        Raises:
            OSError: the checkpoint does not fit.
        """
        needed = (
            sum(tensor.nbytes for tensor in checkpoint.state_tensors(state).values())
            + _OVERHEAD_BYTES
        )
        self._folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"a checkpoint takes {decimal(needed)}, but {self._folder} has room for "
                f"{decimal(free)}: free some space or move the cache (--cache-dir); existing "
                "checkpoints are kept, and the same command resumes from the newest",
            )

    def _is_writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _may_copy(self, tensors: dict[str, Tensor]) -> bool:
        needed = sum(tensor.nbytes for tensor in tensors.values())
        return bool(self._images) or needed < psutil.virtual_memory().available / 2

    def _prepare(self, files: dict[str, dict[str, Tensor]], *, pinned: bool) -> None:
        """Allocate host memory for this rank's `files`, or clear that of the last checkpoint."""
        layouts = {name: FileLayout.of(own) for name, own in files.items()}
        if layouts != {name: image.layout for name, image in self._images.items()}:
            self._images.clear()
            for name, layout in layouts.items():
                self._images[name] = FileImage(layout, pinned=pinned)
        for image in self._images.values():
            image.clear()

    def _copy(self, tensors: dict[str, Tensor], files: dict[str, dict[str, Tensor]]) -> None:
        """Copy this rank's `files` into host memory, in the form in which they are written."""
        image_of = {name: self._images[file] for file, own in files.items() for name in own}
        try:
            for name, tensor in tensors.items():
                whole = zero.full_tensor(tensor)  # a collective: all ranks call it in this order
                if image := image_of.get(stored := name.removeprefix(MODEL)):
                    image.put(stored, whole)
        except BaseException:
            for image in self._images.values():
                image.abandon()
            raise
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()

    def _write_aside(self, *inputs: Any) -> None:
        try:
            self._write(*inputs)
        except BaseException as error:
            self._failure = error

    def _write(
        self, path: Path, contents: Mapping[str, TensorFile], facts: CheckpointFacts, began: float
    ) -> None:
        """Write this rank's files. Rank 0 also creates the directory, and seals it at the end."""
        with ExitStack() as stack:

            def begin() -> Path | None:
                if zero.rank() > 0:
                    return None
                return stack.enter_context(artifacts.new_directory(path))

            [partial, *_] = zero.on_all_ranks(begin, self._group)
            assert partial is not None
            written = zero.on_all_ranks(lambda: _write_files(partial, contents), self._group)
            if zero.rank() > 0:
                return
            if self._config is not None:
                artifacts.write_json(partial / "config.json", self._config)
            if zero.ranks() > 1:
                artifacts.write_json(partial / "model.safetensors.index.json", _index(written))
            records = {name: file.record for files in written for name, file in files.items()}
            artifacts.seal(partial, facts.as_json(), records)
        self._on_saved(path, time.perf_counter() - began)
        retire(self._folder, self._retention)


def _own_files(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of this rank's files: a file of weights and one of the other tensors."""
    owner = _owners(tensors, zero.ranks())
    number = f"-{zero.rank() + 1:05d}-of-{zero.ranks():05d}" if zero.ranks() > 1 else ""
    files: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if owner[name] == zero.rank():
            kind = "model" if name.startswith(MODEL) else "state"
            own = files.setdefault(f"{kind}{number}{SUFFIX}", {})
            own[name.removeprefix(MODEL)] = tensor
    return files


class _Written(NamedTuple):
    record: ChunkedRecord
    tensors: list[str]
    bytes: int


def _write_files(folder: Path, contents: Mapping[str, TensorFile]) -> dict[str, _Written]:
    """Write this rank's files; return them by name."""
    written = {}
    for name, record in chunked_files.write(folder, contents).items():
        header, spans, size = contents[name].layout
        written[name] = _Written(record, list(spans), size - len(header))
    return written


def _index(written: list[dict[str, _Written]]) -> JsonObject:
    """Return Hugging Face's index of the files with weights."""
    files = {name: file for each in written for name, file in each.items() if "model" in name}
    return {
        "metadata": {"total_size": sum(file.bytes for file in files.values())},
        "weight_map": {tensor: name for name, file in files.items() for tensor in file.tensors},
    }


def _owners(tensors: dict[str, Tensor], ranks: int) -> dict[str, int]:
    """Return the rank that copies and writes each tensor, with similar amounts for all ranks.

    Tensors are assigned from the largest to the smallest, each to the rank with the least so far.
    All ranks compute the same result without communication.
    """
    owned, load = {}, [0] * ranks
    for name in sorted(tensors, key=lambda name: -tensors[name].nbytes):
        rank = load.index(min(load))
        owned[name] = rank
        load[rank] += tensors[name].nbytes
    return owned
