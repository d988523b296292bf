"""Bytes of text per token of a corpus, measured on a sample before anything is built."""

import math
from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import tokenizers

from zeroflow.data.corpus import CorpusConfig, document_file, list_files
from zeroflow.data.formats.file import UNREADABLE, is_compressed
from zeroflow.data.slices import text_bytes
from zeroflow.units import count

_PLACES = 16
"""Number of places in the files at which text is read."""

_PLACE_BYTES = 2**16
"""Approximate bytes to read at a place."""

_ENCODED_CHARACTERS = 2**21
"""Maximum number of characters to encode, which takes about a second."""

Train = Callable[[list[str]], tokenizers.Tokenizer]


class Density(NamedTuple):
    """Bytes of text per token, as `slices.text_bytes` counts them, and where the figure is from."""

    bytes_per_token: float
    source: str


class _Weighted(NamedTuple):
    texts: list[str]
    text_bytes: float
    """Bytes of text that a piece of this size is assumed to have, as for whole files."""

    documents: int
    """Number of documents in the piece."""


def measure(
    corpus: CorpusConfig, tokenizer: tokenizers.Tokenizer | None, train: Train
) -> Density | None:
    """Measure the density of a resolved corpus of local files; None if that is not possible.

    Args:
        tokenizer: tokenizer of the run; None if it has not been trained yet.
        train: trains the tokenizer of the run on some texts. It gets half of each text, and the
            other half is measured.
    """
    if not corpus.is_text or not corpus.source.is_local:
        return None
    try:
        pieces = _sample(corpus)
    except (*UNREADABLE, ValueError):  # the run reports what is wrong with a file
        return None
    texts = [text for piece in pieces for text in piece.texts]
    if not (characters := sum(map(len, texts))):
        return None
    share = min(1.0, _ENCODED_CHARACTERS / characters)
    texts = [text[: math.ceil(share * len(text))] for text in texts]
    if tokenizer is None:
        tokenizer = train([text[: len(text) // 2] for text in texts])
        texts, share = [text[len(text) // 2 :] for text in texts], share / 2
    tokens = _count(tokenizer, texts) / share
    tokens += sum(piece.documents for piece in pieces)  # each is followed by an end of text
    found = sum(piece.text_bytes for piece in pieces) / tokens
    return Density(found, f"from a sample of the text at {count(len(pieces), 'place')}")


def _count(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> int:
    encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return sum(len(one.ids) for one in encoded)


def _sample(corpus: CorpusConfig) -> list[_Weighted]:
    """Read text at places that are evenly spaced over all files; none is read twice."""
    files = list_files(corpus)
    ends = list(accumulate(file.size for file in files))
    total = ends[-1]
    pieces, seen = [], set()
    for position in (np.arange(_PLACES) + 0.5) / _PLACES * total:
        number = int(np.searchsorted(ends, position, side="right"))
        file = files[number]
        is_whole = file.size <= _PLACE_BYTES or is_compressed(file.name)
        offset = 0 if is_whole else int(position - ends[number] + file.size)
        if (number, offset) in seen:
            continue
        opened = document_file(corpus, file)
        piece = corpus.source.format_of(file.name).sample(opened, offset, _PLACE_BYTES)
        seen.add((number, offset))
        share = piece.stored / file.size
        pieces.append(_Weighted(piece.texts, share * text_bytes(corpus, file), piece.documents))
    return pieces
