"""Causal attention by the fastest kernel for the device, over whole rows or within documents."""

from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Mask: TypeAlias = Tensor | BlockMask | None
"""None is causal over the whole row."""

# In this order where they serve. Chosen here and not by the global flags, which a compiled graph
# does not look at again. cuDNN is the fastest on Hopper; its backward pass is never repeatable.
_FASTEST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
_REPEATABLE = _FASTEST[1:]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    """Attention of queries (B, H, T, E) to keys and values (B, K, T, E), grouped if K < H."""
    if isinstance(mask, BlockMask):
        y = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
        assert isinstance(y, Tensor)
        return y
    how: dict[str, Any] = {"attn_mask": mask, "is_causal": mask is None, "enable_gqa": True}
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, **how)
    if mask is not None or q.dtype == torch.float32:
        # The only kernel for these that does not write all scores to memory needs a key and a value
        # for every query head
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    # cuDNN plans anew for every length, of which a text that is generated has many
    fastest = torch.is_grad_enabled() and not torch.are_deterministic_algorithms_enabled()
    with sdpa_kernel(_FASTEST if fastest else _REPEATABLE, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, **how)


def dense_mask(documents: Tensor, dtype: torch.dtype) -> Tensor:
    """Lets every token see those before it with its own number in `documents` (B, T).

    0 where it sees and minus infinity where not, (B, 1, T, T), to be added to scores of `dtype`. A
    bool mask would become that in every block, and be kept in each.
    """
    same = documents[:, None, :, None] == documents[:, None, None, :]
    nowhere = torch.zeros_like(same, dtype=dtype)
    return nowhere.masked_fill_(~same.tril(), -torch.inf)


def block_mask(documents: Tensor, _: torch.dtype) -> BlockMask:
    """What `dense_mask` lets see, for flex attention, which skips the blocks where nothing is seen.

    That has to be compiled for a GPU, as eager it holds all scores:
    https://arxiv.org/abs/2412.05496
    """
    rows, tokens = documents.shape

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents[b, query] == documents[b, key])

    return _compiled_block_mask()(sees, rows, None, tokens, tokens, device=documents.device)


@cache
def _compiled_block_mask() -> Callable[..., BlockMask]:
    """Eager, it would hold B·T·T entries. Compiled late, as torch.compile takes long to import."""
    return torch.compile(create_block_mask)


def positions_within(documents: Tensor) -> Tensor:
    """Place of every token in its document, (B, T) int64; documents are runs of equal numbers."""
    places = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    return places - torch.where(begins, places, 0).cummax(dim=1).values
