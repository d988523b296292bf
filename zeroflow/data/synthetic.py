"""Synthetic data: seeded token ids with a structure that is easy to learn and a known entropy.

The ids are a Markov chain over a small alphabet: every token has four successors with probabilities
1/2, 1/4, 1/8 and 1/8. A document ends with constant probability, and a new one starts with a random
token. So the distribution of the next token depends only on the last token.
"""

import math
from typing import NamedTuple

import numpy as np

from zeroflow.data.arrays import RowArray, TokenArray

SUCCESSORS = np.array([0.5, 0.25, 0.125, 0.125])
"""Probabilities of the successors of a token."""

_WHICH = np.arange(len(SUCCESSORS))

END_PROBABILITY = 1 / 256
"""Probability that a document ends after a token; documents have 256 tokens on average."""

ALPHABET = 256
"""Maximum number of tokens in use."""

BLOCK_DOCUMENTS = 1024
"""Number of documents of a block, which is generated from one seed."""

PART_BLOCKS = 8
"""Number of blocks in a part of a shard set."""

PART_TOKENS = PART_BLOCKS * BLOCK_DOCUMENTS / END_PROBABILITY
"""Average number of tokens of a part."""


def alphabet_size(vocab_size: int) -> int:
    """Return the number of tokens in use; the last id of the vocabulary ends a document."""
    return min(ALPHABET, vocab_size - 1)


def chain_loss(rows: RowArray, vocab_size: int) -> float:
    """Return the mean loss of the true chain on packed `rows`, in nats per token.

    It differs from the entropy rate of the chain: the first token of a row is not a target, and
    with short documents, many documents start there. A model can be slightly better than the chain,
    because packing by length reveals something about the ends of documents.
    """
    ends = rows == vocab_size - 1
    before, after = ends[:, :-1], ends[:, 1:]
    starts, stops, steps = (
        int(np.count_nonzero(kind)) for kind in (before & ~after, ~before & after, ~before & ~after)
    )
    successors = -float(SUCCESSORS @ np.log(SUCCESSORS))
    nats = (
        starts * math.log(alphabet_size(vocab_size))
        - stops * math.log(END_PROBABILITY)
        + steps * (successors - math.log(1 - END_PROBABILITY))
    )
    return nats / (starts + stops + steps)


class SyntheticBlock(NamedTuple):
    """Documents of one block; different blocks are independent."""

    ids: list[str]
    tokens: list[TokenArray]
    """Token ids of each document; each ends with the last id of the vocabulary."""


def generate_block(vocab_size: int, seed: int, block: int) -> SyntheticBlock:
    """Return block number `block`, whose first document is number `block` * BLOCK_DOCUMENTS."""
    size, end_of_text = alphabet_size(vocab_size), vocab_size - 1
    # The ids are spread over the vocabulary, so that rows from the whole embedding are used
    ids = np.linspace(0, end_of_text, size, endpoint=False).astype(np.int32)
    chain = np.random.default_rng([seed, 0])  # the same for all blocks
    successors = np.stack(
        [chain.permutation(np.arange(size))[: len(SUCCESSORS)] for _ in range(size)]
    )
    random = np.random.default_rng([seed, 1, block])
    lengths = random.geometric(END_PROBABILITY, size=(BLOCK_DOCUMENTS,))
    # All documents advance together, step by step; states beyond the end of a document are unused
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
