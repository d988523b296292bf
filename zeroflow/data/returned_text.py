"""How much of a text comes back from its ids.

A tokenizer may have no token for parts of a text, or change it first: lower-case it, remove
accents, join white space. A model never sees what is lost in this way.
"""

from collections import Counter
from typing import Self

from pydantic import NonNegativeInt

from zeroflow.config import Config
from zeroflow.data.encoding import Encoder

WORTH_A_WARNING = 0.001
"""Share of lost characters, or of unknown tokens, from which on a warning is given."""

# Measured on 400 English texts: a tokenizer like BERT's, which lower-cases, joins white space and
# adds spaces around punctuation, loses 12 % of the characters; lower-casing alone, 4 %. 30,000
# whole words leave 2.6 % of the tokens unknown, and 5 % in the classic benchmarks of words.
MOST_LOST = 0.25
"""Share of lost characters that no run should train on: whole words are missing."""

MOST_UNKNOWN = 0.1
"""Share of unknown tokens that no run should train on."""

_EXCERPTS = 64
_EXCERPT_CHARACTERS = 2000


class ReturnedText(Config):
    """A sample of text that was encoded and decoded again."""

    characters: NonNegativeInt = 0

    lost: NonNegativeInt = 0
    """Characters that are missing afterwards, or were added."""

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
    """How many characters of `text` are missing in `returned`, or how many more it has.

    The order is not compared, as no tokenizer is known to change it.
    """
    same = (Counter(text) & Counter(returned)).total()
    return max(len(text), len(returned)) - same
