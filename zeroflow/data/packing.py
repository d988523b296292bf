"""Documents to rows of one length. Pure numpy.

A window of documents is packed at once, and what fills a row depends on that window alone. No
token is lost: a row that stays short is filled up with end-of-text ids. Documents are never empty,
so that an end of text that follows an end of text is padding and nothing else is, and the places
after an end of text are where documents begin: rows need no further marks.
"""

from bisect import bisect_left, insort
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]
Rows = npt.NDArray[np.integer[Any]]
Ids = npt.NDArray[np.int64]

PackingName = Literal["best-fit", "concat"]


class Pieces(NamedTuple):
    """Where the documents of a window lie; arrays of one entry for each piece of a document."""

    document: Ids
    """Number within the window, in ascending order."""

    start: Ids
    """First token of the piece within its document."""

    tokens: Ids
    row: Ids
    offset: Ids
    """Place of its first token in that row."""

    rows: int
    """Rows of the whole window."""

    def of(self, first: int, end: int) -> "Pieces":
        """Those of some documents, which are counted from the first of them on."""
        some = slice(*np.searchsorted(self.document, (first, end)))
        return self._replace(
            document=self.document[some] - first,
            start=self.start[some],
            tokens=self.tokens[some],
            row=self.row[some],
            offset=self.offset[some],
        )


def concatenate(lengths: Ids, row_tokens: int) -> Pieces:
    """Documents of `lengths` tokens end to end, cut into rows.

    Source: Brown et al. 2020, appendix B, https://arxiv.org/abs/2005.14165
    """
    ends = np.cumsum(lengths)
    begins = ends - lengths
    total = int(ends[-1]) if len(ends) else 0
    # a piece begins where a document does or a row does
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


def best_fit(lengths: Ids, row_tokens: int) -> Pieces:
    """Documents of `lengths` tokens, longest first, each into the fullest row that still has room.

    Only documents longer than a row are cut: into full rows and a rest that is packed like a
    document. A rest that is an end of text alone begins a row, as elsewhere it would be padding.

    Source: Ding et al. 2024, https://arxiv.org/abs/2404.10830
    """
    full = (lengths - 1) // row_tokens  # a document of just one row is no rest of another
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
    with_room: list[list[int]] = [[] for _ in range(row_tokens + 1)]  # rows by their room
    with_room[row_tokens - 1] = list(range(rows, begun))
    rooms = [row_tokens - 1] if begun > rows else []  # those that some row has, ascending
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


def lay_out(stream: Tokens, begins: Ids, ends: Ids, pieces: Pieces, rows: Rows) -> None:
    """Copy the pieces of documents into `rows` (pieces.rows, row_tokens).

    Document i is `stream[begins[i] : ends[i]]`, without the end of text that belongs to it: `rows`
    are full of it beforehand.
    """
    # numpy would let other threads have Python's lock at every copy, and then wait for it
    target, source = rows.reshape(-1).data, stream.astype(rows.dtype, copy=False).data
    first = begins[pieces.document] + pieces.start
    last = np.minimum(first + pieces.tokens, ends[pieces.document])
    place = pieces.row * rows.shape[1] + pieces.offset
    columns = (first.tolist(), last.tolist(), place.tolist(), (place + last - first).tolist())
    for begin, end, to_begin, to_end in zip(*columns, strict=True):
        target[to_begin:to_end] = source[begin:end]
