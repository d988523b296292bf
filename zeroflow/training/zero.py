"""Several ranks: how they meet, what they agree on, and how a model is shared out among them.

The stages of ZeRO (https://arxiv.org/abs/1910.02054) are settings of PyTorch's FSDP2: a model is
given to it block by block, and each block is gathered when it is computed. The model knows nothing
of it. A process that is alone gets from everything here what it gave.
"""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zeroflow.device import DeviceKind
from zeroflow.model.llama import Llama
from zeroflow.training.workload import Stage

T = TypeVar("T")

_RENDEZVOUS = "ZEROFLOW_RENDEZVOUS"
"""Environment variable with the file through which ranks find each other."""

_PATIENCE = timedelta(hours=2)
"""Of ranks with each other. One may compile, or write a checkpoint, for minutes; and in a training
whoever started them loses patience first, by `hang_seconds`."""

_RENDEZVOUS_PREFIX = ".rendezvous-"
_SHARDS = "shards"


def rendezvous_file(folder: Path) -> Path:
    """A file in `folder` that ranks which are yet to be started can find each other through."""
    return folder / f"{_RENDEZVOUS_PREFIX}{secrets.token_hex(8)}"


def remove_stale_rendezvous(folder: Path) -> None:
    """Remove what ranks that were killed with their parent have left; only those to come stay."""
    for left in folder.glob(f"{_RENDEZVOUS_PREFIX}*"):
        if str(left) != os.environ.get(_RENDEZVOUS):
            left.unlink(missing_ok=True)


def environment(rank: int, ranks: int, meeting: Path) -> dict[str, str]:
    """What a process has to find in its environment to become `rank` of `ranks`.

    Args:
        meeting: where all of them meet.
    """
    if ranks == 1:  # a launcher above the flow may have numbered it
        return {"RANK": "0", "WORLD_SIZE": "1"}
    # It sees one GPU, so that all code may speak of the one that there is
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(ranks))))
    devices = [number.strip() for number in visible.split(",")]
    cores = max(1, (os.cpu_count() or 1) // ranks)
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        _RENDEZVOUS: str(meeting),
        "CUDA_VISIBLE_DEVICES": devices[rank] if rank < len(devices) else "",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(cores)),
    }


@contextmanager
def process_group(device: DeviceKind) -> Iterator[None]:
    """Be one of the ranks that the environment speaks of, until all of them end the block."""
    ranks_told = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks_told == 1:
        yield
        return
    dist.init_process_group(
        "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl",
        store=dist.FileStore(os.environ[_RENDEZVOUS], ranks_told),
        rank=int(os.environ["RANK"]),
        world_size=ranks_told,
        timeout=_PATIENCE,
    )
    yield
    is_any(False)  # who leaves early takes connections away that others still need
    dist.destroy_process_group()


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_any(flag: bool) -> bool:
    """Whether `flag` is set on any rank. Waits for the others, not for the device."""
    return bool(_reduced(flag, dist.ReduceOp.MAX))


def total(number: int) -> int:
    """Sum over the ranks."""
    return _reduced(number, dist.ReduceOp.SUM)


def max_over_ranks(number: int) -> int:
    """The largest of the ranks."""
    return _reduced(number, dist.ReduceOp.MAX)


def _reduced(number: int, operation: Any) -> int:
    if ranks() == 1:
        return number
    tensor = torch.tensor(number, dtype=torch.int64)  # on the CPU, whatever trains
    dist.all_reduce(tensor, operation)
    return int(tensor)


def on_rank0(make: Callable[[], T]) -> T:
    """What `make` gives or raises on rank 0, which alone calls it, given or raised on all."""
    if ranks() == 1:
        return make()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = make()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, device=torch.device("cpu"))
    found, failure = outcome
    if failure is not None:
        raise failure
    result: T = found
    return result


def mean(tensor: Tensor) -> Tensor:
    """Over the ranks, in place."""
    if ranks() > 1:
        dist.all_reduce(tensor)
        tensor /= ranks()
    return tensor


def shard(model: Llama, stage: Stage, device: DeviceKind) -> None:
    """Share `model` out among the ranks' devices, and have its gradients averaged over them.

    What a rank computes with is gathered, a block at a time, in the type of its products; gradients
    are added up in fp32. From stage 1 on it keeps its share of weights, and so of moments. Stage 1
    keeps the gradients of a step whole until its last micro-batch, stage 2 its share of each; they
    and stage 0 have all weights gathered from the forward pass to the end of the backward pass,
    stage 3 those of one block, or two, and the embedding.
    """
    # seconds, which a process that is alone need not wait for
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if stage == 0:
        mesh = init_device_mesh(device, (ranks(), 1), mesh_dim_names=("copies", _SHARDS))
    else:
        mesh = init_device_mesh(device, (ranks(),), mesh_dim_names=(_SHARDS,))
    # Angles and masks are in fp32 on purpose: inputs stay as they are
    policy = MixedPrecisionPolicy(
        param_dtype=model.model.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=stage == 3)
    # The embedding is also the head: apart from the rest of the root, it would be two
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def before_backward(model: Llama, stage: Stage, *, last: bool) -> None:
    """Say whether the backward pass to come is the `last` of a step."""
    if ranks() == 1:
        return
    sharded: Any = model
    sharded.set_is_last_backward(last)
    if stage in (0, 1):
        sharded.set_requires_gradient_sync(last)
    if stage in (1, 2):
        sharded.set_reshard_after_backward(last)


def named_parameters(model: Llama) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that are trained, which those gathered for a forward pass stand in for."""
    if ranks() > 1:
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    return model.named_parameters()


def local_shard(tensor: Tensor) -> Tensor:
    """What this rank keeps of `tensor`."""
    shared: Any = tensor
    return shared.to_local() if _is_shared(tensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """`tensor` gathered from all ranks, on each."""
    shared: Any = tensor
    return shared.full_tensor() if _is_shared(tensor) else tensor


def norms_of_full(norms: Tensor, of: Tensor) -> Tensor:
    """Norms of tensors that are shared out as `of` is, from the `norms` of this rank's parts."""
    shared: Any = of
    if not _is_shared(of):
        return norms
    squares = norms.square()
    dist.all_reduce(squares, group=shared.device_mesh.get_group(_SHARDS))
    return squares.sqrt()


def _is_shared(tensor: Tensor) -> bool:
    if ranks() == 1:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
