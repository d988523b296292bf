from itertools import islice

import numpy as np
import pytest

from zeroflow.data import synthetic


def take(count: int, *, vocab_size: int = 400, seed: int = 0):
    return list(islice(synthetic.documents(vocab_size, seed), count))


def test_same_seed_gives_the_same_documents_and_another_seed_others():
    first, again, other = take(1100), take(1100), take(1100, seed=1)
    assert [d.id for d in first] == [d.id for d in again] == [f"synthetic-{i}" for i in range(1100)]
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(first, again, strict=True))
    assert sum(np.array_equal(a.tokens, b.tokens) for a, b in zip(first, other, strict=True)) < 11


@pytest.mark.parametrize("vocab_size", [300, 32_768, 128_256])
def test_ids_lie_within_the_vocabulary_and_the_last_ends_every_document(vocab_size):
    for document in take(50, vocab_size=vocab_size):
        assert document.tokens.dtype == np.int32
        assert document.tokens.min() >= 0
        assert document.tokens[-1] == vocab_size - 1
        assert document.tokens[:-1].max() < vocab_size - 1
        assert len(document.tokens) >= 2 and document.text_bytes == 0


def test_ids_are_spread_over_the_whole_vocabulary():
    used = np.unique(np.concatenate([d.tokens for d in take(300, vocab_size=128_256)]))
    # a few of the alphabet succeed no other, and come only where a document begins
    assert len(used) > 0.9 * synthetic.ALPHABET
    assert np.diff(used).max() < 128_256 / 50


def test_entropy_is_that_of_the_tokens():
    vocab_size = 400
    stream = np.concatenate([d.tokens for d in take(4000, vocab_size=vocab_size)]).astype(np.int64)
    pairs = np.bincount(stream[:-1] * vocab_size + stream[1:], minlength=vocab_size**2)
    pairs = pairs.reshape(vocab_size, vocab_size)
    joint, given = pairs / pairs.sum(), pairs.sum(1, keepdims=True) / pairs.sum()
    seen = pairs > 0
    measured = -(joint[seen] * np.log((joint / np.maximum(given, 1e-12))[seen])).sum()
    # a million tokens: sampling deviates by 0.001, counting 1,300 kinds of pair adds as much
    assert measured == pytest.approx(synthetic.entropy_rate(vocab_size), abs=0.005)
    assert measured < 0.3 * np.log(synthetic.ALPHABET)
