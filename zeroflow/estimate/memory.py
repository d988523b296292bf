"""Memory of a training step, computed part by part."""

from bisect import bisect_left
from itertools import count
from typing import Literal, NamedTuple, get_args

from zeroflow.device import Device
from zeroflow.model.llama import ActivationCheckpointing
from zeroflow.training.loss import logits_bytes
from zeroflow.training.workload import Workload

Room = Literal["yes", "tight", "no"]
"""Fit of a step in memory."""

USABLE = 0.85
"""Fraction of a device's memory that a plan may use. The rest is for the CUDA context and for
fragments that the caching allocator cannot use."""


class HostState(NamedTuple):
    """State of one rank that is in host memory instead of GPU memory, in bytes."""

    weights: int
    gradients: int
    moments: int

    @property
    def total(self) -> int:
        return sum(self)


class Memory(NamedTuple):
    """Memory of one rank at the peak of a step, in bytes."""

    weights: int
    gradients: int
    """Gradients; with one micro-batch per step, the part that exceeds the freed activations."""

    moments: int
    """State of the optimiser."""

    activations: int
    loss: int
    """A chunk of logits, the output matrix in the type of products, and its gradient in fp32."""

    communication: int = 0
    """Weights gathered from all ranks for use, and gradients of a block in transit."""

    checkpoint: int = 0
    """On a CPU, the copy that is being written to a checkpoint."""

    program: int = 0
    """On a CPU, Python and its libraries."""

    @property
    def total(self) -> int:
        return sum(self)

    def fits(self, device: Device) -> bool:
        return self.total <= USABLE * device.memory_bytes

    def room(self, device: Device, ranks: int = 1) -> Room:
        """Return whether the step fits; "tight" if it may, with at least one GiB to spare.

        Each rank has its own GPU. On a CPU all ranks share the memory, and one of them keeps the
        copy for a checkpoint.
        """
        others = 0 if device.kind == "cuda" else (ranks - 1) * (self.total - self.checkpoint)
        needed = self.total + others
        if needed <= USABLE * device.memory_bytes:
            return "yes"
        return "tight" if needed + 2**30 <= device.memory_bytes else "no"


def memory(work: Workload, device: Device) -> Memory:
    """Return the memory of a rank in a step of `work`.

    It is within 2 % of all measurements: on an H100, tiny, small and medium in bf16, fp32 and fp8,
    compiled and eager, with and without recomputation; on two H100s, every ZeRO stage.
    """
    P, E, V = work.model.parameters, work.model.embedding_parameters, work.model.vocab_size
    gpu, width = device.kind == "cuda", work.dtype.itemsize
    logits = width * work.micro_batch_rows * work.seq_len * V
    chunk = min(logits, logits_bytes(device.memory_bytes if gpu else None))
    # Gathered weights are already bf16. In 8 bits, the matrix is kept in two orders
    cast = 0 if width == 4 or (work.is_sharded and not work.can_round_loss) else 2 * E
    loss = chunk + cast + 4 * E
    kept, recomputed = kept_activations(work)
    # Blocks are recomputed after the loss, in the memory that the loss has freed
    kept += max(0, recomputed - chunk - cast)
    if work.document_mask and not work.compile:
        kept += width * work.micro_batch_rows * work.seq_len**2  # the mask, written out
    if not gpu:
        kept = int(heap(accumulates=work.accumulates) * kept)
    if work.offload != "none" and gpu:
        return _offloaded(work, kept, loss)
    shards = work.shards
    gradients = 4 * P // (shards if work.zero_stage >= 2 else 1)
    return Memory(
        weights=4 * P // shards,
        # A single micro-batch frees its activations while its gradients are computed
        gradients=gradients if work.accumulates else max(0, gradients - kept - loss),
        moments=work.optimizer.state_bytes(work.model) // shards,
        activations=kept,
        loss=loss,
        communication=_communication(work) if work.ranks > 1 else 0,
        checkpoint=0 if gpu else checkpoint_bytes(work),
        program=0 if gpu else PROGRAM_BYTES,
    )


def _offloaded(work: Workload, kept: int, loss: int) -> Memory:
    """Return the memory on the GPU if the state of the optimiser is in host memory.

    The GPU then has gathered weights, and gradients until they are reduced. The peak is the largest
    of four moments: the loss; the cast of the embedding's gradient after it; the reduction of the
    last block, which comes first in the backward pass; and the end of that pass, when the gradient
    of the embedding exists three times: that of the loss, that of the lookup, and their sum.

    Args:
        kept: bytes of activations.
        loss: bytes of the loss, with the fp32 gradient of the embedding.
    """
    P, block, width = work.model.parameters, work.model.block_parameters, work.dtype.itemsize
    E = P - work.model.num_hidden_layers * block
    whole = work.accumulates and work.zero_stage == 1
    partial = work.accumulates and work.zero_stage >= 2 and work.shards < work.ranks
    gradients = 4 * P if whole else 4 * P // work.shards if partial else 0
    # The buffer of the embedding's gradient is kept until the next micro-batch reduces a block
    left = 4 * E if work.accumulates and work.zero_stage >= 2 else 0
    in_use = _gathered(work)
    reduced = max(width + 4, 4 + 4 // work.shards) * block  # a copy in fp32, and then its sum
    in_block = kept // work.model.num_hidden_layers
    in_loss = in_use + kept + loss + left
    after_loss = in_use + kept + (4 + width) * E + left
    in_backward = in_use + kept - in_block + width * E + reduced + left
    stays = in_use if work.accumulates and work.zero_stage < 3 else width * E
    at_end = stays + 3 * width * E
    return Memory(
        weights=0,
        gradients=gradients,
        moments=0,
        activations=kept,
        loss=loss,
        communication=max(in_loss, after_loss, in_backward, at_end) - kept - loss,
    )


def host_state(work: Workload) -> HostState | None:
    """Return the state in host memory; None if it is on the device.

    Weights and gradients are in pinned memory, of which PyTorch may allocate up to twice as much,
    because it rounds every tensor up to a power of two.
    """
    if work.offload == "none":
        return None
    shard = 4 * work.model.parameters // work.shards
    return HostState(
        weights=shard,
        gradients=shard,
        moments=work.optimizer.state_bytes(work.model) // work.shards,
    )


PROGRAM_BYTES = 460 * 2**20
"""Resident memory of a training process without tensors, measured with PyTorch 2.13 on Linux."""


def is_measured(work: Workload) -> bool:
    """Return True if `memory` was compared with measurements of this kind of code."""
    return work.device == "cuda" or not (
        work.compile or work.document_mask or work.precision == "bf16"
    )


# Activations. D, M: hidden and intermediate size. L: number of blocks. A block has two halves,
# attention and the feed-forward network


def kept_activations(work: Workload) -> tuple[int, int]:
    """Return the bytes of tensors that blocks and last norm keep for the backward pass, and of
    those that one block recomputes.
    """
    return _kept_compiled(work) if work.compile else _kept_eager(work)


def _kept_compiled(work: Workload) -> tuple[int, int]:
    """Return the bytes that all blocks keep for the backward pass, and those that one recomputes.

    For every token, a block keeps the inputs of its two halves, before and after the norm; queries,
    keys and values; queries and keys also after rotation; the output of attention; and both
    projections of the feed-forward network and their product. In addition, it keeps copies of the
    matrices that were cast to bf16, or concatenated, for a product.

    In fp8 the normed inputs take one byte per value, and the output of attention is kept both in
    one byte and, for the backward pass of attention, in two. Queries, keys and values are kept
    only after rotation. The product in the feed-forward network is recomputed while it is scaled.
    """
    model, width = work.model, work.dtype.itemsize
    D, M, L = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    tokens = work.micro_batch_rows * work.seq_len
    Q, qkv = model.query_size, model.qkv_size
    rotated = Q + model.num_key_value_heads * model.head_dim
    if work.fp8:
        feed_forward = tokens * (D + width * 2 * M)
        others = tokens * (D + Q + width * (2 * D + Q + qkv))
    else:
        cast = width == 2 and not work.is_sharded  # gathered weights are already bf16
        feed_forward = tokens * width * (D + 3 * M) + width * D * (3 if cast else 2) * M
        others = tokens * width * (3 * D + Q + qkv + rotated)
        others += width * D * (qkv + (Q if cast else 0))
    stream = tokens * width * D
    kept, recomputed = {
        "none": (L * (others + feed_forward), 0),
        "selective": (L * (others + stream), feed_forward),
        "full": (L * stream, others + feed_forward),
    }[work.activation_checkpointing]
    return kept + 4 * stream, recomputed


def _kept_eager(work: Workload) -> tuple[int, int]:
    """Return the figures of `_kept_compiled` for unfused kernels, which keep more.

    A norm also keeps its input, and its result before the scale, in fp32. The feed-forward network
    also keeps the output of silu. Every product keeps the matrices that were copied for it by a
    cast or concatenation. Attention keeps queries and keys after rotation, what a norm of them
    keeps except its result, and the whole projection, because the values are a view of it; in fp32
    on a GPU it keeps keys and values repeated for every query head instead. The gradient of the
    last hidden state exists during the loss.
    """
    model, width = work.model, work.dtype.itemsize
    D, M, L = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    H, K, E = model.num_attention_heads, model.num_key_value_heads, model.head_dim
    tokens = work.micro_batch_rows * work.seq_len
    cast = width == 2 and not work.is_sharded  # gathered weights are already bf16
    norm = (4 + 4 + width) * D
    heads = 3 * H if work.device == "cuda" and width == 4 else 2 * H + 3 * K
    others = tokens * (2 * norm + width * (D + heads * E) + 4 * (H + 2))
    if model.qk_norm:  # in fp32, the norm's input is a view of the projection
        others += tokens * (H + K) * (4 if width == 4 else 4 + 4) * E
    others += width * D * (model.qkv_size + (H * E if cast else 0))
    feed_forward = width * (tokens * 4 * M + D * (3 if cast else 2) * M)
    kept, recomputed = {
        "none": (L * (others + feed_forward), 0),
        "selective": (L * others, feed_forward),
        "full": (L * tokens * width * D, others + feed_forward),
    }[work.activation_checkpointing]
    return kept + tokens * (norm + width * D), recomputed


def heap(*, accumulates: bool) -> float:
    """Return the memory of activations on a CPU, relative to their bytes.

    The allocator of a CPU keeps more memory than is in use, and more if gradients are allocated
    between activations, as with several micro-batches per step. With these factors and the memory
    of the program, five runs of tiny with one micro-batch per step matched the plan within 2 %, and
    five with two micro-batches within 5 %.
    """
    return 1.7 if accumulates else 1.2


def _communication(work: Workload) -> int:
    """Return the bytes of gathered weights and of gradients in transit.

    Gradients in transit are those of a block, or of what is outside the blocks after every
    micro-batch except the last.
    """
    block = work.model.block_parameters
    E = work.model.parameters - work.model.num_hidden_layers * block
    sent = E if work.zero_stage >= 2 and work.accumulates else block
    return _gathered(work) + 4 * sent


def _gathered(work: Workload) -> int:
    """Return the bytes of gathered weights.

    Stages 0 to 2 gather all weights, stage 3 those of two blocks and all outside the blocks, such
    as the embedding; a single rank prefetches no block. With a reshard group, stage 3 also keeps
    this rank's shard of the gathered weights of all blocks.
    """
    P, block = work.model.parameters, work.model.block_parameters
    E = P - work.model.num_hidden_layers * block
    gathered = P
    if work.zero_stage == 3:
        gathered = E + (2 if work.ranks > 1 else 1) * block
    if type(work.reshard) is int:  # kept between the forward and the backward pass
        gathered += (P - E) // work.reshard
    return work.dtype.itemsize * gathered


def largest_micro_batch(
    work: Workload, device: Device, checkpointing: ActivationCheckpointing | None = None
) -> tuple[int, ActivationCheckpointing]:
    """Return the maximum number of rows that fit on the device, and the recomputation they need.

    The micro-batches and the recomputation of `work` are ignored, because both are the result. The
    step is assumed to accumulate gradients, which takes more memory.

    Args:
        checkpointing: recomputation to use; None for the first kind with which one row fits.
    """
    if device.kind == "cpu":
        return 4, checkpointing or "none"  # memory does not limit a CPU
    kinds = (checkpointing,) if checkpointing else get_args(ActivationCheckpointing)
    for kind in kinds:

        def fits(rows: int, kind: ActivationCheckpointing = kind) -> bool:
            step = {"micro_batch_rows": rows, "accumulate": 2, "activation_checkpointing": kind}
            return memory(work.model_copy(update=step), device).fits(device)

        # Memory grows with the rows, so a few of them are enough to find the limit
        too_many = next(rows for rows in (2**power for power in count()) if not fits(rows))
        if rows := bisect_left(range(1, too_many), True, key=lambda rows: not fits(rows)):
            return rows, kind
    return 1, kinds[-1]  # the prediction may be wrong, so one row is always tried


def checkpoint_bytes(work: Workload) -> int:
    """Return the size of a checkpoint: weights in fp32 and the state of the optimiser."""
    return 4 * work.model.parameters + work.optimizer.state_bytes(work.model)
