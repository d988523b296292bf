"""Packing of documents into rows of one length.

Documents are packed window by window; the rows of a window depend on its documents only. No token
is lost, and a short row is padded with end-of-text ids. Because documents are never empty, an
end-of-text id is padding if and only if it follows another one. So the ids alone show where the
documents of a row begin, and no mask needs to be stored.
"""

from bisect import bisect_left, insort
from typing import Literal, NamedTuple

import numpy as np

from zeroflow.data.arrays import Int64Array, RowArray, TokenArray

PackingName = Literal["best-fit", "concat"]


class Pieces(NamedTuple):
    """Positions of the documents of a window: arrays with an entry for each piece of a document."""

    document: Int64Array
    """Index of the document within the window, in ascending order."""

    start: Int64Array
    """First token of the piece within its document."""

    tokens: Int64Array
    row: Int64Array
    offset: Int64Array
    """Index of its first token in that row."""

    rows: int
    """Number of rows of the whole window."""

    def select(self, first: int, end: int) -> "Pieces":
        """Return the pieces of documents `first` to `end`, with documents numbered from 0."""
        chosen = slice(*np.searchsorted(self.document, (first, end)))
        return self._replace(
            document=self.document[chosen] - first,
            start=self.start[chosen],
            tokens=self.tokens[chosen],
            row=self.row[chosen],
            offset=self.offset[chosen],
        )


def concatenate(lengths: Int64Array, row_tokens: int) -> Pieces:
    """Join documents of `lengths` tokens end to end, and cut the result into rows.

    Source: Brown et al. 2020, appendix B, https://arxiv.org/abs/2005.14165
    """
    ends = np.cumsum(lengths)
    begins = ends - lengths
    total = int(ends[-1]) if len(ends) else 0
    # a piece begins where a document or a row begins
    cuts = np.union1d(begins, np.arange(0, total, row_tokens))
    document = np.searchsorted(ends, cuts, side="right")
    return Pieces(
        document=document,
        start=cuts - begins[document],
        tokens=np.diff(cuts, append=total),
        row=cuts // row_tokens,
        offset=cuts % row_tokens,
        rows=-(-total // row_tokens),
    )


def best_fit(lengths: Int64Array, row_tokens: int) -> Pieces:
    """Put each document of `lengths` tokens, longest first, into the fullest row with room for it.

    Only documents longer than a row are cut: into full rows and a remainder that is packed like a
    document. If the remainder is only an end-of-text id, it is placed at the beginning of a row,
    because after another document it would count as padding.

    Source: Ding et al. 2024, https://arxiv.org/abs/2404.10830
    """
    full = (lengths - 1) // row_tokens  # a document of exactly one row is not cut
    counts = full + 1
    document = np.repeat(np.arange(len(lengths)), counts)
    within = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = within * row_tokens
    tokens = np.minimum(lengths[document] - start, row_tokens)
    row, offset = np.empty_like(start), np.zeros_like(start)
    whole = tokens == row_tokens
    rows = int(whole.sum())
    row[whole] = np.arange(rows)

    alone = (tokens == 1) & (within > 0)
    begun = rows + int(alone.sum())
    row[alone] = np.arange(rows, begun)
    # Rows by their free space, and the values of free space that occur, in ascending order. The
    # fullest row that fits is found by bisection, among `row_tokens` values instead of all rows
    with_room: list[list[int]] = [[] for _ in range(row_tokens + 1)]
    with_room[row_tokens - 1] = list(range(rows, begun))
    rooms = [row_tokens - 1] if begun > rows else []
    rows = begun
    rests = np.flatnonzero(~whole & ~alone)
    order = rests[np.argsort(-tokens[rests], kind="stable")]
    for piece, length in zip(order.tolist(), tokens[order].tolist(), strict=True):
        place = bisect_left(rooms, length)
        if place == len(rooms):
            chosen, room = rows, row_tokens
            rows += 1
        else:
            room = rooms[place]
            chosen = with_room[room].pop()
            if not with_room[room]:
                del rooms[place]
        row[piece], offset[piece] = chosen, row_tokens - room
        if left := room - length:
            if not with_room[left]:
                insort(rooms, left)
            with_room[left].append(chosen)
    return Pieces(document, start, tokens, row, offset, rows)


PACKINGS = {"best-fit": best_fit, "concat": concatenate}


def lay_out(
    tokens: TokenArray, begins: Int64Array, ends: Int64Array, pieces: Pieces, rows: RowArray
) -> None:
    """Copy the pieces of documents into `rows` (pieces.rows, row_tokens).

    Args:
        tokens: document i is `tokens[begins[i] : ends[i]]`, without its end of text.
        rows: filled with end-of-text ids, so that the ends of documents and padding are in place.
    """
    # Memoryviews instead of numpy slices: numpy releases the GIL for every copy, and with several
    # builder threads this thread would have to wait for it after every piece
    target, source = rows.reshape(-1).data, tokens.astype(rows.dtype, copy=False).data
    first = begins[pieces.document] + pieces.start
    last = np.minimum(first + pieces.tokens, ends[pieces.document])
    place = pieces.row * rows.shape[1] + pieces.offset
    columns = (first.tolist(), last.tolist(), place.tolist(), (place + last - first).tolist())
    for begin, end, to_begin, to_end in zip(*columns, strict=True):
        target[to_begin:to_end] = source[begin:end]
