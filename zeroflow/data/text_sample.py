"""Bytes of text per token of a corpus, measured on a sample before anything is built."""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import tokenizers

from zeroflow.data.corpus import CorpusConfig, document_file, list_files
from zeroflow.data.formats.file import UNREADABLE, CorpusFile, is_compressed
from zeroflow.data.slices import text_bytes
from zeroflow.units import count

_PLACES = 16
"""Number of places in the files at which text is read."""

_PLACE_BYTES = 2**16
"""Approximate bytes to read at a place."""

_PLACE_FILES = 64
"""Maximum number of files to open at a place; small files are read together."""

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
    duplicates = ", duplicates included" if corpus.deduplicate else ""
    return Density(found, f"from a sample of the text at {count(len(pieces), 'place')}{duplicates}")


def _count(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> int:
    encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return sum(len(one.ids) for one in encoded)


def _sample(corpus: CorpusConfig) -> list[_Weighted]:
    """Read text at places that are evenly spaced over all files; none is counted twice."""
    files = list_files(corpus)
    pieces = dict[tuple[int, int], _Weighted]()
    for number, offset in _places(files):
        file = files[number]
        opened = document_file(corpus, file)
        piece = corpus.source.format_of(file.name).sample(opened, offset, _PLACE_BYTES)
        share = piece.stored / file.size
        weighted = _Weighted(piece.texts, share * text_bytes(corpus, file), piece.documents)
        pieces[number, piece.start] = weighted  # places in one long line or row group are the same
    return list(pieces.values())


def _places(files: Sequence[CorpusFile]) -> list[tuple[int, int]]:
    """Return numbers of files, each with the byte at which to read.

    Files that are smaller than a place are read together with those that follow: a few sentences
    are not representative of thousands of files.
    """
    ends = list(accumulate(file.size for file in files))
    places = dict[tuple[int, int], None]()  # in order, and each once
    for position in (np.arange(_PLACES) + 0.5) / _PLACES * ends[-1]:
        first = int(np.searchsorted(ends, position, side="right"))
        size = 0
        for number, file in enumerate(files[first : first + _PLACE_FILES], first):
            if size >= _PLACE_BYTES:
                break
            is_whole = file.size <= _PLACE_BYTES or is_compressed(file.name)
            if number > first and not is_whole:
                break
            offset = 0 if is_whole else int(position - ends[number] + file.size)
            if file.size:
                places[number, offset] = None
            size += file.size
    return list(places)
