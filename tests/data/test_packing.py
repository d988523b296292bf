import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeroflow.data.packing import Concatenation

DOCUMENTS = st.lists(st.integers(1, 30), max_size=20)
"""Lengths; the tokens are numbered, so that each can be told from all others."""


@given(lengths=DOCUMENTS, row_tokens=st.integers(2, 12), takes=st.randoms(use_true_random=False))
def test_rows_are_the_documents_end_to_end_whenever_they_are_taken(lengths, row_tokens, takes):
    stream = list(range(sum(lengths)))
    packing, taken, start = Concatenation(row_tokens), [], 0
    for length in lengths:
        place = packing.add(np.arange(start, start + length, dtype=np.int32))
        assert place.row * row_tokens + place.offset == start
        assert place.offset < row_tokens
        start += length
        rows = takes.randint(0, packing.waiting)
        taken += packing.take(rows).tolist()
    taken += packing.take(packing.waiting).tolist()

    full = len(stream) // row_tokens
    assert packing.rows == full and packing.waiting == 0 and packing.tokens == len(stream)
    assert taken == [stream[i * row_tokens : (i + 1) * row_tokens] for i in range(full)]


def test_rows_keep_the_type_and_shape_of_tokens():
    packing = Concatenation(4)
    assert packing.take(0).shape == (0, 4)
    packing.add(np.arange(9, dtype=np.int32))
    rows = packing.take(2)
    assert rows.shape == (2, 4) and rows.dtype == np.int32


def test_rows_without_a_token_to_predict_are_refused():
    with pytest.raises(ValueError, match="rows of 1 tokens leave no token to predict"):
        Concatenation(1)
