"""Text from a model."""

from collections.abc import Callable

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor

from zeroflow.config import Config
from zeroflow.data.tokenizer import Tokenizer
from zeroflow.model.llama import Llama, linear


class SamplingConfig(Config):
    """How the next token is chosen."""

    tokens: PositiveInt = 64
    """Tokens to add at most; an end of text ends it earlier."""

    temperature: NonNegativeFloat = 0.8
    """0 always takes the likeliest token."""

    top_k: NonNegativeInt = 50
    """Choose among this many likeliest tokens; 0 among all."""

    seed: NonNegativeInt = 0


def _own(token: int) -> int:
    return token


@torch.no_grad()  # in inference_mode, weights that ranks gather could not be trained on after it
def complete(
    model: Llama,
    tokenizer: Tokenizer,
    prompt: str,
    config: SamplingConfig,
    *,
    context: int,
    agree: Callable[[int], int] = _own,
) -> str:
    """`prompt` and what the model adds to it.

    Args:
        context: tokens the model was trained on at once; older ones are forgotten.
        agree: what ranks that compute the same model take for the one that each has chosen.
    """
    backend = tokenizer.load()
    ids = [tokenizer.end_of_text, *backend.encode(prompt, add_special_tokens=False).ids]
    added = _sample(model, ids, tokenizer, config, context, agree)
    return backend.decode(ids[1:] + added, skip_special_tokens=False)


def complete_ids(
    model: Llama,
    tokenizer: Tokenizer,
    config: SamplingConfig,
    *,
    context: int,
    agree: Callable[[int], int] = _own,
) -> list[int]:
    """Token ids of a new document, for data that is no text."""
    with torch.no_grad():
        return _sample(model, [tokenizer.end_of_text], tokenizer, config, context, agree)


def _sample(
    model: Llama,
    ids: list[int],
    tokenizer: Tokenizer,
    config: SamplingConfig,
    context: int,
    agree: Callable[[int], int],
) -> list[int]:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(config.seed)
    added: list[int] = []
    # A compiled model would be compiled again for every length
    with torch.compiler.set_stance("force_eager"):
        while len(added) < config.tokens:
            window = torch.tensor([(ids + added)[-context:]], device=device)
            logits = model(window, _last_logits)[0, : tokenizer.vocab_size].float().cpu()
            token = agree(_choose(logits, config, generator))
            if token == tokenizer.end_of_text:
                break
            added.append(token)
    return added


def _last_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return linear(hidden[:, -1], weight)  # (B, V)


def _choose(logits: Tensor, config: SamplingConfig, generator: torch.Generator) -> int:
    if config.temperature == 0:
        return int(logits.argmax())
    logits = logits / config.temperature
    if 0 < config.top_k < len(logits):
        logits[logits < logits.topk(config.top_k).values[-1]] = -torch.inf
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
