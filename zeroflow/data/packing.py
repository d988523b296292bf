"""Token lists to rows of one length. Pure numpy."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]


class Tokenized(NamedTuple):
    """A document as token ids, its end-of-text id included."""

    id: str
    tokens: Tokens
    text_bytes: int
    """UTF-8 bytes of the text; 0 for documents that never were text."""

    url: str = ""


class Place(NamedTuple):
    """Where the first token of a document lies."""

    row: int
    offset: int


class Concatenation:
    """Documents end to end, cut into rows of one length.

    A document that reaches the end of a row goes on in the next, so no token is lost but those
    after the last full row.

    Source: Brown et al. 2020, appendix B, https://arxiv.org/abs/2005.14165
    """

    def __init__(self, row_tokens: int) -> None:
        if row_tokens < 2:
            raise ValueError(f"rows of {row_tokens} tokens leave no token to predict")
        self.row_tokens = row_tokens
        self.tokens = 0
        """Tokens added so far."""
        self._taken_rows = 0
        self._pending: list[Tokens] = []

    @property
    def rows(self) -> int:
        """Full rows so far, taken ones included."""
        return self.tokens // self.row_tokens

    @property
    def waiting(self) -> int:
        """Full rows not yet taken."""
        return self.rows - self._taken_rows

    def add(self, tokens: Tokens) -> Place:
        place = Place(*divmod(self.tokens, self.row_tokens))
        self._pending.append(tokens)
        self.tokens += len(tokens)
        return place

    def take(self, rows: int) -> Tokens:
        """The next `rows` full rows, shape (rows, row_tokens)."""
        assert rows <= self.waiting
        joined = np.concatenate(self._pending) if self._pending else np.empty(0, np.int32)
        cut = rows * self.row_tokens
        self._pending = [joined[cut:]]
        self._taken_rows += rows
        return joined[:cut].reshape(rows, self.row_tokens)
