import queue

import numpy as np
import pytest
import torch
from patience import HANG_SECONDS
from tiny import ArrayRows

from zeroflow.data.batches import (
    IGNORED,
    Batches,
    BatchShape,
    MicroBatch,
    Prefetcher,
    to_micro_batch,
)
from zeroflow.data.order import Order, Segment

ROWS = (np.arange(23)[:, None] * 100 + np.arange(5)).view(ArrayRows)
"""23 rows of 5 tokens, each token different; what Batches needs of `Rows` an array has as well."""


def batches(*, accumulate: int, ranks: int, micro: int, rank: int = 0, seed: int = 7) -> Batches:
    shape = BatchShape(accumulate, ranks, micro)
    whole = [Segment(batch=0, rows=len(ROWS))]
    order = Order(whole, batch_rows=accumulate * ranks * micro, seed=seed)
    return Batches(ROWS, shape, order, rank=rank)


# global batches of 1, 6, 12, 23, 30 rows out of 23: also larger than an epoch
@pytest.mark.parametrize("split", [(1, 1, 1), (2, 3, 1), (3, 2, 2), (1, 1, 23), (5, 2, 3)])
def test_steps_of_any_size_visit_every_row_once_an_epoch(split):
    accumulate, ranks, micro = split
    size = accumulate * ranks * micro
    source = batches(accumulate=accumulate, ranks=ranks, micro=micro)
    visited = np.concatenate([source.row_ids(step).ravel() for step in range(23)])
    assert len(visited) == 23 * size
    for epoch in visited.reshape(size, 23):
        assert sorted(epoch.tolist()) == list(range(23))


@pytest.mark.parametrize("split", [(12, 1, 1), (1, 12, 1), (2, 3, 2), (3, 2, 2), (1, 4, 3)])
@pytest.mark.parametrize("step", [0, 1, 40])
def test_ranks_and_micro_batches_only_split_the_global_batch(split, step):
    whole = batches(accumulate=1, ranks=1, micro=12).micro_batches(step)[0].inputs
    accumulate, ranks, micro = split
    parts = []
    for rank in range(ranks):
        mine = batches(accumulate=accumulate, ranks=ranks, micro=micro, rank=rank)
        shares = mine.micro_batches(step)
        assert [share.inputs.shape for share in shares] == [(micro, 4)] * accumulate
        parts += [share.inputs for share in shares]
    joined = torch.cat(parts)
    assert sorted(joined.tolist()) == sorted(whole.tolist())


def test_batch_needs_no_history():
    walked = batches(accumulate=2, ranks=1, micro=3)
    for step in range(9):
        before = walked.micro_batches(step)
    fresh = batches(accumulate=2, ranks=1, micro=3).micro_batches(8)
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(before, fresh, strict=True))
    other = batches(accumulate=2, ranks=1, micro=3, seed=8).micro_batches(8)
    assert not all(torch.equal(a.inputs, b.inputs) for a, b in zip(before, other, strict=True))


@pytest.mark.parametrize("dtype", [np.int32, np.uint16])
def test_target_is_the_token_after_the_input(dtype):
    rows = np.array([[5, 6, 7], [8, 9, 65_535]]).astype(dtype)
    inputs, targets, valid, _ = to_micro_batch(rows, end_of_text=0)
    assert valid == 4
    assert inputs.tolist() == [[5, 6], [8, 9]]
    assert targets.tolist() == [[6, 7], [9, 65_535]]
    assert inputs.dtype == targets.dtype == torch.int64


def test_padding_is_ignored_and_the_end_of_a_document_is_not():
    end = 9
    rows = np.array([[1, 2, end, 3, end, end, end], [end, 4, end, 5, 6, 7, end]])
    inputs, targets, valid, _ = to_micro_batch(rows, end_of_text=end)
    assert inputs.tolist() == rows[:, :-1].tolist()
    assert targets.tolist() == [
        [2, end, 3, end, IGNORED, IGNORED],
        [4, end, 5, 6, 7, end],
    ]
    assert valid == 10


def test_documents_of_a_row_are_numbered_with_their_ends():
    end = 9
    rows = np.array([[1, 2, end, 3, end, end, end], [end, 4, end, 5, 6, 7, end]])
    batch = to_micro_batch(rows, end_of_text=end, document_mask=True)
    assert batch.documents.tolist() == [[0, 0, 0, 1, 1, 2], [0, 1, 1, 2, 2, 2]]
    assert to_micro_batch(rows, end_of_text=end).documents is None


def test_next_batch_is_made_while_the_one_before_is_used():
    made, asked = queue.SimpleQueue(), []

    def make(step: int) -> list[MicroBatch]:
        if step == 7:
            raise OSError("a row that cannot be read")
        made.put(step)
        return [MicroBatch(torch.tensor([step]), torch.tensor([step]), valid=1)]

    ahead = Prefetcher(make)
    for step in (3, 4, 5, 0, 1, 6):
        [batch] = ahead.micro_batches(step)
        asked.append(int(batch.inputs))
        while (
            step != 6 and made.get(timeout=HANG_SECONDS) != step + 1
        ):  # nobody has asked for that yet
            pass
    assert asked == [3, 4, 5, 0, 1, 6]
    with pytest.raises(OSError, match="cannot be read"):
        ahead.micro_batches(7)
