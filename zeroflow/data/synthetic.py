"""Synthetic data: seeded token ids with an easily learnt structure and a known entropy.

The ids are a Markov chain over a small alphabet: every token has four successors with probabilities
1/2, 1/4, 1/8 and 1/8. A document ends with constant probability, and a new one starts with a random
token. So the last token says all that the chain knows about the next one.
"""

import math
from typing import NamedTuple

import numpy as np

from zeroflow.data.arrays import RowArray, TokenArray

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


def chain_loss(rows: RowArray, vocab_size: int) -> float:
    """Mean loss of the true chain on packed `rows`, in nats per token.

    It is not the entropy rate of the chain: the first token of a row is no target, and where short
    documents are packed into rows, half of the documents start there. A model can get a little
    lower only by what packing by length gives away about the ends of documents.
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
