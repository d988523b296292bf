"""Products in 8 bits, for GPUs that have them: another way to compute `llama.linear`.

Activations and weights are e4m3, gradients e5m2, as in https://arxiv.org/abs/2209.05433, scaled by
the largest value that each has now.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# T tokens  D features  N features of the product

MULTIPLE = 16
"""Of which all sides of a product have to be, by what the tensor cores' kernels ask."""

_VALUES, _GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2
_LARGEST = {dtype: torch.finfo(dtype).max for dtype in (_VALUES, _GRADIENTS)}
_SMALLEST_SCALE = 2.0**-100
"""Of what is all zeros. Scales are divided by it, which stays a number in fp32."""

# Fast sums have some 14 bits on Hopper: https://arxiv.org/abs/2412.19437, section 3.3.2. Those of
# gradients are in fp32, as in torchao's tensor-wise recipe
_FAST_OUTPUT, _FAST_GRADIENTS = True, False

_WEIGHT_GRADIENT = True
"""Whether the weights' gradient is a product in 8 bits too, which has both sides transposed first;
else it is one in the type of the activations."""


def linear(x: Tensor, *weights: Tensor) -> Tensor:
    """`x` (..., D) times the transposes of `weights` (N, D), side by side, in the type of `x`.

    That is bf16 where it is compiled for a GPU: of fp32, compiled by PyTorch 2.11 for an H100, all
    gradients came out as zeros.
    """
    y: Tensor = _Linear.apply(x.flatten(0, -2), *weights)
    return y.unflatten(0, x.shape[:-1])


class _Linear(torch.autograd.Function):
    """y = x Wᵀ for tokens x (T, D) and joined weights W (N, D).

    A token has a scale of its own, s, so that it changes nothing in the results of another: a
    common one would let it see, by their roundings, those that come later. W has one for all.

    s cannot leave the sum over tokens that the gradient of W is. There the gradient of y takes it
    in before it is rounded, and one rounding serves both products:
    dW = (s·dy)ᵀ x/s and dx = (s·dy) W / s.

    Kept for the backward pass are x in 8 bits and the weights as they are.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        s = _scale(x.abs().amax(dim=1, keepdim=True), _VALUES)  # (T, 1)
        largest = torch.stack([weight.abs().amax() for weight in weights]).amax()
        w_scale = _scale(largest, _VALUES)
        x8 = (x / s).to(_VALUES)
        ctx.save_for_backward(x8, s, w_scale, *weights)
        w8 = _rounded(weights, w_scale)
        y = _product(x8, w8.t(), _one(x), w_scale, x.dtype, fast=_FAST_OUTPUT)
        return (y * s).to(x.dtype)  # for free in whatever reads y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        x8, s, w_scale, *weights = ctx.saved_tensors
        scale = _scale((dy.abs().amax(dim=1, keepdim=True) * s).amax(), _GRADIENTS)
        g8 = (dy * (s / scale)).to(_GRADIENTS)
        w8 = _rounded(weights, w_scale)
        dx = _product(g8, _by_columns(w8), scale, w_scale, dy.dtype, fast=_FAST_GRADIENTS)
        dx = (dx / s).to(dy.dtype)
        if _WEIGHT_GRADIENT:
            dw = _product(
                *(g8.t().contiguous(), _by_columns(x8), scale, _one(dy), torch.float32),
                fast=_FAST_GRADIENTS,
            )
        else:
            dw = torch.mm(dy.t(), (x8.float() * s).to(dy.dtype)).float()
        return dx, *dw.split([len(weight) for weight in weights])


def _scale(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """By which values are divided so that the `largest` is just held; fp32.

    What is no finite number makes one that is none, and so is the loss.
    """
    return (largest.float() / _LARGEST[dtype]).clamp(min=_SMALLEST_SCALE)


def _rounded(weights: Sequence[Tensor], scale: Tensor) -> Tensor:
    """One below the other."""
    rounded = [(weight / scale).to(_VALUES) for weight in weights]
    return torch.cat(rounded) if len(rounded) > 1 else rounded[0]


def _by_columns(matrix: Tensor) -> Tensor:
    """The same in memory column by column, which is how a second factor is read."""
    return matrix.t().contiguous().t()


def _one(like: Tensor) -> Tensor:
    return torch.ones((), device=like.device)


def _product(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype, *, fast: bool
) -> Tensor:
    return torch._scaled_mm(
        a, b, scale_a=a_scale, scale_b=b_scale, out_dtype=dtype, use_fast_accum=fast
    )
