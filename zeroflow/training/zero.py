"""Training on several ranks: process group, collectives, and sharding of the model.

This is the only module that knows about sharding. The stages of ZeRO
(https://arxiv.org/abs/1910.02054) are settings of PyTorch's FSDP2, which `shard` applies to the
blocks of a model from outside. With one rank, the functions here do nothing and return their input,
unless its state is offloaded: then FSDP2 shards the model over this one rank.
"""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from zeroflow.device import DeviceKind
from zeroflow.model.llama import Llama

STAGES = (0, 1, 2, 3)
"""State that the ranks shard at each stage of ZeRO. 0: nothing. 1: moments and weights. 2: also
gradients. 3: also weights while they are in use."""

# Not a Literal, because Prefect's form shows a choice of 0 as empty
Stage = Annotated[int, Field(ge=min(STAGES), le=max(STAGES))]
"""One of `STAGES`."""

Offload = Literal["none", "optimizer"]
"""State in host memory. optimizer: all that the optimiser reads and writes, which are the fp32
weights, the sums of gradients and the moments."""

T = TypeVar("T")

RENDEZVOUS = "ZEROFLOWRENDEZVOUS"
"""Environment variable with the path of the rendezvous file."""

_TIMEOUT = timedelta(hours=2)
"""Timeout of a collective. It is long because a rank may compile or write a checkpoint for minutes.
The launcher ends ranks that hang sooner, after `hang_seconds`."""

_RENDEZVOUS_PREFIX = ".rendezvous-"
_REPLICAS, _SHARDS = "replicas", "shards"


def rendezvous_file(folder: Path) -> Path:
    """Return the path of a new file in `folder` with which ranks find each other.

    The ranks of one machine need no free port this way.
    """
    return folder / f"{_RENDEZVOUS_PREFIX}{secrets.token_hex(8)}"


def remove_stale_rendezvous(folder: Path) -> None:
    """Remove the rendezvous files of ranks that were killed with their parent, but not our own."""
    for left in folder.glob(f"{_RENDEZVOUS_PREFIX}*"):
        if str(left) != os.environ.get(RENDEZVOUS):
            left.unlink(missing_ok=True)


def set_rank_environment() -> None:
    """Set this rank's number and GPU from the environment that torchrun, or srun alone, provides.

    Call it before anything uses a GPU.

    Sources: https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables and
        https://slurm.schedmd.com/srun.html#SECTION_OUTPUT-ENVIRONMENT-VARIABLES
    """
    given = os.environ
    if "RANK" not in given and "SLURM_STEP_ID" in given and "SLURM_LAUNCH_NODE_IPADDR" in given:
        given |= {
            "RANK": given["SLURM_PROCID"],
            "WORLD_SIZE": given["SLURM_NTASKS"],
            "LOCAL_RANK": given["SLURM_LOCALID"],
            "MASTER_ADDR": given.get("MASTER_ADDR", given["SLURM_LAUNCH_NODE_IPADDR"]),
            # Each job has its own port, because several jobs may share a host
            "MASTER_PORT": given.get("MASTER_PORT", str(20000 + int(given["SLURM_JOB_ID"]) % 9973)),
        }
    if RENDEZVOUS in given or "LOCAL_RANK" not in given:
        return
    local = int(given["LOCAL_RANK"])
    visible = given.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        given["CUDA_VISIBLE_DEVICES"] = str(local)
    elif local < len(devices := visible.split(",")) > 1:  # with one, srun has chosen it already
        given["CUDA_VISIBLE_DEVICES"] = devices[local].strip()


@contextmanager
def process_group(device: DeviceKind, *, alone: bool = False) -> Iterator[None]:
    """Join the process group that the environment describes, until all ranks leave the block.

    Ranks that our launcher started find each other through a file, ranks of torchrun or Slurm at
    the address in the environment.

    Args:
        alone: also make a group of a single rank, which `shard` needs.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1 and not alone:
        yield
        return
    file = os.environ.get(RENDEZVOUS)
    store: dist.Store | None = dist.FileStore(file, world_size) if file else None
    if world_size == 1:
        store = dist.HashStore()
    # Also Gloo if there are GPUs: ranks exchange numbers and objects in host memory, which NCCL
    # cannot send, and for which no rank should wait for its GPU
    dist.init_process_group(
        "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl",
        store=store,
        rank=int(os.environ["RANK"]) if world_size > 1 else 0,
        world_size=world_size,
        timeout=_TIMEOUT,
    )
    yield
    is_any(False)  # a barrier: a rank that leaves early would close connections that are in use
    dist.destroy_process_group()


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_any(flag: bool) -> bool:
    """Return True if `flag` is set on any rank. Waits for the other ranks, not for the device."""
    return bool(_reduce(flag, dist.ReduceOp.MAX))


def total(number: int) -> int:
    """Return the sum of `number` over the ranks."""
    return _reduce(number, dist.ReduceOp.SUM)


def max_over_ranks(number: int) -> int:
    """Return the largest `number` of any rank."""
    return _reduce(number, dist.ReduceOp.MAX)


def _reduce(number: int, operation: Any) -> int:
    if ranks() == 1:
        return number
    tensor = torch.tensor(number, dtype=torch.int64)  # on the CPU even when a GPU trains
    dist.all_reduce(tensor, operation)
    return int(tensor)


def on_rank0(make: Callable[[], T]) -> T:
    """Call `make` on rank 0 only, and return its result, or raise its error, on every rank."""
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


def side_group() -> Any:
    """Return a second group of all ranks, whose collectives another thread can use safely."""
    return dist.new_group(backend="gloo", timeout=_TIMEOUT) if ranks() > 1 else None


def on_all_ranks(make: Callable[[], T], group: Any) -> list[T]:
    """Call `make` on every rank. On every rank, return all results, or raise the first error.

    Args:
        group: a `side_group`.
    """
    if ranks() == 1:
        return [make()]
    outcome: tuple[Any, Exception | None]
    try:
        outcome = make(), None
    except Exception as error:
        outcome = None, error
    outcomes: list[Any] = [None] * ranks()
    dist.all_gather_object(outcomes, outcome, group=group)
    for _, failure in outcomes:
        if failure is not None:
            raise failure
    return [result for result, _ in outcomes]


def mean(tensor: Tensor) -> Tensor:
    """Average `tensor` over the ranks, in place."""
    if ranks() > 1:
        dist.all_reduce(tensor)
        tensor /= ranks()
    return tensor


def shard(
    model: Llama,
    device: DeviceKind,
    *,
    group: int,
    reshard: bool | int,
    offload: Offload = "none",
) -> None:
    """Shard `model` across the ranks' devices, and average its gradients over the ranks.

    The state is sharded over each `group` of consecutive ranks, and the groups are replicas.
    Weights are gathered within a group. Gradients are summed within a group, and over the groups
    once per step. Stage 0 has groups of one rank, with FSDP2 as plain data parallelism. So all
    stages use this code, and checkpoints and gradient norms need no special case.

    Weights are gathered block by block, in the dtype of the products; gradients are reduced in
    fp32. From stage 1 on, a rank keeps only its shard of the weights and of the optimiser's state.
    Stage 1 keeps unsharded gradients until the last micro-batch of a step; stages 2 and 3 keep only
    a shard of them. Stages 0 to 2 keep gathered weights from the forward pass to the end of the
    backward pass; stage 3 keeps only those of one or two blocks, and of the embedding.

    Offloaded shards of weights and gradients are in pinned host memory. So the moments of an
    optimiser that is built for them are in host memory too, and the CPU updates all. FSDP2 copies
    shards of weights to the device before it gathers them, and shards of gradients to the host.

    Args:
        reshard: FSDP2's `reshard_after_forward` for the blocks: False up to stage 2, True at stage
            3, or a number of consecutive ranks over which the gathered weights of a block are
            sharded until its backward pass gathers them again.
    """
    # Importing these takes seconds, and a single rank does not need them
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
    )

    if group == ranks():
        mesh = init_device_mesh(device, (group,), mesh_dim_names=(_SHARDS,))
    else:
        sides = (ranks() // group, group)
        mesh = init_device_mesh(device, sides, mesh_dim_names=(_REPLICAS, _SHARDS))
    # Inputs are not cast: rotary angles and masks are fp32 on purpose
    policy = MixedPrecisionPolicy(
        param_dtype=model.model.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    place = OffloadPolicy()
    if offload == "optimizer":
        place = CPUOffloadPolicy(pin_memory=device == "cuda")
    settings: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "offload_policy": place}
    for block in model.model.layers:
        fully_shard(block, **settings, reshard_after_forward=reshard)
    # The embedding stays in the root module, because the output head uses its weight outside the
    # embedding's own forward pass, when FSDP2 would have resharded it
    fully_shard(model, **settings, reshard_after_forward=False)
    for part in dist.distributed_c10d._world.pg_map:  # 10 minutes are too short for compilation
        dist.distributed_c10d._set_pg_timeout(_TIMEOUT, part)


def before_backward(model: Llama, stage: Stage, *, last: bool) -> None:
    """Prepare FSDP2 for the next backward pass, which may be the `last` of the step."""
    if not dist.is_initialized():
        return
    sharded: Any = model
    sharded.set_is_last_backward(last)
    if stage in (0, 1):
        sharded.set_requires_gradient_sync(last)
    else:
        sharded.set_requires_all_reduce(last)  # over groups
    if stage in (1, 2):
        sharded.set_reshard_after_backward(last)


def named_parameters(model: Llama) -> Iterator[tuple[str, nn.Parameter]]:
    """Return the sharded parameters, which are trained; not the gathered ones."""
    if dist.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    return model.named_parameters()


def device_of(model: Llama) -> torch.device:
    """Return the device that computes. Offloaded weights are there only while they are gathered."""
    weight: Any = model.model.embed_tokens.weight
    return torch.device(weight.device_mesh.device_type) if _is_sharded(weight) else weight.device


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's shard of `tensor`."""
    sharded: Any = tensor
    return sharded.to_local() if _is_sharded(tensor) else tensor


def local_rows(tensor: Tensor) -> slice:
    """Return the rows of `tensor` that are in this rank's shard: FSDP2 shards along rows."""
    sharded: Any = tensor
    rows, begin = len(tensor), 0
    if _is_sharded(tensor):
        for dim, placement in enumerate(sharded.placements):
            if placement.is_shard():
                assert placement.dim == 0, placement
                each = -(-rows // sharded.device_mesh.size(dim))  # rounded up, as in torch.chunk
                begin = min(rows, each * sharded.device_mesh.get_local_rank(dim))
                rows = min(rows - begin, each)
    return slice(begin, begin + rows)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return `tensor`, gathered from all ranks."""
    sharded: Any = tensor
    return sharded.full_tensor() if _is_sharded(tensor) else tensor


def norms_of_full(norms: Tensor, of: Tensor) -> Tensor:
    """Return the norms of full tensors, given the `norms` of this rank's shards.

    Args:
        of: one of the tensors, or another with the same sharding.
    """
    sharded: Any = of
    if not _is_sharded(of):
        return norms
    squares = norms.square()
    dist.all_reduce(squares, group=sharded.device_mesh.get_group(_SHARDS))
    return squares.sqrt()


def _is_sharded(tensor: Tensor) -> bool:
    if not dist.is_initialized():  # the import takes seconds, and a single rank does not need it
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
