"""Fraction of a text that is lost by encoding and decoding it.

A tokenizer may have no token for parts of a text, or change the text first: lower-case it, remove
accents, merge white space. A model never sees the lost text.
"""

from collections import Counter
from typing import Self

from pydantic import NonNegativeInt

from zeroflow.config import Config
from zeroflow.data.encoding import Encoder

WORTH_A_WARNING = 0.001
"""Fraction of lost characters, or of unknown tokens, from which on there is a warning."""

# Measured on 400 English texts: a tokenizer like BERT's, which lower-cases, joins white space and
# adds spaces around punctuation, loses 12 % of the characters; lower-casing alone, 4 %. With 30,000
# whole words, 2.6 % of the tokens are unknown, and 5 % in the classic word-level benchmarks
MOST_LOST = 0.25
"""Maximum fraction of lost characters; above it, whole words are missing."""

MOST_UNKNOWN = 0.1
"""Maximum fraction of unknown tokens."""

_EXCERPTS = 64
_EXCERPT_CHARACTERS = 2000


class ReturnedText(Config):
    """A sample of text that was encoded and decoded again."""

    characters: NonNegativeInt = 0

    lost: NonNegativeInt = 0
    """Number of characters that are missing afterwards, or were added."""

    @property
    def lost_share(self) -> float:
        return self.lost / max(1, self.characters)

    def __add__(self, other: Self) -> Self:
        return type(self)(
            characters=self.characters + other.characters, lost=self.lost + other.lost
        )


def sample(encoder: Encoder, texts: list[str]) -> ReturnedText:
    """Encode and decode the beginnings of some of `texts`, evenly spread over them."""
    every = -(-len(texts) // _EXCERPTS)  # rounded up
    excerpts = [text[:_EXCERPT_CHARACTERS] for text in texts[:: max(1, every)]]
    flat, lengths = encoder.encode(excerpts)
    ends = lengths.cumsum().tolist()
    starts = [0, *ends[:-1]]
    ids = [flat[start:end].tolist() for start, end in zip(starts, ends, strict=True)]
    return ReturnedText(
        characters=sum(map(len, excerpts)),
        lost=sum(map(lost_characters, excerpts, encoder.decode(ids))),
    )


def lost_characters(text: str, returned: str) -> int:
    """Return the number of characters of `text` that `returned` lacks, or has in addition.

    The order is not compared, as no tokenizer is known to change it.
    """
    same = (Counter(text) & Counter(returned)).total()
    return max(len(text), len(returned)) - same
