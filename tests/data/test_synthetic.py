import numpy as np
import pytest

from zeroflow.data import synthetic


def take(count: int, *, vocab_size: int = 400, seed: int = 0):
    """Token ids of the first documents."""
    blocks = range(-(-count // synthetic.BLOCK_DOCUMENTS))
    made = [synthetic.generate_block(vocab_size, seed, block).tokens for block in blocks]
    return [tokens for block in made for tokens in block][:count]


def test_same_seed_gives_the_same_documents_and_another_seed_others():
    first, again, other = take(1100), take(1100), take(1100, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert sum(np.array_equal(a, b) for a, b in zip(first, other, strict=True)) < 11
    assert synthetic.generate_block(400, 0, 2).ids == [f"synthetic-{i}" for i in range(2048, 3072)]
    beginnings = {tuple(tokens[:8].tolist()) for tokens in first if len(tokens) >= 8}
    assert len(beginnings) > 1000, "no two blocks are alike"


@pytest.mark.parametrize("vocab_size", [300, 32_768, 128_256])
def test_ids_lie_within_the_vocabulary_and_the_last_ends_every_document(vocab_size):
    for tokens in take(50, vocab_size=vocab_size):
        assert tokens.dtype == np.int32
        assert tokens.min() >= 0
        assert tokens[-1] == vocab_size - 1
        assert tokens[:-1].max() < vocab_size - 1
        assert len(tokens) >= 2


def test_ids_are_spread_over_the_whole_vocabulary():
    used = np.unique(np.concatenate(take(300, vocab_size=128_256)))
    # a few of the alphabet succeed no other, and come only where a document begins
    assert len(used) > 0.9 * synthetic.ALPHABET
    assert np.diff(used).max() < 128_256 / 50


def test_entropy_is_that_of_the_tokens():
    vocab_size = 400
    stream = np.concatenate(take(4000, vocab_size=vocab_size)).astype(np.int64)
    pairs = np.bincount(stream[:-1] * vocab_size + stream[1:], minlength=vocab_size**2)
    pairs = pairs.reshape(vocab_size, vocab_size)
    joint, given = pairs / pairs.sum(), pairs.sum(1, keepdims=True) / pairs.sum()
    seen = pairs > 0
    measured = -(joint[seen] * np.log((joint / np.maximum(given, 1e-12))[seen])).sum()
    # a million tokens: sampling deviates by 0.001, counting 1,300 kinds of pair adds as much
    assert measured == pytest.approx(synthetic.entropy_rate(vocab_size), abs=0.005)
    assert measured < 0.3 * np.log(synthetic.ALPHABET)
