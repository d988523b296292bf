"""`llama.linear` and `llama.swiglu` with matrix products in fp8, for GPUs that support them, and
what other products in fp8 need.

Activations and weights are rounded to e4m3, gradients to e5m2, as in
https://arxiv.org/abs/2209.05433. Scales follow from the largest absolute value of the current
tensor.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# T tokens  D features  N features of the product  M intermediate features

MULTIPLE = 16
"""Every dimension of a product must be a multiple of this."""

# e4m3 has more precision, e5m2 more range, which gradients need
_VALUES, GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2
_LARGEST = {dtype: torch.finfo(dtype).max for dtype in (_VALUES, GRADIENTS)}
_SMALLEST_SCALE = 2.0**-100
"""Scale of a tensor of zeros. Values are divided by scales and must stay finite in fp32."""

# Fast accumulation has about 14 bits on Hopper: https://arxiv.org/abs/2412.19437, section 3.3.2.
# Gradients are accumulated in fp32, as in torchao's tensor-wise recipe
FAST_OUTPUT, FAST_GRADIENTS = True, False

WEIGHT_GRADIENT = True
"""If True, the gradient of the weights is computed in fp8 too, from transposed copies of both
factors; otherwise in the dtype of the activations."""

MAX_INTERMEDIATE_SIZE = 16_384
"""Largest M that `swiglu` supports: its row fits in the registers of one Triton program."""

SAMPLED = 16
"""Every 16th token takes part in the scale of the gradients."""

HEADROOM = 64
"""Largest gradient that fits in fp8, as a multiple of the largest sampled one. e5m2 has 32 powers
of two and the same precision in most of them, so 6 of them can be spared. Larger gradients are
clipped."""

_MIN_SAMPLE = 256


def linear(x: Tensor, *weights: Tensor) -> Tensor:
    """Multiply `x` (..., D) by the transposes of `weights` (N, D), concatenated, in `x`'s dtype.

    On a GPU, compiled code needs `x` in bf16: with fp32, PyTorch 2.11 on an H100 computed zeros
    for all gradients.
    """
    y: Tensor = _ScaledProduct.apply(x.flatten(0, -2), *weights)
    return y.unflatten(0, x.shape[:-1])


class _ScaledProduct(torch.autograd.Function):
    """y = x Wᵀ for tokens x (T, D) and concatenated weights W (N, D).

    Each token has its own scale s. With one scale for all tokens, the rounding of a token would
    depend on later tokens, and the model would no longer be causal. W has one scale.

    The gradient of W is a sum over tokens, and s cannot be factored out of it. So dy is multiplied
    by s before it is rounded, and one rounded tensor serves both products:
    dW = (s·dy)ᵀ x/s and dx = (s·dy) W / s.

    The backward pass keeps x in 8 bits and the weights as they are.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        x8, s = rounded_tokens(x)
        largest = torch.stack([weight.abs().amax() for weight in weights]).amax()
        w_scale = _scale(largest, _VALUES)
        ctx.save_for_backward(x8, s, w_scale, *weights)
        w8 = _rounded(weights, w_scale)
        y = product(x8, w8.t(), one(x), w_scale, x.dtype, fast=FAST_OUTPUT)
        return (y * s).to(x.dtype)  # torch.compile fuses this into the next kernel

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        x8, s, w_scale, *weights = ctx.saved_tensors
        scale = _scale((dy.abs().amax(dim=1, keepdim=True) * s).amax(), GRADIENTS)
        g8 = (dy * (s / scale)).to(GRADIENTS)
        w8 = _rounded(weights, w_scale)
        dx = product(g8, by_columns(w8), scale, w_scale, dy.dtype, fast=FAST_GRADIENTS)
        dx = (dx / s).to(dy.dtype)
        if WEIGHT_GRADIENT:
            dw = product(
                *(g8.t().contiguous(), by_columns(x8), scale, one(dy), torch.float32),
                fast=FAST_GRADIENTS,
            )
        else:
            dw = torch.mm(dy.t(), (x8.float() * s).to(dy.dtype)).float()
        return dx, *dw.split([len(weight) for weight in weights])


def _scale(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the fp32 divisor with which `largest` just fits in `dtype`.

    If `largest` is non-finite, so is the divisor, and then the loss.
    """
    return (largest.float() / _LARGEST[dtype]).clamp(min=_SMALLEST_SCALE)


def rounded_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round `x` (T, D), and return the result and the scale of every token, (T, 1)."""
    s = _scale(x.abs().amax(dim=1, keepdim=True), _VALUES)
    return (x / s).to(_VALUES), s


def rounded_matrix(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round `weight`, and return the result and its scale, a scalar."""
    # Unlike abs().amax(), this makes no copy if it is not compiled
    scale = _scale(torch.linalg.vector_norm(weight, float("inf")), _VALUES)
    return _rounded((weight,), scale), scale


def gradient_scale(largest: Tensor) -> Tensor:
    """Return the scale with which gradients up to `largest`, a scalar, fit in their type."""
    return _scale(largest, GRADIENTS)


def _rounded(weights: Sequence[Tensor], scale: Tensor) -> Tensor:
    """Round `weights` and concatenate them along their rows."""
    parts = [(weight / scale).to(_VALUES) for weight in weights]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def by_columns(matrix: Tensor) -> Tensor:
    """Return the matrix in column-major order, as the kernels require for the second factor."""
    return matrix.t().contiguous().t()


def transposed(matrix: Tensor) -> Tensor:
    """Return a contiguous transpose of `matrix`, as `matrix.t().contiguous()`, which took ten times
    as long on an H200.
    """
    if not matrix.is_cuda:
        return matrix.t().contiguous()
    from zeroflow.model import fp8_kernels

    out = matrix.new_empty(matrix.shape[::-1])
    fp8_kernels.transpose(matrix, out)
    return out


def one(like: Tensor) -> Tensor:
    return torch.ones((), device=like.device)


def product(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype, *, fast: bool
) -> Tensor:
    return torch._scaled_mm(
        a, b, scale_a=a_scale, scale_b=b_scale, out_dtype=dtype, use_fast_accum=fast
    )


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Return the feed-forward network of `x` (..., D) with weights (M, D), (M, D) and (D, M).

    With `linear` alone, SwiGLU and its gradient would be written in bf16, read to find their
    scales, and read again to be rounded and transposed. Here, one kernel for each direction does it
    in one pass.
    """
    y: Tensor = _FeedForward.apply(x.flatten(0, -2), gate, up, down)
    return y.unflatten(0, x.shape[:-1])


class _FeedForward(torch.autograd.Function):
    """y = (silu(x Gᵀ) · x Uᵀ) Dᵀ for tokens x (T, D). See `linear` for the scales.

    The backward pass keeps x in 8 bits, and its products with G and U in bf16.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        x8, s = rounded_tokens(x)
        w_scale = _scale(torch.maximum(gate.abs().amax(), up.abs().amax()), _VALUES)
        d_scale = _scale(down.abs().amax(), _VALUES)
        w8, d8 = _rounded((gate, up), w_scale), _rounded((down,), d_scale)
        products = product(x8, w8.t(), one(x), w_scale, x.dtype, fast=FAST_OUTPUT)
        h8, h_scale = torch.ops.zeroflow.fp8_swiglu(products, s)
        y = product(h8, d8.t(), one(x), d_scale, x.dtype, fast=FAST_OUTPUT)
        ctx.save_for_backward(x8, s, products, h_scale, w_scale, d_scale, gate, up, down)
        return (y * h_scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        x8, s, products, h_scale, w_scale, d_scale, gate, up, down = ctx.saved_tensors
        fast = FAST_GRADIENTS
        scale = _scale((dy.abs().amax(dim=1, keepdim=True) * h_scale).amax(), GRADIENTS)
        g8 = (dy * (h_scale / scale)).to(GRADIENTS)
        d8 = by_columns(_rounded((down,), d_scale))
        dh = product(g8, d8, scale, d_scale, dy.dtype, fast=fast)  # times h_scale
        p8, p8_t, h8_t, p_scale = torch.ops.zeroflow.fp8_swiglu_backward(products, s, dh, h_scale)
        g8_t = g8.t().contiguous()
        d_down = product(g8_t, h8_t.t(), scale, one(dy), torch.float32, fast=fast)
        w8 = by_columns(_rounded((gate, up), w_scale))
        dx = product(p8, w8, p_scale, w_scale, dy.dtype, fast=fast)
        dw = product(p8_t, by_columns(x8), p_scale, one(dy), torch.float32, fast=fast)
        d_gate, d_up = dw.chunk(2)
        return (dx / s).to(dy.dtype), d_gate, d_up, d_down


@torch.library.custom_op("zeroflow::fp8_swiglu", mutates_args=())
def _forward(products: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Return SwiGLU of `products` (T, 2M) times `s` (T, 1): e4m3 (T, M) and its scales (T, 1)."""
    h8, scale = _like_forward(products, s)
    if products.is_cuda:
        from zeroflow.model import fp8_kernels

        fp8_kernels.forward(products, s, h8, scale, smallest=_SMALLEST_SCALE)
        return h8, scale
    gate, up = (products.float() * s).chunk(2, dim=1)
    h = F.silu(gate) * up
    scale = _scale(h.abs().amax(dim=1, keepdim=True), _VALUES)
    return (h / scale).to(_VALUES), scale


@_forward.register_fake
def _like_forward(products: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    T, M = len(products), products.shape[1] // 2
    return products.new_empty(T, M, dtype=_VALUES), torch.empty_like(s)


@torch.library.custom_op("zeroflow::fp8_swiglu_backward", mutates_args=())
def _backward(
    products: Tensor, s: Tensor, dh: Tensor, h_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients w.r.t. the products, and SwiGLU, recomputed.

    Args:
        products, s: as for `_forward`.
        dh: gradient w.r.t. SwiGLU times `h_scale`, (T, M).
        h_scale: scales of SwiGLU, (T, 1).

    Returns:
        the gradient w.r.t. the products times `s` in e5m2, (T, 2M); its transpose; the transpose of
        SwiGLU in e4m3, (M, T); the scale of the gradient.
    """
    every = SAMPLED if len(products) >= SAMPLED * _MIN_SAMPLE else 1
    if products.is_cuda:
        from zeroflow.model import fp8_kernels

        inputs = (products, s, dh, h_scale)
        scale = _scale(fp8_kernels.largest_gradient(*inputs, every) * HEADROOM, GRADIENTS)
        *outputs, _ = _like_backward(*inputs)
        fp8_kernels.backward(inputs, scale, *outputs)
        return *outputs, scale
    gate, up = (products.float() * s).chunk(2, dim=1)
    d = dh.float() / h_scale
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    d_gate = d * up * (sigmoid + silu * (1 - sigmoid))
    gradients = torch.cat((d_gate, d * silu), dim=1) * s
    scale = _scale(gradients[::every].abs().amax() * HEADROOM, GRADIENTS)
    limit = _LARGEST[GRADIENTS]
    g8 = (gradients / scale).clamp(-limit, limit).to(GRADIENTS)
    h8 = (silu * up / h_scale).to(_VALUES)
    return g8, g8.t().contiguous(), h8.t().contiguous(), scale


@_backward.register_fake
def _like_backward(
    products: Tensor, s: Tensor, dh: Tensor, h_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    T, M = dh.shape
    gradients, transposed = (
        products.new_empty(*shape, dtype=GRADIENTS) for shape in ((T, 2 * M), (2 * M, T))
    )
    return gradients, transposed, products.new_empty(M, T, dtype=_VALUES), s.new_empty(())
