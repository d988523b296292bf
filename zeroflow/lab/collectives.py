"""Collectives of a training step: counted where PyTorch calls the process group, and predicted."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zeroflow.config import Config
from zeroflow.device import DeviceKind
from zeroflow.lab import layout
from zeroflow.training.workload import Workload

GATHER, SCATTER, SUM, SCALARS = "all_gather", "reduce_scatter", "all_reduce", "all_reduce_scalars"
"""Names of collectives. The last sums single numbers: the number of targets (int64), the loss
(fp32) and the norms of the gradients."""

_OPERATORS = {
    "c10d::_allgather_base_": GATHER,
    "c10d::_reduce_scatter_base_": SCATTER,
    "c10d::allreduce_": SUM,
    "_c10d_functional::all_reduce": SCALARS,  # of gradient norms, by DTensor
}

_IGNORED = ("_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd")
"""Operators of these libraries that send nothing."""


class Traffic(Config):
    """Collectives of one kind, in one step of one rank."""

    count: int
    bytes: int
    """Bytes of the whole buffers: the output of an all-gather, the input of the others."""


class CollectiveCounter(TorchDispatchMode):
    """Counts the collectives that are called in its block."""

    def __init__(self) -> None:
        super().__init__()
        self._counts: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()

    @property
    def traffic(self) -> dict[str, Traffic]:
        """Collectives by name."""
        return {
            name: Traffic(count=count, bytes=self._bytes[name])
            for name, count in sorted(self._counts.items())
        }

    def __torch_dispatch__(
        self,
        function: Any,
        types: Sequence[type],
        arguments: tuple[Any, ...] = (),
        options: dict[str, Any] | None = None,
    ) -> Any:
        if is_wrapped(types):
            return NotImplemented
        name = function.name()
        if name.startswith(("c10d::", "_c10d_functional::")) and name not in _IGNORED:
            tensors = [t for t in tree_leaves((arguments, options)) if isinstance(t, Tensor)]
            # The larger buffer is the whole one; that of a rank's own part is not sent as well
            whole = max(tensors, key=Tensor.numel)
            kind = _OPERATORS.get(name, name)
            if kind == SUM and whole.dim() == 0:
                kind = SCALARS
            self._counts[kind] += 1
            self._bytes[kind] += whole.numel() * whole.element_size()
        return function(*arguments, **options or {})


def is_wrapped(types: Sequence[type]) -> bool:
    """Return True if a call has sharded tensors. PyTorch then calls again with their shards."""
    return any(kind not in (Tensor, torch.nn.Parameter) for kind in types)


def predicted(work: Workload) -> dict[str, Traffic]:
    """Return the collectives of one step of one rank, by name, with the names of the counter."""
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for (name, each), times in calls(work).items():
        count[name] += times
        size[name] += times * each
    return {name: Traffic(count=count[name], bytes=size[name]) for name in sorted(count)}


def calls(work: Workload) -> Counter[tuple[str, int]]:
    """Return how often one rank calls each collective in a step, by its name and its bytes.

    Weights are gathered in the dtype of the products, and gradients are reduced in fp32. Every
    parameter is padded to equal shards.

    Raises:
        ValueError: there is one rank, which has no collectives.
    """
    if work.ranks == 1:
        raise ValueError("one rank has no collectives: use two or more")
    shards, micro_batches, width = work.shards, work.accumulate, work.dtype.itemsize
    root, *blocks = layout.groups(work.model)
    found: Counter[tuple[str, int]] = Counter({(SCALARS, 8): 1, (SCALARS, 4): 1})
    if shards > 1:
        # At stage 3, a block is gathered for the forward and for the backward pass, the root once
        of_root, of_block = {1: (1, 1), 2: (1, 1), 3: (micro_batches, 2 * micro_batches)}[
            work.zero_stage
        ]
        scattered = 1 if work.zero_stage == 1 else micro_batches
        for group in (root, *blocks):
            gathered = of_root if group is root else of_block
            found[GATHER, width * group.padded(shards)] += gathered
            found[SCATTER, 4 * group.padded(shards)] += scattered
        norms = sum(len(group.shapes) for group in (root, *blocks))
        found[SCALARS, 4 * norms] += 1
    if work.ranks > shards:  # each rank sums its shard over the replicas, once per step
        for group in (root, *blocks):
            found[SUM, 4 * group.padded(shards) // shards] += 1
    return found


def sent_bytes(name: str, size: int, ranks: int, device: DeviceKind) -> float:
    """Return the bytes that a rank sends in a collective of `size` bytes over all ranks.

    NCCL and Gloo send around a ring, and an all-reduce is a reduce-scatter and an all-gather. On
    CPUs, PyTorch implements a reduce-scatter as an all-reduce of the whole buffer by Gloo.

    Source: https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
    """
    once = size * (ranks - 1) / ranks
    is_reduced_everywhere = name in (SUM, SCALARS) or (name == SCATTER and device == "cpu")
    return 2 * once if is_reduced_everywhere else once
