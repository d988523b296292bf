"""Pre-flight checks that change the training state: a step of the run's shape, and a checkpoint.

To add one, write a function that returns a `Check`, and yield it in `checks`.
"""

import hashlib
import math
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from zeroflow.checks.check import Check
from zeroflow.data.rows import Rows
from zeroflow.training import batching, checkpoint, zero
from zeroflow.training.checkpoint import CheckpointError
from zeroflow.training.config import TrainingConfig
from zeroflow.training.loop import train_step
from zeroflow.training.retention import Retention
from zeroflow.training.saver import Saver
from zeroflow.training.state import TrainState
from zeroflow.units import count


def checks(
    state: TrainState, config: TrainingConfig, rows: Rows | None, folder: Path, *, tokenizer: str
) -> Iterator[Check]:
    """Yield each check in turn.

    Args:
        rows: training rows; None if they are damaged.
        folder: folder of a temporary checkpoint, removed afterwards.
        tokenizer: fingerprint of the run's tokenizer.
    """
    if rows is not None:
        yield micro_batch(state, config, rows)
    yield round_trip(state, folder, tokenizer)


def micro_batch(state: TrainState, config: TrainingConfig, rows: Rows) -> Check:
    """Train one step of the run's shape and report its memory.

    At most two micro-batches are used: the second adds to the gradients of the first, and further
    ones need no more memory.
    """
    work = config.workload
    few = config.replace(workload=work.replace(accumulate=min(2, work.accumulate)))
    batches = batching.batches(rows, few)
    on_gpu = work.device == "cuda"
    if on_gpu:  # fragments that the allocator keeps from earlier checks would count as used
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begin = time.monotonic()
    metrics = train_step(state, batches.micro_batches(0), config)
    loss, grad_norm = metrics.loss.item(), metrics.grad_norm.item()
    figure = f"{count(work.micro_batch_rows, 'row')} x {rows.row_tokens - 1:,} tokens fit"
    if on_gpu:
        total = torch.cuda.get_device_properties(0).total_memory
        figure += f", {torch.cuda.max_memory_allocated() / 2**30:.1f} of {total / 2**30:.1f} GiB"
    passed = math.isfinite(loss + grad_norm)
    sentence = (
        f"Forward, backward and optimiser took {time.monotonic() - begin:.1f} s; loss {loss:.3f}, "
        f"gradient norm {grad_norm:.3g}"
    )
    if not passed:
        sentence += ", non-finite: look at --precision and at the rows of the first step"
    return Check(name="micro-batch", passed=passed, figure=figure, sentence=sentence)


def round_trip(state: TrainState, folder: Path, fingerprint: str) -> Check:
    """Save the state, overwrite it with zeros, load it and compare the bits of every tensor."""
    remove = partial(shutil.rmtree, folder, ignore_errors=True)
    zero.on_rank0(remove)
    begin = time.monotonic()
    tensors = _tensors(state)
    size = f"{sum(tensor.nbytes for tensor in tensors.values()) / 1e6:,.0f} MB"
    if zero.ranks() > 1:
        size += " per rank"
    before, step = _digests(tensors), state.step
    try:
        saver = Saver(folder, Retention(keep=1), tokenizer=fingerprint)
        saver.save(state)
        zero.on_rank0(saver.wait)
        for tensor in tensors.values():
            tensor.zero_()
        saved = zero.on_rank0(partial(checkpoint.latest, folder))
        if saved is None:
            raise CheckpointError("The written files are damaged: look at the disk")
        checkpoint.load(state, saved, tokenizer=fingerprint)
    except (OSError, CheckpointError) as error:
        found = Check(
            name="checkpoint", passed=False, may_pass_again=True, figure=size, sentence=str(error)
        )
    else:
        after = _digests(tensors)
        lost = [name for name in before if after[name] != before[name]]
        passed = not lost and state.step == step
        sentence = f"Saving and loading took {time.monotonic() - begin:.1f} s and changed no bit"
        if not passed:
            what = f"{count(len(lost), 'tensor')}, such as {lost[0]}" if lost else "the step"
            sentence = f"Saving and loading changed {what}: look at `checkpoint` and at the disk"
        found = Check(name="checkpoint", passed=passed, figure=size, sentence=sentence)
    zero.is_any(False)  # a barrier: every rank has read the checkpoint
    zero.on_rank0(remove)
    return found


def _tensors(state: TrainState) -> dict[str, Tensor]:
    """Return all tensors that training changes.

    `checkpoint` is not asked for the list, so that a tensor that it forgets is detected.
    """
    tensors = {"skipped": state.skipped}
    for name, parameter in zero.named_parameters(state.model):
        tensors[name] = zero.local_shard(parameter.detach())
        for key, value in state.optimizer.state[parameter].items():
            tensors[f"{key} of {name}"] = zero.local_shard(value)
    return tensors


def _digests(tensors: dict[str, Tensor]) -> dict[str, str]:
    with ThreadPoolExecutor(4) as pool:  # hashlib releases the GIL
        return dict(zip(tensors, pool.map(_digest, tensors.values()), strict=True))


def _digest(tensor: Tensor) -> str:
    data = tensor.cpu().reshape(-1).view(torch.uint8).numpy().data
    return hashlib.sha256(data).hexdigest()
