"""The sizes that are compared, by name."""

from typing import Literal

from zeroflow.model.llama import ModelConfig, Shape

VOCAB_MULTIPLE = 128
"""Embedding rows are padded to a multiple of this, as matrix units like it."""

SizeName = Literal["tiny", "small", "medium"]

SIZES: dict[SizeName, Shape] = {
    "tiny": Shape(
        hidden_size=320,
        num_hidden_layers=4,
        num_attention_heads=10,
        num_key_value_heads=2,
        intermediate_size=1024,
    ),
    "small": Shape(
        hidden_size=1152,
        num_hidden_layers=12,
        num_attention_heads=18,
        num_key_value_heads=6,
        intermediate_size=3072,
    ),
    "medium": Shape(
        hidden_size=2048,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=5632,
    ),
}


def with_vocabulary(shape: Shape, vocab_size: int) -> ModelConfig:
    """The network of `shape` for a tokenizer of `vocab_size` tokens, padded up."""
    padded = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    return ModelConfig(**shape.model_dump(), vocab_size=padded)
