"""`llama.linear` with matrix products in fp8, for GPUs that support them.

Activations and weights are rounded to e4m3, gradients to e5m2, as in
https://arxiv.org/abs/2209.05433. Scales follow from the largest absolute value of the current
tensor. `fp8_swiglu.py` has the feed-forward network.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# T tokens  D features  N features of the product

MULTIPLE = 16
"""Every dimension of a product must be a multiple of this."""

# e4m3 has more precision, e5m2 more range, which gradients need
VALUES, GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {dtype: torch.finfo(dtype).max for dtype in (VALUES, GRADIENTS)}
SMALLEST_SCALE = 2.0**-100
"""Scale of a tensor of zeros. Values are divided by scales and must stay finite in fp32."""

# Fast accumulation has about 14 bits on Hopper: https://arxiv.org/abs/2412.19437, section 3.3.2.
# Gradients are accumulated in fp32, as in torchao's tensor-wise recipe
FAST_OUTPUT, FAST_GRADIENTS = True, False

WEIGHT_GRADIENT = True
"""If True, the gradient of the weights is computed in fp8 too, from transposed copies of both
factors; otherwise in the dtype of the activations."""


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
        s = scale_for(x.abs().amax(dim=1, keepdim=True), VALUES)  # (T, 1)
        largest = torch.stack([weight.abs().amax() for weight in weights]).amax()
        w_scale = scale_for(largest, VALUES)
        x8 = (x / s).to(VALUES)
        ctx.save_for_backward(x8, s, w_scale, *weights)
        w8 = rounded(weights, w_scale)
        y = product(x8, w8.t(), one(x), w_scale, x.dtype, fast=FAST_OUTPUT)
        return (y * s).to(x.dtype)  # torch.compile fuses this into the next kernel

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        x8, s, w_scale, *weights = ctx.saved_tensors
        scale = scale_for((dy.abs().amax(dim=1, keepdim=True) * s).amax(), GRADIENTS)
        g8 = (dy * (s / scale)).to(GRADIENTS)
        w8 = rounded(weights, w_scale)
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


def scale_for(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the fp32 divisor with which `largest` just fits in `dtype`.

    If `largest` is non-finite, so is the divisor, and then the loss.
    """
    return (largest.float() / LARGEST[dtype]).clamp(min=SMALLEST_SCALE)


def rounded(weights: Sequence[Tensor], scale: Tensor) -> Tensor:
    """Round `weights` and concatenate them along their rows."""
    parts = [(weight / scale).to(VALUES) for weight in weights]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def by_columns(matrix: Tensor) -> Tensor:
    """Return the matrix in column-major order, as the kernels require for the second factor."""
    return matrix.t().contiguous().t()


def one(like: Tensor) -> Tensor:
    return torch.ones((), device=like.device)


def product(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype, *, fast: bool
) -> Tensor:
    return torch._scaled_mm(
        a, b, scale_a=a_scale, scale_b=b_scale, out_dtype=dtype, use_fast_accum=fast
    )
