"""Triton kernels for fp8: SwiGLU and its gradient from bf16 inputs, and a transpose.

Imported only for GPUs: Triton comes with PyTorch's GPU builds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# N tokens  M intermediate size

_TOKENS, _FEATURES = 32, 128
"""Tile of the backward kernel, the fastest of 18 on an H200."""

_SIDE = 128
"""Tile of the transpose, the fastest of 8 on an H200."""

_FOUR_TO_E5M2: tl.constexpr = tl.constexpr("""{
.reg .b16 low, high;
cvt.rn.satfinite.e5m2x2.f32 low, $2, $1;
cvt.rn.satfinite.e5m2x2.f32 high, $4, $3;
mov.b32 $0, {low, high};
}""")


@triton.jit
def _forward(
    products, s, h, scales, size, largest: tl.constexpr, smallest: tl.constexpr, block: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    m = tl.arange(0, block)
    inside = m < size
    products += token * 2 * size
    factor = tl.load(s + token)
    gate = tl.load(products + m, mask=inside, other=0.0).to(tl.float32) * factor
    up = tl.load(products + size + m, mask=inside, other=0.0).to(tl.float32) * factor
    y = gate * tl.sigmoid(gate) * up
    # tl.max ignores NaN, but a NaN must reach the loss
    bad = tl.sum(tl.where(y == y, 0, 1), 0)
    scale = tl.maximum(tl.max(tl.abs(y), 0) / largest, smallest)
    scale = tl.where(bad > 0, float("nan"), scale)
    tl.store(scales + token, scale)
    tl.store(h + token * size + m, (y / scale).to(h.dtype.element_ty), mask=inside)


@triton.jit
def _gradients(products, s, dh, h_scales, token, m, count, size):
    """Return SwiGLU divided by its scale, and the gradients w.r.t. gate and up, times `s`."""
    inside = (token < count) & (m < size)
    factor = tl.load(s + token, mask=token < count, other=1.0)
    h_scale = tl.load(h_scales + token, mask=token < count, other=1.0)
    at = products + token * 2 * size + m
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32) * factor
    up = tl.load(at + size, mask=inside, other=0.0).to(tl.float32) * factor
    d = tl.load(dh + token * size + m, mask=inside, other=0.0).to(tl.float32) / h_scale
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    d_gate = d * up * (sigmoid + silu * (1 - sigmoid)) * factor
    return silu * up / h_scale, d_gate, d * silu * factor


@triton.jit
def _largest(products, s, dh, h_scales, largest, count, size, every, block: tl.constexpr):
    token = tl.program_id(0).to(tl.int64) * every
    _, d_gate, d_up = _gradients(products, s, dh, h_scales, token, tl.arange(0, block), count, size)
    # Deterministic, because a maximum does not depend on the order
    tl.atomic_max(largest, tl.max(tl.maximum(tl.abs(d_gate), tl.abs(d_up)), 0))


@triton.jit
def _clipped(x, limit: tl.constexpr):
    """Clip finite values; others become NaN, which skips the step."""
    clipped = tl.minimum(tl.maximum(x, -limit), limit)
    return tl.where(tl.abs(x) < float("inf"), clipped, float("nan"))


@triton.jit
def bits_of_e5m2(x):
    """Round `x` to e5m2, and return its bits. Values that are too large become the largest one."""
    return tl.inline_asm_elementwise(
        _FOUR_TO_E5M2, "=r,r,r,r,r", [x], dtype=tl.uint8, is_pure=True, pack=4
    )


@triton.jit
def _store_transposed(at, x, mask):
    """Round `x` to e5m2, and store its transpose.

    The result is that of a cast, but the instructions differ. With Triton 3.6 on an H200, when the
    result of one cast was stored both directly and transposed, every fourth row of the transpose
    was wrong.
    """
    at = at.to(tl.pointer_type(tl.uint8), bitcast=True)
    tl.store(at, tl.trans(bits_of_e5m2(x)), mask=mask)


@triton.jit
def _backward(
    products,
    s,
    dh,
    h_scales,
    scale,
    p,
    p_t,
    h_t,
    count,
    size,
    limit: tl.constexpr,
    tokens: tl.constexpr,
    features: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * tokens + tl.arange(0, tokens)
    m = tl.program_id(1).to(tl.int64) * features + tl.arange(0, features)
    rows, columns = token[:, None], m[None, :]
    h, d_gate, d_up = _gradients(products, s, dh, h_scales, rows, columns, count, size)
    divisor = tl.load(scale)
    d_gate = _clipped(d_gate / divisor, limit)
    d_up = _clipped(d_up / divisor, limit)
    inside = (rows < count) & (columns < size)
    at = p + rows * 2 * size + columns
    tl.store(at, d_gate.to(p.dtype.element_ty), mask=inside)
    tl.store(at + size, d_up.to(p.dtype.element_ty), mask=inside)
    inside_t = (m[:, None] < size) & (token[None, :] < count)
    at_t = m[:, None] * count + token[None, :]
    _store_transposed(p_t + at_t, d_gate, inside_t)
    _store_transposed(p_t + (m[:, None] + size) * count + token[None, :], d_up, inside_t)
    tl.store(h_t + at_t, tl.trans(h.to(h_t.dtype.element_ty)), mask=inside_t)


def forward(products: Tensor, s: Tensor, h: Tensor, scales: Tensor, *, smallest: float) -> None:
    """Write SwiGLU of `products` (N, 2M) times `s` (N, 1) to `h` (N, M) and `scales` (N, 1).

    Args:
        smallest: smallest scale.
    """
    N, M = h.shape
    block = triton.next_power_of_2(M)
    _forward[(N,)](
        *(products, s, h, scales, M, torch.finfo(h.dtype).max, smallest, block),
        num_warps=_warps(block),
    )


def largest_gradient(
    products: Tensor, s: Tensor, dh: Tensor, h_scale: Tensor, every: int
) -> Tensor:
    """Return the largest absolute gradient, times `s`, over every `every`-th token; a scalar."""
    N, M = dh.shape
    largest = s.new_zeros(())
    block = triton.next_power_of_2(M)
    _largest[(triton.cdiv(N, every),)](
        *(products, s, dh, h_scale, largest, N, M, every, block), num_warps=_warps(block)
    )
    return largest


def backward(
    inputs: tuple[Tensor, ...], scale: Tensor, p: Tensor, p_t: Tensor, h_t: Tensor
) -> None:
    """Write the gradient w.r.t. `products` to `p` (N, 2M) and `p_t` (2M, N), SwiGLU to `h_t`.

    Args:
        inputs: products; their scales `s`; the gradient w.r.t. SwiGLU, times SwiGLU's scales;
            SwiGLU's scales.
        scale: scale of `p`, a scalar.
        h_t: (M, N).
    """
    M, N = h_t.shape
    _backward[(triton.cdiv(N, _TOKENS), triton.cdiv(M, _FEATURES))](
        *(*inputs, scale, p, p_t, h_t, N, M),
        *(torch.finfo(p.dtype).max, _TOKENS, _FEATURES),
        num_warps=8,
    )


@triton.jit
def _transpose(x, y, rows, columns, side: tl.constexpr):
    i = tl.program_id(1).to(tl.int64) * side + tl.arange(0, side)
    j = tl.program_id(0).to(tl.int64) * side + tl.arange(0, side)
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    tile = tl.load(x + i[:, None] * columns + j[None, :], mask=inside, other=0)
    tl.store(y + j[:, None] * rows + i[None, :], tl.trans(tile), mask=tl.trans(inside))


def transpose(matrix: Tensor, out: Tensor) -> None:
    """Write the transpose of `matrix` to `out`; both have one byte per element."""
    rows, columns = matrix.shape
    tiles = (
        triton.cdiv(columns, _SIDE),
        triton.cdiv(rows, _SIDE),
    )  # the second is limited to 65,535
    _transpose[tiles](
        *(matrix.view(torch.uint8), out.view(torch.uint8), rows, columns, _SIDE), num_warps=8
    )


def _warps(block: int) -> int:
    return max(1, min(16, block // 512))
