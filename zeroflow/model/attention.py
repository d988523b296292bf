"""Causal attention by the fastest kernel for the device, over whole rows or within documents."""

from collections.abc import Callable
from functools import cache
from typing import TypeAlias

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
    if not q.is_cuda or mask is not None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
    # cuDNN plans anew for every length, of which a text that is generated has many
    fastest = torch.is_grad_enabled() and not torch.are_deterministic_algorithms_enabled()
    kernels = _FASTEST if fastest else _REPEATABLE
    with sdpa_kernel(kernels, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def document_mask(documents: Tensor) -> Mask:
    """Lets every token see those before it with its own number in `documents` (B, T).

    On a GPU for flex attention, which skips the blocks where nothing is seen
    (https://arxiv.org/abs/2412.05496); elsewhere a bool (B, 1, T, T).
    """
    rows, tokens = documents.shape
    if not documents.is_cuda:
        same = documents[:, None, :, None] == documents[:, None, None, :]
        return same.tril()

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
