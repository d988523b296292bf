"""The model sizes and their default settings.

To add one, add its name to `SizeName` and an entry to `SIZES`. Flags, help texts, defaults and
Prefect's deployments follow.
"""

from collections.abc import Callable
from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from zeroflow.model.llama import ModelConfig, Shape

NOMINAL_VOCABULARY = 128_256
"""Vocabulary of Llama-3.1. The parameters of a size are counted with it, so that they do not depend
on the tokenizer."""

VOCAB_MULTIPLE = 128
"""The rows of the embedding are padded to a multiple of this, which fills tensor-core tiles."""


class Size(Shape):
    """A shape and the defaults for training it on GPUs."""

    learning_rate: PositiveFloat
    """Peak learning rate of the schedule."""

    batch_tokens: PositiveInt
    """Number of tokens in a global batch."""

    @property
    def nominal_parameters(self) -> int:
        return with_vocabulary(self, NOMINAL_VOCABULARY).parameters


SizeName = Literal["tiny", "small", "medium"]

SIZES: dict[SizeName, Size] = {  # from the smallest to the largest
    "tiny": Size(
        hidden_size=320,
        num_hidden_layers=4,
        num_attention_heads=10,
        num_key_value_heads=2,
        intermediate_size=1024,
        learning_rate=3e-3,
        batch_tokens=2**18,
    ),
    "small": Size(
        hidden_size=1152,
        num_hidden_layers=12,
        num_attention_heads=18,
        num_key_value_heads=6,
        intermediate_size=3072,
        learning_rate=2e-3,
        batch_tokens=2**19,
    ),
    "medium": Size(
        hidden_size=2048,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=5632,
        learning_rate=1e-3,
        batch_tokens=2**20,
    ),
}


def with_vocabulary(shape: Shape, vocab_size: int) -> ModelConfig:
    """Return the configuration of `shape` for a tokenizer of `vocab_size` tokens, padded up."""
    padded = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    return ModelConfig(**shape.model_dump(include=set(Shape.model_fields)), vocab_size=padded)


def nearest_size(shape: Shape) -> Size:
    """Return the size with the most similar number of parameters, by their ratio."""
    parameters = with_vocabulary(shape, NOMINAL_VOCABULARY).parameters

    def ratio(size: Size) -> float:
        return max(size.nominal_parameters / parameters, parameters / size.nominal_parameters)

    return min(SIZES.values(), key=ratio)


def by_size(text: Callable[[Size], str]) -> str:
    """Return the `text` of every size for a help text, such as "46M / 318M for tiny / small"."""
    return f"{' / '.join(map(text, SIZES.values()))} for {' / '.join(SIZES)}"
