"""Save a TrainState, find the newest intact checkpoint, and load it.

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

import errno
import logging
import math
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import psutil
import torch
from pydantic import PositiveInt
from torch import Tensor

from zeroflow import artifacts
from zeroflow.artifacts import ChunkedRecord, JsonObject
from zeroflow.config import Config
from zeroflow.model.llama import Llama, ModelConfig
from zeroflow.records import Record
from zeroflow.training import chunked_files, older_checkpoints, tensor_files, zero
from zeroflow.training.state import TrainState
from zeroflow.training.tensor_files import (
    SUFFIX,
    BadTensorFile,
    FileImage,
    FileLayout,
    FileStream,
    TensorFile,
    TensorFiles,
)
from zeroflow.units import decimal

log = logging.getLogger(__name__)

_RANDOM_CPU, _RANDOM_CUDA = "random.cpu.rank0", "random.cuda.rank0"
"""Names of the random states. Only that of rank 0 is stored: a step uses no random numbers, and a
checkpoint must not depend on the number of ranks."""

_MODEL = "model."
"""Prefix of weights among the tensors of the state."""

_OLDEST_FORMAT = 2
"""Oldest format that is read; see `older_checkpoints`. Format 3 has the same files as format 4, and
one sha256 for each."""

_OVERHEAD_BYTES = 2**20
"""Maximum size of a checkpoint's index, manifest and directory."""


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


class Retention(Config):
    """Rules for keeping checkpoints. The one with the lowest validation loss is always kept."""

    keep: PositiveInt
    """Number of the newest checkpoints to keep."""

    keep_every: PositiveInt | None = None
    """Also keep checkpoints at multiples of this many steps; None keeps no others."""

    def most_at_once(self, steps: int, *, every: int) -> int:
        """Return the maximum number of checkpoints of a run that exist at the same time.

        Args:
            steps: steps of the run.
            every: interval of its checkpoints.
        """
        kept = self.keep
        if self.keep_every:
            kept += steps // math.lcm(every, self.keep_every)
        return min(-(-steps // every), kept + 2)  # the best one and the one being written

    def keeps_forever(self, step: int) -> bool:
        """Return True if the checkpoint of this step is never removed."""
        return self.keep_every is not None and step % self.keep_every == 0


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
        tensors = state_tensors(state)
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
        on_gpu = any(t.is_cuda for name, t in tensors.items() if name.startswith(_MODEL))
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
        needed = sum(tensor.nbytes for tensor in state_tensors(state).values()) + _OVERHEAD_BYTES
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
                if image := image_of.get(stored := name.removeprefix(_MODEL)):
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
            kind = "model" if name.startswith(_MODEL) else "state"
            own = files.setdefault(f"{kind}{number}{SUFFIX}", {})
            own[name.removeprefix(_MODEL)] = tensor
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


def retire(folder: Path, retention: Retention) -> None:
    """Remove the checkpoints that `retention` does not keep."""
    steps = {step_of(path): path for path in _all(folder)}
    stay = set(sorted(steps)[-retention.keep :])
    stay |= set(filter(retention.keeps_forever, steps))
    if (best_one := best(folder)) is not None:
        stay.add(step_of(best_one))
    for step in steps.keys() - stay:
        try:
            _remove(steps[step])
        except OSError as error:
            log.warning("could not remove the old checkpoint %s: %s", steps[step], error)


def _remove(path: Path) -> None:
    if path.is_symlink():  # the user moved the checkpoint elsewhere and left a link
        path.unlink()
    else:
        shutil.rmtree(path)


def best(folder: Path) -> Path | None:
    """Return the checkpoint with the lowest measured validation loss."""
    losses = {}
    for path in _all(folder):
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
    for path in reversed(_all(folder)):
        try:
            _require_signed_format(path)
            if (step := artifacts.verify(path)["step"]) != step_of(path):
                raise artifacts.DamagedArtifact(f"{path} has the state of step {step}")
            return path
        except artifacts.DamagedArtifact as damage:
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
        path = next((path for path in _all(folder) if step_of(path) == which), None)
    if path is None:
        steps = ", ".join(str(step_of(path)) for path in _all(folder))
        if not steps:
            raise CheckpointError(f"there is no checkpoint yet in {folder}")
        wanted = "with a validation loss" if which == "best" else f"of step {which}"
        raise CheckpointError(f"{folder} has no checkpoint {wanted}, only of steps {steps}")
    if which != "newest":  # `latest` has verified the newest one
        _require_signed_format(path)
        try:
            artifacts.verify(path)
        except artifacts.DamagedArtifact as damage:
            raise CheckpointError(f"this checkpoint is damaged: {damage}") from damage
    return path


def newest_step(folder: Path) -> int:
    """Return the step of the newest checkpoint, without verifying it; 0 if there is none."""
    return max(map(step_of, _all(folder)), default=0)


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
    for path in reversed(_all(folder)):
        _require_signed_format(path)
        try:
            artifacts.read_signed(path / artifacts.MANIFEST)
        except artifacts.DamagedArtifact:
            continue  # `latest` sets it aside
        return path, _facts(path)
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
                files.read_into(name.removeprefix(_MODEL), tensor)
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
    if (found := manifest["format"]) not in range(_OLDEST_FORMAT, CheckpointFacts.FORMAT + 1):
        raise CheckpointError(
            f"{path} has checkpoint format {found}, but this version reads {_OLDEST_FORMAT} to "
            f"{CheckpointFacts.FORMAT}: resume with the version that wrote it, or start over under "
            "another --run-name"
        )
    return manifest


def _require_signed_format(path: Path) -> None:
    """Refuse a manifest of format 1. It has no checksum, so it would be set aside as damaged."""
    try:
        manifest = artifacts.read_json(path / artifacts.MANIFEST)
    except (OSError, ValueError):
        return
    if isinstance(manifest, dict) and manifest.get("format") == 1 and "sha256" not in manifest:
        _facts(path)


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


def _all(folder: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    named = (path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name))
    return sorted(path for path in named if path.is_dir())
