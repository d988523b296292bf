"""Attention and feed-forward network with the Hopper kernels of the packages in `zeroflow[hopper]`.

`training/kernels.py` measures for which shapes they are faster. Each kernel is wrapped in a custom
operator of PyTorch, so that torch.compile puts it into a graph without tracing it.
"""

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

# B batch  T tokens  H query heads  K key/value heads  E features per head
# N tokens of all rows  D hidden size  M intermediate size of the feed-forward network

HEAD_DIMS = (64, 96, 128)
"""Features per head that both passes of the attention kernel support."""


def supports_loss(vocab_size: int, hidden_size: int) -> bool:
    """Return True if the kernels of `training/hopper_loss.py` support a model of these sizes."""
    return vocab_size % 128 == 0 and hidden_size % 8 == 0


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute causal attention like `attention.attend`, with FlashAttention-4 of
    https://github.com/Dao-AILab/flash-attention

    Its backward pass is deterministic if `torch.use_deterministic_algorithms` is set.
    """
    y, _ = torch.ops.zeroflow.flash_attention_4(*(x.transpose(1, 2) for x in (q, k, v)))
    return y.transpose(1, 2)


@cache
def _flash_attention() -> Any:
    from flash_attn.cute import interface

    # Its own compiler passes this argument and then warns about it
    warnings.filterwarnings("ignore", message="Argument aux_data")
    return interface


@torch.library.custom_op("zeroflow::flash_attention_4", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the attention (B, T, H, E) and the log of each softmax's denominator (B, H, T)."""
    out, log_sums, *_ = _flash_attention()._flash_attn_fwd(q, k, v, causal=True, return_lse=True)
    return out, log_sums


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    B, T, H, E = q.shape
    return q.new_empty(B, T, H, E), q.new_empty(B, H, T, dtype=torch.float32)


@torch.library.custom_op("zeroflow::flash_attention_4_backward", mutates_args=())
def _attention_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, d_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    deterministic = torch.are_deterministic_algorithms_enabled()
    _flash_attention()._flash_attn_bwd(
        *(q, k, v, out, d_out, log_sums),
        causal=True,
        deterministic=deterministic,
        **{"dq": dq, "dk": dk, "dv": dv},
    )
    return dq, dk, dv


@_attention_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, d_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep_for_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)


def _attention_gradients(ctx: Any, d_out: Tensor, _: None) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.zeroflow.flash_attention_4_backward(
        *ctx.saved_tensors, d_out.contiguous()
    )
    return gradients


_attention.register_autograd(_attention_gradients, setup_context=_keep_for_attention)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Apply the feed-forward network to `x` (..., D), with weights (M, D), (M, D) and (D, M).

    The matrix products compute SwiGLU and its gradient while they write their results, so neither
    needs a separate pass over memory. The backward pass recomputes the activations from the
    products, so that only the products are kept.
    """
    # The kernels expect alternating rows of gate and up
    joined = torch.stack((gate.to(x.dtype), up.to(x.dtype)), dim=1).flatten(0, 1)
    y, _ = torch.ops.zeroflow.swiglu(x.flatten(0, -2), joined, down.to(x.dtype))
    return y.unflatten(0, x.shape[:-1])


@torch.library.custom_op("zeroflow::swiglu", mutates_args=())
def _swiglu(x: Tensor, joined: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outputs (N, D), and the products (N, 2M) with alternating gate and up."""
    from quack.gemm_interface import gemm_gated

    products, activations = gemm_gated(x, joined.T, activation="swiglu", tuned=False)
    return activations @ down.T, products


@_swiglu.register_fake
def _(x: Tensor, joined: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), len(down)), x.new_empty(len(x), len(joined))


@torch.library.custom_op("zeroflow::swiglu_backward", mutates_args=())
def _swiglu_backward(
    x: Tensor, joined: Tensor, down: Tensor, products: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from quack.gemm_interface import gemm_dgated

    d_products, activations = gemm_dgated(dy, down, products, activation="swiglu", tuned=False)
    return d_products @ joined, d_products.T @ x, dy.T @ activations


@_swiglu_backward.register_fake
def _(
    x: Tensor, joined: Tensor, down: Tensor, products: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), joined.new_empty(joined.shape), down.new_empty(down.shape)


def _keep_for_swiglu(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.set_materialize_grads(False)


def _swiglu_gradients(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.zeroflow.swiglu_backward(
        *ctx.saved_tensors, dy.contiguous()
    )
    return gradients


_swiglu.register_autograd(_swiglu_gradients, setup_context=_keep_for_swiglu)
