import numpy as np
import pytest
from shard_sets import SYNTHETIC, synthetic_tokenizer

from zeroflow.data import synthetic
from zeroflow.data.build import build_shards
from zeroflow.data.rows import Rows
from zeroflow.data.shards import ShardConfig


def take(count: int, *, vocab_size: int = 400, seed: int = 0):
    """Token ids of the first documents."""
    blocks = range(-(-count // synthetic.BLOCK_DOCUMENTS))
    made = [synthetic.generate_block(vocab_size, seed, block).tokens for block in blocks]
    return [tokens for block in made for tokens in block][:count]


def test_same_seed_gives_the_same_documents_and_another_seed_different_ones():
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


def test_loss_of_the_chain_is_the_entropy_of_its_tokens():
    vocab_size = 400
    stream = np.concatenate(take(4000, vocab_size=vocab_size)).astype(np.int64)
    pairs = np.bincount(stream[:-1] * vocab_size + stream[1:], minlength=vocab_size**2)
    pairs = pairs.reshape(vocab_size, vocab_size)
    joint, given = pairs / pairs.sum(), pairs.sum(1, keepdims=True) / pairs.sum()
    seen = pairs > 0
    measured = -(joint[seen] * np.log((joint / np.maximum(given, 1e-12))[seen])).sum()
    # a million tokens: sampling deviates by 0.001, counting 1,300 kinds of pair adds as much
    assert measured == pytest.approx(synthetic.chain_loss(stream[None], vocab_size), abs=0.005)
    assert measured < 0.3 * np.log(synthetic.ALPHABET)


@pytest.mark.parametrize("packing", ["best-fit", "concat"])
def test_entropy_of_packed_rows_is_the_loss_of_the_true_chain_on_them(packing, tmp_path):
    config = ShardConfig(seq_len=64, train_rows=20_000, validation_rows=1, packing=packing)
    shards = build_shards(config, SYNTHETIC, synthetic_tokenizer(400), tmp_path)
    rows = Rows(shards, "train")
    tokens = rows[np.arange(len(rows))].astype(np.int64)
    before, after = tokens[:, :-1].ravel(), tokens[:, 1:].ravel()
    pairs = np.zeros((400, 400))
    np.add.at(pairs, (before, after), 1)
    pairs[399, 399] = 0  # padding
    # The four most frequent successors of a token have these probabilities
    successors = np.argsort(-pairs[:399, :399], axis=1)[:, :4]
    chain = np.zeros((400, 400))
    np.put_along_axis(chain[:399], successors, (255 / 256) * synthetic.SUCCESSORS, axis=1)
    chain[:399, 399] = 1 / 256
    chain[399, np.unique(before[before < 399])] = 1 / 256  # an alphabet of 256 tokens
    loss = -(pairs[pairs > 0] * np.log(chain[pairs > 0])).sum() / pairs.sum()
    assert shards.entropy == pytest.approx(loss, abs=0.001), "1.6M draws of deviation 0.9"
    # Half of the documents begin with a row if packed by length, where no token predicts them
    stream = np.concatenate(take(4000)).astype(np.int64)
    lower = synthetic.chain_loss(stream[None], 400) - shards.entropy
    assert (lower > 0.005) == (packing == "best-fit")
