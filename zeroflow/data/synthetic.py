"""Seeded token ids with a structure that is quick to learn and an entropy that is known.

A Markov chain over a small alphabet: every token has four successors with probabilities 1/2, 1/4,
1/8 and 1/8, documents end with constant probability, and a new document starts anywhere. One
token of context tells all there is to know, so no model can go below `entropy_rate`.
"""

import math
from typing import NamedTuple

import numpy as np

from zeroflow.data.packing import Tokens

SUCCESSORS = np.array([0.5, 0.25, 0.125, 0.125])
_WHICH = np.arange(len(SUCCESSORS))
END_PROBABILITY = 1 / 256
ALPHABET = 256
BLOCK = 1024
"""Documents made at once."""


def alphabet_size(vocab_size: int) -> int:
    """Tokens in use; the last id of the vocabulary ends a document."""
    return min(ALPHABET, vocab_size - 1)


def entropy_rate(vocab_size: int) -> float:
    """Least possible mean loss in nats per token, after at least one token of context."""
    successors = -float(SUCCESSORS @ np.log(SUCCESSORS))
    end = END_PROBABILITY
    within = -end * math.log(end) - (1 - end) * math.log(1 - end) + (1 - end) * successors
    start = math.log(alphabet_size(vocab_size))
    share_of_ends = end / (1 + end)  # stationary: a document has 1/end tokens and its end
    return (1 - share_of_ends) * within + share_of_ends * start


class Block(NamedTuple):
    """Some documents; those of different blocks are independent."""

    ids: list[str]
    tokens: list[Tokens]
    """Each closed by the last id of the vocabulary."""


def documents(vocab_size: int, seed: int, block: int) -> Block:
    """Documents number `block` * BLOCK and on."""
    size, end_of_text = alphabet_size(vocab_size), vocab_size - 1
    # Ids spread over the whole vocabulary, so that every part of the embedding is used
    ids = np.linspace(0, end_of_text, size, endpoint=False).astype(np.int32)
    chain = np.random.default_rng([seed, 0])
    successors = np.stack(
        [chain.permutation(np.arange(size))[: len(SUCCESSORS)] for _ in range(size)]
    )
    random = np.random.default_rng([seed, 1, block])
    lengths = random.geometric(END_PROBABILITY, size=(BLOCK,))
    states = np.empty((lengths.max(), BLOCK), dtype=np.int64)
    states[0] = random.integers(size, size=BLOCK)
    choices = random.choice(_WHICH, size=states.shape, p=SUCCESSORS)
    for i in range(1, len(states)):
        states[i] = successors[states[i - 1], choices[i]]
    numbers = range(block * BLOCK, (block + 1) * BLOCK)
    made = [
        np.append(ids[states[:length, number]], np.int32(end_of_text))
        for number, length in enumerate(lengths)
    ]
    return Block([f"synthetic-{number}" for number in numbers], made)
