"""The LLaMA decoder, with Hugging Face's parameter names and rotary convention.

A state dict of `Llama` is also one of `transformers.LlamaForCausalLM`, or with `qk_norm` of
`Qwen3ForCausalLM`, apart from a tied head, so export copies tensors without conversion. The model
has no buffers, which sharding would have to handle: `forward` computes the rotary angles.
"""

import hashlib
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zeroflow.config import Config
from zeroflow.model.attention import (
    AttentionKernel,
    Mask,
    attend,
    dense_mask,
    positions_within,
)
from zeroflow.units import count

# B batch  T tokens  D hidden size  H query heads  K key/value heads  E features per head
# M intermediate size of the feed-forward network  V vocabulary


class Shape(Config):
    """Shape of the decoder without its vocabulary; names as in Hugging Face's `LlamaConfig`."""

    hidden_size: PositiveInt
    """Features per token in the residual stream."""

    num_hidden_layers: PositiveInt
    """Number of decoder blocks."""

    num_attention_heads: PositiveInt
    """Number of query heads; it must divide `hidden_size`."""

    num_key_value_heads: PositiveInt
    """Number of key/value heads; fewer than `num_attention_heads` is grouped-query attention."""

    intermediate_size: PositiveInt
    """Features inside the SwiGLU feed-forward network."""

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"--hidden-size {self.hidden_size} cannot be divided among "
                f"{self.num_attention_heads} query heads"
            )
        if (features := self.hidden_size // self.num_attention_heads) % 2:
            raise ValueError(
                f"--hidden-size {self.hidden_size} / {count(self.num_attention_heads, 'head')} = "
                f"{count(features, 'feature')} per head: rotary embeddings need an even number"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} query heads cannot share "
                f"{self.num_key_value_heads} key/value heads evenly"
            )
        return self


class ModelConfig(Shape):
    """Everything that defines the network."""

    vocab_size: PositiveInt
    """Number of rows of the embedding: the tokenizer's vocabulary, padded."""

    rms_norm_eps: PositiveFloat = 1e-5

    rope_theta: PositiveFloat = 500_000.0
    """Base of the wavelengths of the rotary embedding."""

    tie_word_embeddings: bool = Field(True, exclude_if=lambda tied: tied)
    """True if the output head is the embedding. Some other models have a separate head."""

    features_per_head: PositiveInt | None = Field(None, exclude_if=lambda size: size is None)
    """Features of a head; None if they are `hidden_size / num_attention_heads`."""

    qk_norm: bool = Field(False, exclude_if=lambda normed: not normed)
    """True if every query and key is normalised, as in Qwen3."""

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return self.features_per_head or self.hidden_size // self.num_attention_heads

    @property
    def query_size(self) -> int:
        """Total features of queries, and of the output of attention."""
        return self.num_attention_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        """Total features of queries, keys and values."""
        return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim

    @property
    def embedding_parameters(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def parameters_by_part(self) -> dict[str, int]:
        """Number of parameters by part. A tied output head is the embedding."""
        D, M, L, E = (
            self.hidden_size,
            self.intermediate_size,
            self.num_hidden_layers,
            self.head_dim,
        )
        head = {} if self.tie_word_embeddings else {"output head": self.embedding_parameters}
        return {
            "embedding": self.embedding_parameters,
            **head,
            "attention": L * 2 * D * (self.num_attention_heads + self.num_key_value_heads) * E,
            "feed-forward": L * 3 * D * M,
            "norms": (2 * L + 1) * D + L * self._head_norms,
        }

    @property
    def parameters(self) -> int:
        return sum(self.parameters_by_part.values())

    @property
    def block_parameters(self) -> int:
        """Number of parameters of one decoder block."""
        parts, D = self.parameters_by_part, self.hidden_size
        matrices = (parts["attention"] + parts["feed-forward"]) // self.num_hidden_layers
        return matrices + 2 * D + self._head_norms

    @property
    def _head_norms(self) -> int:
        """Number of parameters of the norms of queries and keys of a block."""
        return 2 * self.head_dim if self.qk_norm else 0

    def flops_per_token(self, context: int) -> int:
        """Return the FLOPs of one token's forward and backward pass at `context` tokens.

        6·N for the matrices, where N counts the embedding once, as the output head, and 6·L·H·E·T
        for causal attention, half of the full square: https://arxiv.org/abs/2204.02311, appendix B.
        """
        looked_up = 0 if self.tie_word_embeddings else self.embedding_parameters
        return (
            6 * (self.parameters - looked_up)
            + 6 * self.num_hidden_layers * self.query_size * context
        )


INITIAL_STD = 0.02
"""Standard deviation of initial weights; smaller for residual outputs. Norms start at 1."""

ActivationCheckpointing = Literal["none", "selective", "full"]
"""Activations to recompute in the backward pass: those within the feed-forward networks (selective)
or all those within a block (full)."""


class Llama(nn.Module):
    """Decoder-only language model: https://arxiv.org/abs/2302.13971

    Weights are fp32. Matrix products and the residual stream are in `dtype`; norms and rotary
    embeddings are computed in fp32.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config, dtype)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        tokens: Tensor,
        head: "Head | None" = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Return `head` of the hidden states (B, T, D) and the output matrix (V, D).

        The default head returns logits (B, T, V). Training passes its loss as the head, because
        the loss computes logits in chunks, and a sharded model has the whole output matrix only
        inside this forward pass.

        Args:
            tokens: ids, (B, T).
            documents: index of each token's document within its row, (B, T). Attention then stays
                within a document, and positions restart with it. None: each row is one document.
        """
        output = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return (head or linear)(self.model(tokens, documents), output.weight)


Head = Callable[[Tensor, Tensor], Tensor]
"""A function of the hidden states (B, T, D) and the output matrix (V, D)."""

Linear = Callable[..., Tensor]
"""`linear`, or another implementation of it."""


FusedFeedForward = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`hopper.swiglu`, which takes the place of `swiglu`."""


class Trunk(nn.Module):
    """Embedding, decoder blocks and final norm: everything below the output head."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.mask_for: Callable[[Tensor, torch.dtype], Mask] = dense_mask
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens: Tensor, documents: Tensor | None) -> Tensor:
        x = self.embed_tokens(tokens).to(self.dtype)  # (B, T, D)
        if documents is None:
            mask, positions = None, torch.arange(tokens.shape[1], device=tokens.device)
        else:
            mask = self.mask_for(documents, x.dtype)
            positions = positions_within(documents)[:, None]
        cos, sin = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        for block in self.layers:
            x = block(x, cos, sin, mask)
        return self.norm(x)


class Block(nn.Module):
    """Attention and feed-forward network, each with a norm before and a residual around it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)
        self.activation_checkpointing: ActivationCheckpointing = "none"

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask) -> Tensor:
        if self.activation_checkpointing == "full":
            return checkpointed(self._forward, x, cos, sin, mask)
        return self._forward(x, cos, sin, mask)

    def _forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self._feed_forward(self.post_attention_layernorm(x))

    def _feed_forward(self, x: Tensor) -> Tensor:
        if self.activation_checkpointing == "selective":
            return checkpointed(self.mlp, x)
        return self.mlp(x)


class Attention(nn.Module):
    """Causal self-attention, grouped-query: https://arxiv.org/abs/2305.13245

    With `qk_norm`, each query and key is normalised: https://arxiv.org/abs/2302.05442
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, E = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.heads = E, (H, K, K)
        self.linear: Linear = linear
        self.kernel: AttentionKernel = "cudnn"
        self.q_proj = nn.Linear(D, H * E, bias=False)
        self.k_proj = nn.Linear(D, K * E, bias=False)
        self.v_proj = nn.Linear(D, K * E, bias=False)
        self.o_proj = nn.Linear(H * E, D, bias=False)
        self.q_norm = RMSNorm(E, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(E, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask) -> Tensor:
        qkv = self.linear(x, self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        heads = qkv.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H + 2K, T, E)
        q, k, v = heads.split(self.heads, dim=1)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        y = attend(q, k, v, mask, self.kernel)  # (B, H, T, E)
        return self.linear(y.transpose(1, 2).flatten(2), self.o_proj.weight)  # (B, T, D)


class FeedForward(nn.Module):
    """SwiGLU: https://arxiv.org/abs/2002.05202"""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, M = config.hidden_size, config.intermediate_size
        self.linear: Linear = linear
        self.fused: FusedFeedForward | None = None
        self.gate_proj = nn.Linear(D, M, bias=False)
        self.up_proj = nn.Linear(D, M, bias=False)
        self.down_proj = nn.Linear(M, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight
        if self.fused is not None:
            return self.fused(x, gate, up, down)
        return swiglu(x, gate, up, down, self.linear)


class RMSNorm(nn.Module):
    """RMSNorm in fp32, as Hugging Face computes it: https://arxiv.org/abs/1910.07467"""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * y).to(x.dtype)


def checkpointed(function: Callable[..., Tensor], *inputs: Tensor | Mask) -> Tensor:
    """Return `function` of `inputs`; keep only the inputs and recompute it in the backward pass.

    Source: https://arxiv.org/abs/1604.06174
    """
    # Called within a block's forward method instead of wrapping the module: PyTorch would compile
    # each wrapper separately, but compiles the forward method once for all blocks. The forward pass
    # uses no random numbers, so no random state needs to be preserved
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def linear(x: Tensor, *weights: Tensor) -> Tensor:
    """Multiply `x` (..., D) by the transposes of `weights` (N, D), concatenated, in `x`'s dtype.

    One product with concatenated matrices is faster than separate products. When weights are cast
    to bf16, concatenating them costs nothing extra: both happen in the same pass over memory.
    """
    cast = [weight.to(x.dtype) for weight in weights]
    return F.linear(x, torch.cat(cast) if len(cast) > 1 else cast[0])


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, product: Linear = linear) -> Tensor:
    """Return the feed-forward network of `x` (..., D) with weights (M, D), (M, D) and (D, M)."""
    gated, linear_part = product(x, gate, up).chunk(2, dim=-1)
    return product(F.silu(gated) * linear_part, down)


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (..., T, head_dim) of the rotary angles at `positions` (..., T).

    Source: https://arxiv.org/abs/2104.09864, in the half-split order of Hugging Face.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = 1.0 / theta ** (exponents / head_dim)
    half = positions[..., None].float() * frequencies
    angles = torch.cat((half, half), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate features i and i + E/2 of every head in `x` (B, H, T, E) by their angle."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def initialize(model: Llama, seed: int) -> None:
    """Draw the initial weights: normal(0, 0.02), residual outputs scaled by 1/sqrt(2·layers).

    Each parameter has its own generator on the CPU, seeded by `seed` and the parameter's name. So
    the weights do not depend on the device, or on the order or sharding of the parameters.

    Source: Radford et al. 2019 (GPT-2), section 2.3.
    """
    residual_scale = 1 / math.sqrt(2 * model.config.num_hidden_layers)

    @torch.no_grad()
    def fill(name: str, parameter: Tensor) -> None:
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            return
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = INITIAL_STD * (residual_scale if residual else 1.0)
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
        parameter.copy_(torch.empty(parameter.shape).normal_(std=std, generator=generator))

    # In threads: one core takes ten seconds for the 1.3 billion numbers of medium
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(lambda named: fill(*named), model.named_parameters()))
