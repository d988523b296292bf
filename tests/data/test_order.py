from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from zeroflow.data.order import Coverage, Order, Segment, Skip, permute


def order(
    *segments: tuple[int, int], batch_rows: int = 1, seed: int = 5, skips: Sequence[Skip] = ()
) -> Order:
    """The order of a run whose segments are (batch, rows)."""
    found = [Segment(batch=batch, rows=rows) for batch, rows in segments]
    return Order(found, batch_rows=batch_rows, seed=seed, skips=skips)


def read(found: Order, steps: int) -> list[list[int]]:
    """Rows of the first steps."""
    return found.rows(np.arange(steps)).tolist()


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@example(size=1, key=0)
@example(size=2, key=1)
@example(size=4096, key=1)
@example(size=4097, key=1)
def test_permutation_visits_every_place_once(size, key):
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


def test_permutation_of_a_place_needs_no_others():
    size = 10**12
    places = np.array([0, 1, 5 * 10**11, size - 1])
    together = permute(places, size, key=3)
    assert together.tolist() == [int(permute(places[i : i + 1], size, key=3)[0]) for i in range(4)]
    assert len(set(together.tolist())) == 4 and together.max() < size


def test_permutation_maps_a_place_to_all_places_equally_often():
    size, keys = 10, 1000
    visits = np.stack([permute(np.arange(size), size, key) for key in range(keys)])
    for place in range(size):
        counts = np.bincount(visits[:, place], minlength=size)
        # binomial with mean 100 and deviation 9.5: five of them
        assert abs(counts - keys / size).max() < 48


@pytest.mark.parametrize("size", [1, 2, 23, 100, 1000])
def test_every_row_is_read_once_per_epoch_in_a_new_order(size):
    ids = order((0, size)).rows(np.arange(3 * size)).reshape(3, size)
    for epoch in ids:
        assert sorted(epoch.tolist()) == list(range(size))
    if size >= 23:
        assert all(not np.array_equal(a, b) for a, b in pairwise(ids))
        other = order((0, size), seed=6).rows(np.arange(size))
        assert not np.array_equal(ids[0], other.ravel())


def test_order_of_a_run_stays_what_it_was():
    """The order of the first versions, so that their runs resume with the same batches."""
    assert read(order((0, 23), batch_rows=23, seed=7), 2) == [
        [6, 8, 10, 15, 1, 16, 19, 11, 7, 9, 2, 20, 3, 12, 13, 0, 14, 17, 22, 4, 21, 18, 5],
        [11, 5, 20, 14, 4, 16, 15, 22, 21, 2, 1, 0, 12, 13, 19, 6, 3, 17, 7, 18, 8, 9, 10],
    ]
    large = order((0, 5_000_000_000), batch_rows=2, seed=123)
    assert large.rows(np.arange(5 * 10**11, 5 * 10**11 + 3)).ravel().tolist() == [
        1773728463, 3921536996, 3621273013, 2735057691, 3966114530, 1090533875,
    ]  # fmt: skip


@st.composite
def extended(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Segments of a run that was extended up to three times, each with more rows."""
    count = draw(st.integers(1, 4))
    more = st.integers(1, 30)
    batches = np.cumsum([0, *(draw(more) for _ in range(count - 1))]).tolist()
    rows = np.cumsum([draw(more) for _ in range(count)]).tolist()
    return list(zip(batches, rows, strict=True))


@given(segments=extended(), batch_rows=st.integers(1, 7))
def test_no_row_of_an_extended_run_is_read_again_before_all_are_read(segments, batch_rows):
    found = order(*segments, batch_rows=batch_rows)
    unread: set[int] = set()
    there = 0
    more = dict(segments)
    for batch in range(segments[-1][0] + 40):
        if batch in more:
            unread |= set(range(there, more[batch]))
            there = more[batch]
        for row in found.rows(np.array([batch])).ravel().tolist():
            unread = unread or set(range(there))
            assert row in unread
            unread.remove(row)


@given(segments=extended(), batch_rows=st.integers(1, 7))
def test_steps_before_an_extension_keep_their_rows(segments, batch_rows):
    *before, (seam, _) = segments
    if before:
        shorter = order(*before, batch_rows=batch_rows)
        assert read(order(*segments, batch_rows=batch_rows), seam) == read(shorter, seam)


def test_old_and_new_rows_are_mixed_after_an_extension():
    found = np.array(read(order((0, 500), (20, 1000), batch_rows=10), 100))
    first, second = found[20:60] < 500, found[60:] < 500
    # 300 old rows of 800 in 80 steps: a hypergeometric with mean 150 and deviation 6.8
    assert abs(first.sum() - 150) < 35 and abs(second.sum() - 150) < 35


@given(
    segments=extended(),
    batch_rows=st.integers(1, 7),
    steps=st.integers(1, 60),
    skips=st.lists(st.builds(Skip, step=st.integers(0, 30), batches=st.integers(1, 5)), max_size=3),
)
def test_coverage_counts_what_was_read(segments, batch_rows, steps, skips):
    found = order(*segments, batch_rows=batch_rows, skips=skips)
    rows = segments[-1][1]
    times = np.bincount(np.ravel(read(found, steps)), minlength=rows)
    if len(times) > rows:
        pytest.fail("a row that is not there")
    assert found.coverage(steps) == Coverage(
        times.sum() / rows, (times > 0).mean(), (times > 1).mean()
    )
    if found.is_first_epoch(steps):
        assert times.max() == 1
    elif not skips:
        assert times.max() > 1


def test_run_extended_to_twice_its_steps_reads_every_row_once():
    """100 of 200 steps on half of the rows, then 100 more."""
    twice = order((0, 800), (100, 1600), batch_rows=8)
    assert twice.coverage(200) == Coverage(epochs=1, covered=1, repeated=0)
    assert twice.is_first_epoch(200) and not twice.is_first_epoch(201)


def test_skipped_window_is_left_out_and_nothing_else_moves():
    plain = read(order((0, 23), batch_rows=4), 12)

    def skipping(*windows: tuple[int, int]) -> list[list[int]]:
        skips = [Skip(step=step, batches=batches) for step, batches in windows]
        return read(order((0, 23), batch_rows=4, skips=skips), 6)

    assert skipping((2, 3)) == plain[:2] + plain[5:9]
    assert skipping((2, 3), (4, 1)) == plain[:2] + plain[5:7] + plain[8:10]
    # Back to an earlier step: the window skipped first stays skipped
    assert skipping((4, 2), (1, 1)) == [plain[0], *plain[2:4], *plain[6:9]]
    assert skipping((4, 2), (1, 4)) == [plain[0], *plain[7:12]]


@given(
    windows=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 6)), max_size=5),
    segments=extended(),
)
def test_skipped_data_is_never_read_again(windows, segments):
    left_out: set[int] = set()
    skips: list[Skip] = []
    for step, batches in windows:
        before = order(*segments, skips=skips)
        left_out |= set(before.batches(np.arange(step, step + batches)).tolist())
        skips.append(Skip(step=step, batches=batches))
    found = order(*segments, skips=skips)
    kept = [batch for batch in range(100) if batch not in left_out][:30]
    assert found.batches(np.arange(30)).tolist() == kept
    whole = order(*segments)
    assert read(found, 30) == whole.rows(np.array(kept)).tolist()
