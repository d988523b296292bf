"""Text generation with a model."""

from collections.abc import Callable, Container, Iterator

import torch
from pydantic import Field
from torch import Tensor

from zeroflow.config import Config, FiniteNonNegative, WholeNonNegative, WholePositive
from zeroflow.data.tokenizer import Tokenizer
from zeroflow.model.llama import Llama, linear
from zeroflow.training import zero


class SamplingConfig(Config):
    """Settings of text generation."""

    tokens: WholePositive = 64
    """Maximum number of tokens to add; an end-of-text token stops earlier."""

    temperature: FiniteNonNegative = 0.8
    """Sampling temperature; 0 always takes the most likely token."""

    top_k: WholeNonNegative = 50
    """Sample from this many most likely tokens; 0 samples from all."""

    top_p: float = Field(1.0, gt=0, le=1, exclude_if=lambda share: share == 1)
    """Sample from the most likely tokens that together have this probability; 1 samples from
    all."""

    seed: WholeNonNegative = 0


NextLogits = Callable[[list[int]], Tensor]
"""A function from the ids of a text to the logits (V,) of the token that follows it."""


def _own_choice(token: int) -> int:
    return token


def generate(
    model: Llama,
    tokenizer: Tokenizer,
    prompt: str,
    config: SamplingConfig,
    *,
    context: int,
    agree: Callable[[int], int] = _own_choice,
) -> str:
    """Return `prompt` and the text that the model adds to it.

    Args:
        context: context length that the model was trained with; older tokens are ignored.
        agree: maps the token that this rank chose to the one that all ranks use.
    """
    loaded = tokenizer.load()
    ids = loaded.encode(prompt, add_special_tokens=False).ids
    # Documents of the training data begin after an end-of-text token
    added = _sample(model, [tokenizer.end_of_text, *ids], tokenizer, config, context, agree)
    # Decoded together with the prompt: a decoder may add a space depending on the token before
    before, text = (loaded.decode(part, skip_special_tokens=True) for part in (ids, ids + added))
    return prompt + text[len(before) :]


def generate_ids(
    model: Llama,
    tokenizer: Tokenizer,
    config: SamplingConfig,
    *,
    context: int,
    agree: Callable[[int], int] = _own_choice,
) -> list[int]:
    """Return the token ids of a new document, for synthetic data without text."""
    return _sample(model, [tokenizer.end_of_text], tokenizer, config, context, agree)


def sample(
    next_logits: NextLogits,
    ids: list[int],
    config: SamplingConfig,
    *,
    ends: Container[int],
    agree: Callable[[int], int] = _own_choice,
) -> Iterator[int]:
    """Yield the ids that follow `ids`, up to a token in `ends`, which is left out.

    Args:
        agree: as for `generate`.
    """
    text = list(ids)
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(config.tokens):
        token = agree(_choose(next_logits(text), config, generator))
        if token in ends:
            return
        text.append(token)
        yield token


def _sample(
    model: Llama,
    ids: list[int],
    tokenizer: Tokenizer,
    config: SamplingConfig,
    context: int,
    agree: Callable[[int], int],
) -> list[int]:
    device = zero.device_of(model)

    # Not inference_mode: it would turn gathered weights into inference tensors, which training
    # cannot use afterwards
    @torch.no_grad()
    def next_logits(text: list[int]) -> Tensor:
        window = torch.tensor([text[-context:]], device=device)
        # Eager: torch.compile would recompile the model for every length
        with torch.compiler.set_stance("force_eager"):
            logits = model(window, _last_logits)[0]
        # Without the ids that pad the vocabulary, which were never trained
        return logits[: tokenizer.vocab_size].float().cpu()

    return list(sample(next_logits, ids, config, ends=(tokenizer.end_of_text,), agree=agree))


def _last_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return linear(hidden[:, -1], weight)  # (B, V)


_COLDEST = 1e-30
"""Logits divided by a lower temperature exceed fp32. Already here, one token has all chances."""


def _choose(logits: Tensor, config: SamplingConfig, generator: torch.Generator) -> int:
    if config.temperature < _COLDEST:
        return int(logits.argmax())
    logits = logits / config.temperature
    if 0 < config.top_k < len(logits):
        logits[logits < logits.topk(config.top_k).values[-1]] = -torch.inf
    chances = logits.softmax(-1)
    if config.top_p < 1:
        most, tokens = chances.sort(descending=True, stable=True)
        # A token is left out if the more likely ones already have the requested probability
        chances[tokens[most.cumsum(-1) - most >= config.top_p]] = 0
    return int(torch.multinomial(chances, 1, generator=generator))
