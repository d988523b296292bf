"""Synthetic data: seeded token ids with a structure that is learnt quickly and a known entropy.

The ids are a Markov chain over a small alphabet: every token has four successors with probabilities
1/2, 1/4, 1/8 and 1/8, a document ends with constant probability, and a new document starts
anywhere. One token of context tells all there is to know, so no model can go below `entropy_rate`.
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
"""Documents that are generated at once, from one seed."""

PART_BLOCKS = 8
"""Blocks in a part of a shard set."""

PART_TOKENS = PART_BLOCKS * BLOCK_DOCUMENTS / END_PROBABILITY
"""Tokens in a part, on average."""


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


class SyntheticBlock(NamedTuple):
    """Some documents; those of different blocks are independent."""

    ids: list[str]
    tokens: list[TokenArray]
    """Token ids of each document, closed by the last id of the vocabulary."""


def generate_block(vocab_size: int, seed: int, block: int) -> SyntheticBlock:
    """The documents from number `block` * BLOCK_DOCUMENTS on."""
    size, end_of_text = alphabet_size(vocab_size), vocab_size - 1
    # Ids spread over the whole vocabulary, so that all of the embedding is used
    ids = np.linspace(0, end_of_text, size, endpoint=False).astype(np.int32)
    chain = np.random.default_rng([seed, 0])  # the same for all blocks
    successors = np.stack(
        [chain.permutation(np.arange(size))[: len(SUCCESSORS)] for _ in range(size)]
    )
    random = np.random.default_rng([seed, 1, block])
    lengths = random.geometric(END_PROBABILITY, size=(BLOCK_DOCUMENTS,))
    # all documents advance together, column by column; what is beyond a document's end is unused
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
