"""Memory of a training step by part, from a formula."""

from itertools import count, takewhile
from typing import Literal, NamedTuple, get_args

from zeroflow.device import Device, Precision
from zeroflow.model.llama import ModelConfig, Recompute
from zeroflow.training.loss import logits_bytes
from zeroflow.training.workload import Stage

Room = Literal["yes", "tight", "no"]
"""Whether it fits."""


_USABLE = 0.85


class Memory(NamedTuple):
    """What a rank holds when a step is at its fullest, in bytes."""

    weights: int
    gradients: int
    """Of a step of one micro-batch only what does not fit where activations were."""

    moments: int
    activations: int
    loss: int
    """A chunk of logits, the output matrix in the type of products and its gradient in fp32."""

    communication: int = 0
    """Weights gathered from all ranks to compute with, and gradients of a block on their way."""

    checkpoint: int = 0
    """The copy that is being written, on a CPU."""

    program: int = 0
    """Python and its libraries, on a CPU."""

    @property
    def total(self) -> int:
        return sum(self)

    def fits(self, device: Device) -> bool:
        """A seventh is left to a GPU's context and to what the allocator cannot use."""
        return self.total <= _USABLE * device.memory_bytes

    def room(self, device: Device, ranks: int = 1) -> Room:
        """tight: a GiB is left, which those may just do with.

        Ranks have a GPU each, and share a CPU's memory; one of them holds a checkpoint's copy.
        """
        others = 0 if device.kind == "cuda" else (ranks - 1) * (self.total - self.checkpoint)
        needed = self.total + others
        if needed <= _USABLE * device.memory_bytes:
            return "yes"
        return "tight" if needed + 2**30 <= device.memory_bytes else "no"


def memory(
    model: ModelConfig,
    context: int,
    rows: int,
    checkpointing: Recompute,
    device: Device,
    *,
    precision: Precision | None = None,
    fp8: bool = False,
    compiled: bool | None = None,
    document_mask: bool = False,
    accumulates: bool = True,
    stage: Stage = 0,
    ranks: int = 1,
) -> Memory:
    """Memory of a step over micro-batches of `rows`.

    Within 2 % of all that was measured: on an H100 tiny, small and medium in bf16, fp32 and fp8,
    compiled and not, with and without what is computed again; on two of them at every stage.

    Args:
        precision: None for that which is usual on the device.
        compiled: None for what is usual there.
        document_mask: costs something where it is not compiled only.
        accumulates: whether a step has several micro-batches.
    """
    P, E, V = model.parameters, model.embedding_parameters, model.vocab_size
    gpu, tokens = device.kind == "cuda", rows * context
    compiled = device.compiles if compiled is None else compiled
    width = 4 if precision == "fp32" or (precision is None and not gpu) else 2
    chunk = min(width * tokens * V, logits_bytes(device.memory_bytes if gpu else None))
    cast = 0 if width == 4 or ranks > 1 else 2 * E  # gathered weights are bf16 already
    loss = chunk + cast + 4 * E
    kept, again = (
        _kept_compiled(model, tokens, checkpointing, width, fp8=fp8, gathers=ranks > 1)
        if compiled
        else _kept_eager(model, tokens, checkpointing, width, gpu=gpu)
    )
    kept += max(0, again - chunk - cast)  # in whose place it comes
    if document_mask and not compiled:
        kept += width * tokens * context
    if not gpu:
        kept = int(heap(accumulates=accumulates) * kept)
    shared = ranks if stage else 1
    gradients = 4 * P // (shared if stage >= 2 else 1)
    return Memory(
        weights=4 * P // shared,
        gradients=gradients if accumulates else max(0, gradients - kept - loss),
        moments=8 * P // shared,
        activations=kept,
        loss=loss,
        communication=_communication(model, stage, width, accumulates) if ranks > 1 else 0,
        checkpoint=0 if gpu else checkpoint_bytes(model),
        program=0 if gpu else _PROGRAM_BYTES,
    )


_PROGRAM_BYTES = 460 * 2**20
"""Resident in a training process besides tensors, measured with PyTorch 2.13 on Linux."""


def _kept_compiled(
    model: ModelConfig,
    tokens: int,
    checkpointing: Recompute,
    width: int,
    *,
    fp8: bool,
    gathers: bool,
) -> tuple[int, int]:
    """Bytes of activations that are kept until the loss, and of what a block computes again.

    A block keeps of a token its input and that of its second half, both also normed, and what
    attention gave; queries, keys and values, the former two also after rotation; and of the
    feed-forward network both projections and their product. Beside them it keeps the copies of
    matrices that were made for a product, to cast them to bf16 or to join them.

    In fp8 what is normed has one byte, and what attention gave, which its own backward pass reads,
    is kept in one as well. Queries, keys and values are kept after rotation only, and the product
    in the feed-forward network is made again, both where they are scaled.
    """
    D, M, L = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    qkv, rotated = model.qkv_size, D + model.num_key_value_heads * model.head_dim
    if fp8:
        feed_forward = tokens * (D + width * 2 * M)
        others = tokens * (2 * D + width * (3 * D + qkv))
    else:
        cast = width == 2 and not gathers
        feed_forward = tokens * width * (D + 3 * M) + width * D * (3 if cast else 2) * M
        others = tokens * width * (4 * D + qkv + rotated)
        others += width * D * (qkv + (D if cast else 0))
    stream = tokens * width * D
    kept, again = {
        "none": (L * (others + feed_forward), 0),
        "selective": (L * (others + stream), feed_forward),
        "full": (L * stream, others + feed_forward),
    }[checkpointing]
    return kept + 4 * stream, again


def _kept_eager(
    model: ModelConfig, tokens: int, checkpointing: Recompute, width: int, *, gpu: bool
) -> tuple[int, int]:
    """The same where no kernels are joined.

    A block keeps what `_kept_compiled` has of it, and more: norms what they were given and what
    they have normed before it is scaled, in fp32; the feed-forward network what silu gave; a
    product the matrices that were copied for it, to cast them or to join them. Attention keeps
    queries and keys after rotation, and all that were projected for the sake of the values; in fp32
    on a GPU a key and a value for every query head instead. At the loss there is its gradient.
    """
    D, M, L = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    H, K, E = model.num_attention_heads, model.num_key_value_heads, model.head_dim
    cast = width == 2
    norm = (4 + 4 + width) * D
    heads = 3 * H if gpu and not cast else 2 * H + 3 * K
    others = tokens * (2 * norm + width * (D + heads * E) + 4 * (H + 2))
    others += width * D * (model.qkv_size + (D if cast else 0))
    feed_forward = width * (tokens * 4 * M + D * (3 if cast else 2) * M)
    kept, again = {
        "none": (L * (others + feed_forward), 0),
        "selective": (L * others, feed_forward),
        "full": (L * tokens * width * D, others + feed_forward),
    }[checkpointing]
    return kept + tokens * (norm + width * D), again


def heap(*, accumulates: bool) -> float:
    """Memory of a CPU process for activations over their bytes; the allocator keeps the rest.

    That is more where gradients of one micro-batch lie between the activations of the next. With
    it and the program's own, five runs of tiny with one micro-batch a step met the plan within 2 %,
    and five with two within 5 %.
    """
    return 1.7 if accumulates else 1.2


def _communication(model: ModelConfig, stage: Stage, width: int, accumulates: bool) -> int:
    """Of stages 0 to 2 a rank gathers all weights, of 3 those of two blocks, and the embedding.

    Gradients of what was passed on last stay until something else is: of a micro-batch that is not
    the last, those of the embedding.
    """
    E = model.embedding_parameters
    block = (model.parameters - E) // model.num_hidden_layers
    gathered = E + 2 * block if stage == 3 else model.parameters
    passed_on = E if stage >= 2 and accumulates else block
    return width * gathered + 4 * passed_on


def micro_batch(
    model: ModelConfig,
    context: int,
    device: Device,
    checkpointing: Recompute | None = None,
    *,
    precision: Precision | None = None,
    fp8: bool = False,
    compiled: bool | None = None,
    document_mask: bool = False,
    stage: Stage = 0,
    ranks: int = 1,
) -> tuple[int, Recompute]:
    """The most rows that fit on the device at once, and the least that has to be computed again.

    On a CPU memory is not what limits: 4 rows. One row is always tried.
    """
    if device.kind == "cpu":
        return 4, checkpointing or "none"
    kinds = (checkpointing,) if checkpointing else get_args(Recompute)
    for kind in kinds:

        def fits(rows: int, kind: Recompute = kind) -> bool:
            needed = memory(
                *(model, context, rows, kind, device),
                precision=precision,
                fp8=fp8,
                compiled=compiled,
                document_mask=document_mask,
                stage=stage,
                ranks=ranks,
            )
            return needed.fits(device)

        if rows := max(takewhile(fits, count(1)), default=0):
            return rows, kind
    return 1, kinds[-1]


def checkpoint_bytes(model: ModelConfig) -> int:
    """Weights and two moments in fp32."""
    return 12 * model.parameters
