"""Synthetic data: seeded token ids with an easily learnt structure and a known entropy.

The ids are a Markov chain over a small alphabet: every token has four successors with probabilities
1/2, 1/4, 1/8 and 1/8. A document ends with constant probability, and a new one starts with a random
token. One token of context is all the information there is, so no model can reach a loss below
`entropy_rate`.
"""

import math
from typing import NamedTuple

import numpy as np

from zeroflow.data.arrays import TokenArray

SUCCESSORS = np.array([0.5, 0.25, 0.125, 0.125])
_WHICH = np.arange(len(SUCCESSORS))
END_PROBABILITY = 1 / 256
ALPHABET = 256

BLOCK_DOCUMENTS = 1024
"""Documents of a block, which is generated from one seed."""

PART_BLOCKS = 8
"""Blocks in a part of a shard set."""

PART_TOKENS = PART_BLOCKS * BLOCK_DOCUMENTS / END_PROBABILITY
"""Average number of tokens of a part."""


def alphabet_size(vocab_size: int) -> int:
    """Number of tokens in use; the last id of the vocabulary ends a document."""
    return min(ALPHABET, vocab_size - 1)


def entropy_rate(vocab_size: int) -> float:
    """Lowest possible mean loss in nats per token, given at least one token of context."""
    successors = -float(SUCCESSORS @ np.log(SUCCESSORS))
    end = END_PROBABILITY
    within = -end * math.log(end) - (1 - end) * math.log(1 - end) + (1 - end) * successors
    start = math.log(alphabet_size(vocab_size))
    share_of_ends = end / (1 + end)  # a document has 1/end tokens on average, plus its end
    return (1 - share_of_ends) * within + share_of_ends * start


class SyntheticBlock(NamedTuple):
    """Documents of one block; different blocks are independent."""

    ids: list[str]
    tokens: list[TokenArray]
    """Token ids of each document; each ends with the last id of the vocabulary."""


def generate_block(vocab_size: int, seed: int, block: int) -> SyntheticBlock:
    """Block number `block`: documents `block` * BLOCK_DOCUMENTS and following."""
    size, end_of_text = alphabet_size(vocab_size), vocab_size - 1
    # Ids spread over the whole vocabulary, so that the whole range of the embedding is used
    ids = np.linspace(0, end_of_text, size, endpoint=False).astype(np.int32)
    chain = np.random.default_rng([seed, 0])  # the same for all blocks
    successors = np.stack(
        [chain.permutation(np.arange(size))[: len(SUCCESSORS)] for _ in range(size)]
    )
    random = np.random.default_rng([seed, 1, block])
    lengths = random.geometric(END_PROBABILITY, size=(BLOCK_DOCUMENTS,))
    # all documents advance together, step by step; states beyond a document's end are unused
    states = np.empty((lengths.max(), BLOCK_DOCUMENTS), dtype=np.int64)
    states[0] = random.integers(size, size=BLOCK_DOCUMENTS)
    choices = random.choice(_WHICH, size=states.shape, p=SUCCESSORS)
    for i in range(1, len(states)):
        states[i] = successors[states[i - 1], choices[i]]
    numbers = range(block * BLOCK_DOCUMENTS, (block + 1) * BLOCK_DOCUMENTS)
    made = [
        np.append(ids[states[:length, number]], np.int32(end_of_text))
        for number, length in enumerate(lengths)
    ]
    return SyntheticBlock([f"synthetic-{number}" for number in numbers], made)
