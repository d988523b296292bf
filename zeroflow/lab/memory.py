"""Memory of a training step by part, predicted from the engine that runs: FSDP2 and our loss.

The formulas follow the order in which tensors are allocated and freed. Each part has its own
largest value, and parts are not largest at the same moment, so the peak is less than their sum.
"""

from typing import NamedTuple

from zeroflow.estimate.memory import kept_activations
from zeroflow.lab import layout
from zeroflow.training.loss import has_kernel, logits_bytes
from zeroflow.training.workload import Workload


class _Sizes(NamedTuple):
    """Bytes of a rank's tensors from which the parts are added up."""

    weights: int
    """The rank's shard of all weights in fp32, padded; gradients and each moment take the same."""

    blocks: int
    """The rank's shard of all blocks in fp32."""

    block: int
    """A whole block in fp32."""

    block_copy: int
    """A whole block in the dtype of the products."""

    root: int
    """Embedding and last norm in fp32."""

    root_copy: int
    """Embedding and last norm in the dtype of the products."""

    embedding: int
    """The embedding in the dtype of the products."""

    largest: int
    """The largest matrix of a block in the dtype of the products: gate and up, joined."""

    last: int
    """The last matrix of a block in the dtype of the products."""

    whole: int
    """All weights in fp32."""


def _sizes(work: Workload) -> _Sizes:
    model, shards, width = work.model, work.shards, work.dtype.itemsize
    root, *blocks = layout.groups(model)
    in_blocks = sum(block.padded(shards) for block in blocks)
    padded = root.padded(shards) + in_blocks
    matrix = model.hidden_size * model.intermediate_size
    return _Sizes(
        weights=4 * padded // shards,
        blocks=4 * in_blocks // shards,
        block=4 * blocks[0].padded(shards),
        block_copy=width * blocks[0].padded(shards),
        root=4 * root.padded(shards),
        root_copy=width * root.padded(shards),
        embedding=width * model.embedding_parameters,
        largest=width * 2 * matrix,
        last=width * matrix,
        whole=4 * model.parameters,
    )


def predicted(work: Workload) -> dict[str, int]:
    """Return the largest number of bytes of each part in a step after the first, and the "peak".

    The names are those of `tensors.Part`. Temporaries inside kernels are not included.
    """
    size = _sizes(work)
    in_loss, in_backward = _activations(work)
    on_host = _is_on_host(work)
    return {
        "parameters": 0 if on_host else size.weights,
        "moments": 0 if on_host else _moments(work, size),
        "gradients": _gradients(work, size),
        "gathered": _gathered(work, size),
        "logits": _logits(work),
        "buffers": _buffers(work, size),
        "activations": max(in_loss, in_backward),
        "peak": _peak(work, size, in_loss, in_backward),
    }


def predicted_on_host(work: Workload) -> dict[str, int]:
    """Return the largest number of bytes of each part of the offloaded state, in host memory.

    A later micro-batch copies the gradient of one tensor at a time to the host, where it is added.
    """
    size = _sizes(work)
    rows = -(-work.model.vocab_size // work.shards)
    added = 4 * rows * work.model.hidden_size if work.accumulate > 1 and work.zero_stage > 1 else 0
    return {
        "parameters": size.weights,
        "gradients": size.weights + added,
        "moments": _moments(work, size),
    }


def _is_on_host(work: Workload) -> bool:
    """Return True if state is in host memory instead of GPU memory."""
    return work.offload != "none" and work.device == "cuda"


def _moments(work: Workload, size: _Sizes) -> int:
    tensors = sum(len(group.shapes) for group in layout.groups(work.model))
    moments = work.optimizer.state_bytes(work.model) // (4 * work.model.parameters)
    return moments * size.weights + 4 * tensors  # each also has a counter of steps


def _gathered(work: Workload, size: _Sizes) -> int:
    """Stage 0 copies the weights as well: FSDP2 does not train on the weights that it updates."""
    blocks = 1 if work.zero_stage == 3 else work.model.num_hidden_layers
    return size.root_copy + blocks * size.block_copy if work.ranks > 1 else 0


def _accumulated(work: Workload, size: _Sizes) -> int:
    """Return the bytes of gradients that earlier micro-batches of a step have left."""
    if not work.accumulates or (work.zero_stage > 1 and _is_on_host(work)):
        return 0
    return size.whole if work.zero_stage < 2 else size.weights


def _gradients(work: Workload, size: _Sizes) -> int:
    """Return the largest bytes of gradients.

    The gradient of the embedding exists from the loss on, and three times at the end: that of the
    loss, that of the first layer, and their sum.
    """
    embedding = 3 * size.embedding
    in_block = size.embedding + size.block_copy
    # In the loss it is fp32, and is then cast to the dtype of the products
    first = size.embedding if size.block_copy == size.block else 3 * size.embedding
    sums = _accumulated(work, size)
    if work.zero_stage >= 2 or not work.accumulates:
        # While a block is reduced, its result exists, and Python still refers to its last gradient
        reducing = size.embedding + size.block // work.shards + size.last
        if work.shards > 1:
            in_block = max(in_block, reducing)
        if sums or _is_on_host(work):
            return sums + max(in_block, embedding, first)
        one = size.block // work.shards
        return max(size.blocks - one + in_block, size.blocks + embedding, first)
    # Gradients in fp32 are added to the earlier ones matrix by matrix
    adding = size.largest if size.block_copy == size.block else size.block_copy
    at_end = embedding if work.zero_stage == 0 or work.accumulate > 2 else 0
    # At the end of the last micro-batch, blocks have been reduced, and the root has not
    last = (0 if _is_on_host(work) else size.blocks) + size.root + embedding
    return max(sums + max(size.embedding + adding, first, at_end), last)


def _buffers(work: Workload, size: _Sizes) -> int:
    """Return the largest bytes of the buffers of collectives.

    In the forward pass, the buffer of the previous group is kept until the next group is gathered,
    whose weights are first copied if they are cast. In the backward pass of stage 3, the next block
    is gathered while gradients are reduced. Only the last micro-batch frees its last buffer.
    """
    if work.ranks == 1:
        return 0
    reduced = max(size.block, size.root)
    if work.shards == 1:
        return reduced
    # A shard is copied if it is cast, or if it comes from the host
    cast = 0
    if size.block_copy != size.block or _is_on_host(work):
        cast = size.block_copy // work.shards
    next_block = size.block_copy + cast
    forward = max(
        max(size.root_copy, size.block_copy) + next_block,
        size.root_copy + (size.root_copy // work.shards if cast else 0),
    )
    if work.zero_stage < 3:
        return max(forward, reduced)
    left = size.root if work.accumulates else 0
    return max(forward + left, size.block + next_block, reduced)


def _logits(work: Workload) -> int:
    model, width = work.model, work.dtype.itemsize
    tokens = work.micro_batch_rows * work.seq_len
    rows = min(tokens, max(1, _most_logits(work) // width // model.vocab_size))
    in_fp32 = 4 if width == 2 and not _fused(work) else 0  # exact, and later transposed
    return (width + in_fp32) * rows * model.vocab_size


def _most_logits(work: Workload) -> int:
    import torch

    if work.device == "cpu":
        return logits_bytes(None)
    return logits_bytes(torch.cuda.get_device_properties(0).total_memory)


def _fused(work: Workload) -> bool:
    import torch

    return work.device == "cuda" and has_kernel(torch.device("cuda", 0))


def _activations(work: Workload) -> tuple[int, int]:
    """Return the bytes of activations in the loss, and at most in the backward pass.

    It begins with the last norm, whose gradient takes six values in fp32 for each feature. Next is
    the feed-forward network of the last block, with gradients of its output and two inner values.
    """
    model, width = work.model, work.dtype.itemsize
    tokens = work.micro_batch_rows * work.seq_len
    D, M, E = model.hidden_size, model.intermediate_size, model.head_dim
    kept, recomputed = kept_activations(work)
    always = 2 * 4 * work.seq_len * E + 8 * tokens  # rotary angles and token ids
    in_blocks = kept - tokens * ((4 + 4 + width) * D + width * D)
    at_norm, in_block = 6 * 4 * D * tokens, width * (D + 2 * M) * tokens + recomputed
    return kept + always, in_blocks + max(at_norm, in_block) + always


def _peak(work: Workload, size: _Sizes, in_loss: int, in_backward: int) -> int:
    """Return the largest sum of all parts at one moment."""
    constant = 0 if _is_on_host(work) else size.weights + _moments(work, size)
    gathered, sums = _gathered(work, size), _accumulated(work, size)
    in_fp32 = 4 * work.model.embedding_parameters
    left = size.root if work.accumulates and work.zero_stage >= 2 else 0
    prefetched = size.block_copy if work.zero_stage == 3 else 0
    in_use = size.root_copy if work.zero_stage == 3 else gathered
    last_buffer = size.block_copy if work.shards > 1 else 0
    later = sums + left + prefetched
    moments = [
        # In the loss: of the micro-batch that gathers the weights, and of a later one
        in_use + in_loss + _logits(work) + in_fp32 + max(last_buffer, later),
        # In the backward pass of the last block
        gathered + in_backward + size.embedding + size.last + later,
        # At the end of the backward pass
        size.root_copy + _gradients(work, size) + size.block,
    ]
    if _is_on_host(work):  # without the state, the peak may be at other points of a step
        moments += _moments_without_state(work, size, in_loss, later)
    return constant + max(moments)


def _moments_without_state(
    work: Workload, size: _Sizes, in_loss: int, later: int
) -> tuple[int, int]:
    """Return the bytes when the last block is reduced, and at the end of a micro-batch that keeps
    the gathered weights."""
    gathered = _gathered(work, size)
    in_block = kept_activations(work)[0] // work.model.num_hidden_layers
    reduced = max(size.block + size.block_copy, size.block + size.block // work.shards)
    stays = gathered if work.accumulates and work.zero_stage < 3 else size.root_copy
    return (
        gathered + in_loss - in_block + size.embedding + reduced + later,
        stays + _accumulated(work, size) + 3 * size.embedding,
    )
