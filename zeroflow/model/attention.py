"""Causal attention over whole rows or within documents, with the fastest kernel of the device."""

from collections.abc import Callable
from functools import cache
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from zeroflow.model import hopper

Mask: TypeAlias = Tensor | BlockMask | None
"""Positions that a token may attend to; None: all positions up to its own in its row."""

AttentionKernel = Literal["cudnn", "flash", "flash4"]
"""Kernels of causal attention: those of PyTorch, and that of `hopper.py`."""

# The first of these that supports its inputs is used. They are passed to each call instead of set
# by PyTorch's global flags, which a compiled graph reads only once. The backward pass of cuDNN is
# not deterministic
_DETERMINISTIC = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, *_DETERMINISTIC]


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask = None, kernel: AttentionKernel = "cudnn"
) -> Tensor:
    """Return the attention (B, H, T, E) of queries (B, H, T, E) to keys and values (B, K, T, E).

    With K < H it is grouped-query attention.

    Args:
        kernel: for training in bf16 on a GPU without a mask.
    """
    if isinstance(mask, BlockMask):
        y = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
        assert isinstance(y, Tensor)
        return y
    how: dict[str, Any] = {"attn_mask": mask, "is_causal": mask is None, "enable_gqa": True}
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, **how)
    # Generation, which has no gradients, has many lengths: cuDNN would plan for each length
    trains = torch.is_grad_enabled()
    if mask is not None or q.dtype == torch.float32:
        # For these inputs, only the memory-efficient kernel keeps the scores out of memory, and it
        # needs a key and a value for each query head
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    elif trains and kernel == "flash4":
        return hopper.attend(q, k, v)
    fastest = trains and kernel == "cudnn" and not torch.are_deterministic_algorithms_enabled()
    with sdpa_kernel(_CUDNN_FIRST if fastest else _DETERMINISTIC, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, **how)


def dense_mask(documents: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask (B, 1, T, T) that keeps attention causal and within `documents` (B, T).

    Tokens of one document have the same number in `documents`. The mask is added to the scores, of
    `dtype`: 0 where a token may attend, minus infinity elsewhere. PyTorch would convert a bool mask
    to this in every block, and keep each copy for the backward pass.
    """
    same = documents[:, None, :, None] == documents[:, None, None, :]
    mask = torch.zeros_like(same, dtype=dtype)
    return mask.masked_fill_(~same.tril(), -torch.inf)


def block_mask(documents: Tensor, _: torch.dtype) -> BlockMask:
    """Return the mask of `dense_mask` for flex attention, which skips fully masked blocks.

    Flex attention must be compiled: in eager mode it keeps all scores in memory.
    https://arxiv.org/abs/2412.05496
    """
    rows, tokens = documents.shape

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents[b, query] == documents[b, key])

    return _compiled_block_mask()(sees, rows, None, tokens, tokens, device=documents.device)


@cache
def _compiled_block_mask() -> Callable[..., BlockMask]:
    # Compiled, because eager code keeps B·T·T entries in memory. Compiled at the first call,
    # because importing torch.compile takes seconds
    return torch.compile(create_block_mask)


def positions_within(documents: Tensor) -> Tensor:
    """Return each token's position in its document, (B, T) int64.

    Args:
        documents: (B, T); consecutive positions with equal numbers are one document.
    """
    positions = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    return positions - torch.where(begins, positions, 0).cummax(dim=1).values
