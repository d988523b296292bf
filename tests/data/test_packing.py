import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeroflow.data.packing import PACKINGS, best_fit, concatenate, lay_out

FILL = -1
LENGTHS = st.lists(st.integers(1, 30), max_size=40)
"""Lengths of documents whose tokens are numbered, so that all can be told apart."""

ROW_TOKENS = st.integers(2, 12)


def laid_out(stream, sizes, pieces, row_tokens, fill):
    """The rows of documents that lie end to end in `stream`."""
    rows = np.full((pieces.rows, row_tokens), fill, dtype=np.int32)
    ends = np.cumsum(sizes)
    half = len(sizes) // 2
    for some in (slice(half), slice(half, len(sizes))):  # as they come in several batches
        of_them = pieces.select(some.start or 0, some.stop)
        lay_out(stream, (ends - sizes)[some], ends[some], of_them, rows)
    return rows


def rows_of(pack, lengths, row_tokens):
    """The rows, each as its list of tokens without the filling."""
    sizes = np.array(lengths, dtype=np.int64)
    stream = np.arange(sizes.sum(), dtype=np.int32)
    pieces = pack(sizes, row_tokens)
    rows = laid_out(stream, sizes, pieces, row_tokens, FILL)
    for row in rows:
        filled = row == FILL
        assert not filled[0] and (np.diff(filled.astype(int)) >= 0).all(), "filling comes last"
    return [[token for token in row if token != FILL] for row in rows.tolist()]


@pytest.mark.parametrize("name", PACKINGS)
@given(lengths=LENGTHS, row_tokens=ROW_TOKENS)
def test_every_token_is_in_exactly_one_row(name, lengths, row_tokens):
    rows = rows_of(PACKINGS[name], lengths, row_tokens)
    assert sorted(token for row in rows for token in row) == list(range(sum(lengths)))


@pytest.mark.parametrize("name", PACKINGS)
@given(lengths=LENGTHS, row_tokens=ROW_TOKENS)
def test_pieces_give_the_position_of_every_token(name, lengths, row_tokens):
    sizes = np.array(lengths, dtype=np.int64)
    pieces = PACKINGS[name](sizes, row_tokens)
    assert (np.diff(pieces.document) >= 0).all()
    begins = np.cumsum(sizes) - sizes
    rows = laid_out(np.arange(sizes.sum(), dtype=np.int32), sizes, pieces, row_tokens, FILL)
    for document, start, tokens, row, offset in zip(*pieces[:5], strict=True):
        found = rows[row, offset : offset + tokens].tolist()
        first = begins[document] + start
        assert found == list(range(first, first + tokens)) and tokens > 0
    assert np.array_equal(np.bincount(pieces.document, pieces.tokens), sizes)


@given(lengths=LENGTHS, row_tokens=ROW_TOKENS)
def test_concatenation_is_the_stream_cut_at_every_full_row(lengths, row_tokens):
    stream = list(range(sum(lengths)))
    expected = [stream[i : i + row_tokens] for i in range(0, len(stream), row_tokens)]
    assert rows_of(concatenate, lengths, row_tokens) == expected


def plain_best_fit(lengths, row_tokens):
    """Room left in each row, by trying all rows for every piece."""
    pieces = []
    rows = []
    for length in lengths:
        whole = length <= row_tokens
        while length > row_tokens:
            rows.append(0)
            length -= row_tokens
        if length == 1 and not whole:
            rows.append(row_tokens - 1)  # an end of text alone
        else:
            pieces.append(length)
    for piece in sorted(pieces, reverse=True):
        fitting = [room for room in rows if room >= piece]
        room = min(fitting, default=row_tokens)
        if fitting:
            rows.remove(room)
        rows.append(room - piece)
    return sorted(rows)


@given(lengths=LENGTHS, row_tokens=ROW_TOKENS)
def test_best_fit_equals_a_plain_search(lengths, row_tokens):
    rows = rows_of(best_fit, lengths, row_tokens)
    rooms = sorted(row_tokens - len(row) for row in rows)
    assert rooms == plain_best_fit(lengths, row_tokens)


@given(lengths=LENGTHS, row_tokens=ROW_TOKENS)
def test_best_fit_cuts_only_what_is_longer_than_a_row(lengths, row_tokens):
    pieces = best_fit(np.array(lengths, dtype=np.int64), row_tokens)
    counts = np.bincount(pieces.document, minlength=len(lengths))
    assert counts.tolist() == [-(-length // row_tokens) for length in lengths]


def test_lengths_like_those_of_text_are_packed_with_little_padding():
    lengths = np.random.default_rng(0).lognormal(6.5, 1, 2000).astype(np.int64) + 1
    pieces = best_fit(lengths, 2049)
    assert pieces.rows * 2049 < 1.005 * lengths.sum()


def test_same_lengths_are_packed_the_same():
    lengths = np.random.default_rng(1).integers(1, 50, 500)
    first, again = best_fit(lengths, 32), best_fit(lengths, 32)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("name", PACKINGS)
@given(lengths=LENGTHS, row_tokens=ROW_TOKENS)
def test_documents_are_laid_out_with_and_without_their_end_tokens_equally(
    name, lengths, row_tokens
):
    sizes = np.array(lengths, dtype=np.int64)
    stream = np.arange(1, sizes.sum() + 1, dtype=np.int32)
    stream[np.cumsum(sizes) - 1] = 0  # the end of text
    pieces = PACKINGS[name](sizes, row_tokens)
    rows = np.zeros((pieces.rows, row_tokens), dtype=np.uint16)
    ends = np.cumsum(sizes)
    lay_out(stream, ends - sizes, ends - 1, pieces, rows)
    assert np.array_equal(rows, laid_out(stream, sizes, pieces, row_tokens, 0))


@pytest.mark.parametrize("name", PACKINGS)
@given(lengths=st.lists(st.integers(2, 30), max_size=40), row_tokens=ROW_TOKENS)
def test_padding_is_exactly_an_end_of_text_after_another(name, lengths, row_tokens):
    """So that a reader can tell it, and the beginnings of documents, from the ids alone."""
    sizes = np.array(lengths, dtype=np.int64)
    stream = np.ones(sizes.sum(), dtype=np.int32)
    stream[np.cumsum(sizes) - 1] = 0  # the end of text
    pieces = PACKINGS[name](sizes, row_tokens)
    rows = laid_out(stream, sizes, pieces, row_tokens, 0)
    marked = laid_out(stream, sizes, pieces, row_tokens, FILL)
    ends = rows == 0
    assert np.array_equal(marked[:, 1:] == FILL, ends[:, 1:] & ends[:, :-1])
    inner = pieces.offset > 0
    before = ends[pieces.row[inner], pieces.offset[inner] - 1]
    assert before.all(), "what begins within a row follows an end of text"
