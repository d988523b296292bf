"""The feed-forward network with products in fp8, and SwiGLU that writes fp8 directly.

`llama.swiglu` with `fp8.linear` writes the activations of SwiGLU and their gradients in bf16, reads
them to find their scales, and again to round and to transpose them. For the size medium, these
passes took 15 % of a step on an H200. Here, one kernel for each direction does it in one pass.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zeroflow.model import fp8
from zeroflow.model.fp8 import GRADIENTS, LARGEST, VALUES

# N tokens of all rows  D hidden size  M intermediate size of the feed-forward network

MAX_INTERMEDIATE_SIZE = 16_384
"""Largest M whose row fits in the registers of one Triton program."""

SAMPLED = 16
"""Every 16th token takes part in the scale of the gradients."""

HEADROOM = 64
"""Largest gradient that fits in fp8, as a multiple of the largest sampled one. e5m2 has 32 powers
of two and the same precision in most of them, so 6 of them can be spared. Larger gradients are
clipped."""

_MIN_SAMPLE = 256


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Apply the feed-forward network to `x` (..., D), with weights (M, D), (M, D) and (D, M).

    Tokens have separate scales, like those of `fp8.linear`.
    """
    y: Tensor = _FeedForward.apply(x.flatten(0, -2), gate, up, down)
    return y.unflatten(0, x.shape[:-1])


class _FeedForward(torch.autograd.Function):
    """y = (silu(x Gᵀ) · x Uᵀ) Dᵀ for tokens x (N, D). See `fp8.linear` for the scales.

    The backward pass keeps x in 8 bits, and its products with G and U in bf16.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        s = fp8.scale_for(x.abs().amax(dim=1, keepdim=True), VALUES)  # (N, 1)
        x8 = (x / s).to(VALUES)
        w_scale = fp8.scale_for(torch.maximum(gate.abs().amax(), up.abs().amax()), VALUES)
        d_scale = fp8.scale_for(down.abs().amax(), VALUES)
        w8, d8 = fp8.rounded((gate, up), w_scale), fp8.rounded((down,), d_scale)
        one = fp8.one(x)
        products = fp8.product(x8, w8.t(), one, w_scale, x.dtype, fast=fp8.FAST_OUTPUT)
        h8, h_scale = torch.ops.zeroflow.fp8_swiglu(products, s)
        y = fp8.product(h8, d8.t(), one, d_scale, x.dtype, fast=fp8.FAST_OUTPUT)
        ctx.save_for_backward(x8, s, products, h_scale, w_scale, d_scale, gate, up, down)
        return (y * h_scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        x8, s, products, h_scale, w_scale, d_scale, gate, up, down = ctx.saved_tensors
        fast = fp8.FAST_GRADIENTS
        one = fp8.one(dy)
        scale = fp8.scale_for((dy.abs().amax(dim=1, keepdim=True) * h_scale).amax(), GRADIENTS)
        g8 = (dy * (h_scale / scale)).to(GRADIENTS)
        d8 = fp8.by_columns(fp8.rounded((down,), d_scale))
        dh = fp8.product(g8, d8, scale, d_scale, dy.dtype, fast=fast)  # times h_scale
        p8, p8_t, h8_t, p_scale = torch.ops.zeroflow.fp8_swiglu_backward(products, s, dh, h_scale)
        d_down = fp8.product(g8.t().contiguous(), h8_t.t(), scale, one, torch.float32, fast=fast)
        w8 = fp8.by_columns(fp8.rounded((gate, up), w_scale))
        dx = fp8.product(p8, w8, p_scale, w_scale, dy.dtype, fast=fast)
        dw = fp8.product(p8_t, fp8.by_columns(x8), p_scale, one, torch.float32, fast=fast)
        d_gate, d_up = dw.chunk(2)
        return (dx / s).to(dy.dtype), d_gate, d_up, d_down


@torch.library.custom_op("zeroflow::fp8_swiglu", mutates_args=())
def _forward(products: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Return SwiGLU of `products` (N, 2M) times `s` (N, 1): e4m3 (N, M) and its scales (N, 1)."""
    if products.is_cuda:
        from zeroflow.model import fp8_kernels

        return fp8_kernels.forward(products, s)
    gate, up = (products.float() * s).chunk(2, dim=1)
    h = F.silu(gate) * up
    scale = fp8.scale_for(h.abs().amax(dim=1, keepdim=True), VALUES)
    return (h / scale).to(VALUES), scale


@_forward.register_fake
def _(products: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    N, M = len(products), products.shape[1] // 2
    return products.new_empty(N, M, dtype=VALUES), torch.empty_like(s)


@torch.library.custom_op("zeroflow::fp8_swiglu_backward", mutates_args=())
def _backward(
    products: Tensor, s: Tensor, dh: Tensor, h_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients over the products, and SwiGLU once more.

    Args:
        products, s: as for `_forward`.
        dh: gradient over SwiGLU times `h_scale`, (N, M).
        h_scale: scales of SwiGLU, (N, 1).

    Returns:
        the gradient over the products times `s` in e5m2, (N, 2M); its transpose; the transpose of
        SwiGLU in e4m3, (M, N); the scale of the gradient.
    """
    every = SAMPLED if len(products) >= SAMPLED * _MIN_SAMPLE else 1
    if products.is_cuda:
        from zeroflow.model import fp8_kernels

        largest = fp8_kernels.largest_gradient(products, s, dh, h_scale, every)
        scale = fp8.scale_for(largest * HEADROOM, GRADIENTS)
        return *fp8_kernels.backward(products, s, dh, h_scale, scale), scale
    gate, up = (products.float() * s).chunk(2, dim=1)
    d = dh.float() / h_scale
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    d_gate = d * up * (sigmoid + silu * (1 - sigmoid))
    gradients = torch.cat((d_gate, d * silu), dim=1) * s
    scale = fp8.scale_for(gradients[::every].abs().amax() * HEADROOM, GRADIENTS)
    limit = LARGEST[GRADIENTS]
    rounded = (gradients / scale).clamp(-limit, limit).to(GRADIENTS)
    h8 = (silu * up / h_scale).to(VALUES)
    return rounded, rounded.t().contiguous(), h8.t().contiguous(), scale


@_backward.register_fake
def _(
    products: Tensor, s: Tensor, dh: Tensor, h_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, M = dh.shape
    gradients, transposed = (
        products.new_empty(*shape, dtype=GRADIENTS) for shape in ((N, 2 * M), (2 * M, N))
    )
    return gradients, transposed, products.new_empty(M, N, dtype=VALUES), s.new_empty(())
