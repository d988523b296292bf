"""Fraction of a text that is lost by encoding and decoding it.

A tokenizer may have no token for parts of a text, or change the text first: lower-case it, remove
accents, merge white space. A model never sees the lost text.
"""

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from itertools import accumulate

from pydantic import NonNegativeInt

from zeroflow.config import Config
from zeroflow.data.encoding import Encoder

WORTH_A_WARNING = 0.001
"""Minimum fraction of lost characters, or of unknown tokens, for a warning."""

# The limits allow deliberate changes of the text. Measured on 400 English texts: a tokenizer like
# BERT's, which lower-cases, merges white space and adds spaces around punctuation, loses 12 % of
# the characters; lower-casing alone loses 4 %. With 30,000 whole words, 2.6 % of the tokens are
# unknown, and 5 % in the classic word-level benchmarks
MOST_LOST = 0.25
"""Fraction of lost characters at which the pre-flight fails: whole words are missing."""

MOST_UNKNOWN = 0.1
"""Fraction of unknown tokens at which the pre-flight fails."""

# Maximum size of the sample of a part
_EXCERPTS = 64
_EXCERPT_CHARACTERS = 2003
"""A prime number, so that excerpts begin at different positions in documents of equal length."""

_CUT_WORD = re.compile(r"\S{0,99}(?:\s+|\Z)")
"""The rest of a word that an excerpt cuts, with the white space after it."""


class ReturnedText(Config):
    """A sample of text that was encoded and decoded again."""

    characters: NonNegativeInt = 0

    lost: NonNegativeInt = 0
    """Number of characters that are missing afterwards, or were added."""

    total: NonNegativeInt = 0
    """Number of characters of the sampled text; 0 in files of older versions."""

    @property
    def lost_share(self) -> float:
        return self.lost / max(1, self.characters)


def mean_lost_share(samples: Iterable[ReturnedText]) -> float:
    """Return the mean fraction of lost characters, weighted by the size of the texts."""
    weighted = [(sample.lost_share, sample.total or sample.characters) for sample in samples]
    return sum(share * weight for share, weight in weighted) / max(1, sum(w for _, w in weighted))


class Excerpts:
    """Excerpts of texts, in which every position of the texts is equally probable.

    Excerpts begin at equal distances in the concatenated texts. The distance is doubled whenever
    there are too many excerpts, so the length of the texts need not be known in advance.
    """

    def __init__(self) -> None:
        self._distance = _EXCERPT_CHARACTERS  # at first, the excerpts cover the whole text
        self._passed = 0
        self._pieces: dict[int, list[str]] = {}
        """Pieces of documents by excerpt. Excerpt n begins at n times the distance."""

    def add(self, texts: list[str]) -> None:
        ends = list(accumulate(map(len, texts), initial=self._passed))
        while ends[-1] > _EXCERPTS * self._distance:
            self._distance *= 2
            even = {n: pieces for n, pieces in self._pieces.items() if n % 2 == 0}
            self._pieces = {n // 2: pieces for n, pieces in even.items()}
        for number in range(self._passed // self._distance, -(-ends[-1] // self._distance)):
            begin = number * self._distance
            end = begin + _EXCERPT_CHARACTERS
            document = max(0, bisect_right(ends, begin) - 1)
            while document < len(texts) and ends[document] < end:
                first = ends[document]
                piece = _whole_words(texts[document], begin - first, end - first)
                self._pieces.setdefault(number, []).append(piece)
                document += 1
        self._passed = ends[-1]

    def measure(self, encoder: Encoder) -> ReturnedText | None:
        """Encode and decode the excerpts; None if there is no text."""
        pieces = [piece for pieces in self._pieces.values() for piece in pieces if piece]
        if not pieces:
            return None
        flat, lengths = encoder.encode(pieces)
        ends = lengths.cumsum().tolist()
        starts = [0, *ends[:-1]]
        ids = [flat[start:end].tolist() for start, end in zip(starts, ends, strict=True)]
        returned = map(_without_added_space, pieces, encoder.decode(ids))
        return ReturnedText(
            characters=sum(map(len, pieces)),
            lost=sum(map(lost_characters, pieces, returned)),
            total=self._passed,
        )


def _without_added_space(text: str, returned: str) -> str:
    """Remove the space that some tokenizers add before every text, including an excerpt."""
    return returned if text.startswith(" ") else returned.removeprefix(" ")


def _whole_words(text: str, begin: int, end: int) -> str:
    """Return the text between two positions, without the words that they cut.

    A piece of a word may be unknown to a tokenizer that knows the word.
    """
    piece = text[max(0, begin) : max(0, end)]
    if begin > 0 and (cut := _CUT_WORD.match(piece)):
        piece = piece[cut.end() :]
    if end < len(text) and (cut := _CUT_WORD.match(piece[::-1])):
        piece = piece[: len(piece) - cut.end()]
    return piece


def lost_characters(text: str, returned: str) -> int:
    """Return the number of characters of `text` that are missing in `returned`, or were added.

    The order is not compared, because no tokenizer is known to change it.
    """
    same = (Counter(text) & Counter(returned)).total()
    return max(len(text), len(returned)) - same
