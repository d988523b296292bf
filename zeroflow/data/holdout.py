"""Choice of the text that is held out for validation.

A hash of its id decides whether a document is held out. So the choice does not depend on the rest
of the corpus, and parts can be built in any order by any number of processes. If ids repeat, the
hash of the text is used instead, because otherwise all documents with one id would be on the same
side. If no choice of whole documents comes close to the fraction, ends of documents are held out:
the end of the longest document in a small corpus, and of all long documents in a large one.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import NonNegativeInt, PositiveInt

from zeroflow.config import Config
from zeroflow.data.arrays import BoolArray
from zeroflow.data.corpus import CorpusConfig
from zeroflow.data.documents import Document, Tally, TextBatch
from zeroflow.data.duplicates import hash_texts
from zeroflow.data.slices import (
    CHARACTERS_PER_TOKEN,
    all_slices,
    local_text_bytes,
    read_slice,
)

FEW_DOCUMENTS = 1000
"""Number of documents below which a corpus is small, so that the held-out fraction of its
characters is exact. In a larger corpus, about this fraction of the documents is held out."""

SOME_ROWS = 4
"""Minimum number of held-out rows, because the loss of fewer is too noisy. Fewer are held out if
these would be more than `MOST_OF_A_SMALL_CORPUS` of the text."""

MOST_OF_A_SMALL_CORPUS = 0.2
"""Maximum share of the text that is held out to reach the minimum number of rows."""

_MEASURED_BYTES = 2**28
"""Maximum size of a large corpus whose documents are all measured, which takes some seconds."""

_DRAWN = 20
"""A document may be held out as a whole if the held-out text has room for this many of its length.
The deviation of the held-out text, which depends on chance, is then at most 1 / sqrt(20) = 22 %. Of
longer documents, the ends are held out. If 1,000 documents have the same length, all are short
enough."""

_NEAR = 1000
"""Number of characters within which a cut looks for the end of a line or word."""


class HeldOutTail(Config):
    """The end of a document that is held out. The rest of the document is used for training."""

    text_position: float
    """Position of the document, by the hash of its text, so that all copies are cut equally."""

    characters: PositiveInt


class Divided(NamedTuple):
    """Documents of a batch, some of which are held out."""

    batch: TextBatch
    """A document whose end is held out is two documents here: its beginning and its end."""

    held_out: BoolArray
    ends: BoolArray
    """True for each held-out end of a document whose beginning is not held out."""


class Holdout(Config):
    """The rule by which documents are held out."""

    by: Literal["id", "text"] = "id"
    """Field of a document whose hash is its position."""

    below: float
    """Documents with a lower position are held out."""

    longest: NonNegativeInt | None = None
    """Documents with more characters are not held out as a whole; None for no limit. Otherwise a
    single long document could make the held-out fraction much too large."""

    end: float = 0
    """Fraction of each longer document that is held out, at its end."""

    tail: HeldOutTail | None = None

    def apply(self, batch: TextBatch) -> Divided:
        """Divide a batch into the documents to train on and those that are held out."""
        positions = self.positions(batch.ids.to_pylist(), batch.texts)
        held_out = positions < self.below
        ends: dict[int, int] = {}
        if self.longest is not None:
            lengths = np.array([len(text) for text in batch.texts], dtype=np.int64)
            held_out &= lengths <= self.longest
            if self.end:
                long = np.flatnonzero(lengths > self.longest).tolist()
                ends = {place: max(1, int(self.end * lengths[place])) for place in long}
        if self.tail is not None:
            cut = np.flatnonzero(_text_positions(batch.texts) == self.tail.text_position).tolist()
            ends = dict.fromkeys(cut, self.tail.characters)
        return _cut(batch, held_out, ends)

    def positions(self, ids: Sequence[bytes], texts: Sequence[str]) -> npt.NDArray[np.float64]:
        return holdout_positions(ids) if self.by == "id" else _text_positions(texts)


NOTHING = Holdout(below=0)
EVERYTHING = Holdout(below=2)


def holdout_positions(ids: Iterable[bytes]) -> npt.NDArray[np.float64]:
    """Return the position of each document in [0, 1], a hash of its id; the lowest are held out."""
    digests = b"".join(hashlib.sha256(i).digest()[:8] for i in ids)
    return np.frombuffer(digests, ">u8") / 2.0**64


def _text_positions(texts: Sequence[str]) -> npt.NDArray[np.float64]:
    return hash_texts(texts) / 2.0**64


class _Measured(NamedTuple):
    """A document without its text, which may be a book."""

    by_id: float
    by_text: float
    characters: int


def choose_holdout(corpus: CorpusConfig, *, fraction: float, row_tokens: int) -> Holdout:
    """Return the rule that holds out `fraction` of a resolved corpus, and at least a few rows.

    This reads the first `FEW_DOCUMENTS` documents: all documents of a small corpus, and enough of a
    large one to see whether ids repeat. A local corpus of up to `_MEASURED_BYTES` is read fully.
    """
    if not corpus.is_text:
        return Holdout(below=fraction)
    documents = _measured(corpus)
    first = list(islice(documents, FEW_DOCUMENTS))
    ids = {document.by_id for document in first}
    rule = Holdout(by="id" if len(ids) == len(first) else "text", below=fraction)
    if len(first) < FEW_DOCUMENTS:
        return _of_few(first, rule, row_tokens)
    size = local_text_bytes(corpus)
    if math.isinf(size):
        return rule
    if size > _MEASURED_BYTES:
        return _with_ends(rule, int(size), row_tokens)
    # A document longer than the whole held-out text would exceed the fraction by itself
    rule = rule.replace(longest=int(fraction * size))
    return _of_many(chain(first, documents), rule, row_tokens)


def _measured(corpus: CorpusConfig) -> Iterator[_Measured]:
    seen = set[float]()
    for piece in all_slices(corpus):
        for batch in read_slice(corpus, piece, Tally()):
            by_id = holdout_positions(batch.ids.to_pylist()).tolist()
            by_text = _text_positions(batch.texts).tolist()
            for document in map(_Measured, by_id, by_text, map(len, batch.texts)):
                if not corpus.deduplicate:
                    yield document
                elif document.by_text not in seen:
                    seen.add(document.by_text)
                    yield document


def _wanted(total: int, fraction: float, row_tokens: int) -> int:
    """Return the number of characters to hold out of `total`."""
    rows = SOME_ROWS * row_tokens * CHARACTERS_PER_TOKEN
    return int(max(fraction * total, min(rows, MOST_OF_A_SMALL_CORPUS * total)))


def _place(document: _Measured, rule: Holdout) -> float:
    return document.by_id if rule.by == "id" else document.by_text


def _of_many(documents: Iterable[_Measured], rule: Holdout, row_tokens: int) -> Holdout:
    """Return `rule`, or one with ends if `rule` holds out far more or less than wanted."""
    total = held_out = 0
    assert rule.longest is not None
    for document in documents:
        total += document.characters
        if _place(document, rule) < rule.below and document.characters <= rule.longest:
            held_out += document.characters
    wanted = _wanted(total, rule.below, row_tokens)
    if wanted / 2 <= held_out <= 2 * wanted:
        return rule
    return _with_ends(rule, total, row_tokens)


def _with_ends(rule: Holdout, total: int, row_tokens: int) -> Holdout:
    """Return `rule` for a corpus of `total` characters, with the ends of long documents."""
    wanted = _wanted(total, rule.below, row_tokens)
    share = max(rule.below, wanted / total)
    return rule.replace(below=share, longest=max(1, wanted // _DRAWN), end=share)


def _of_few(documents: list[_Measured], rule: Holdout, row_tokens: int) -> Holdout:
    """Return the rule that holds out the fraction of the characters, and at least a few rows.

    Documents longer than the wanted text are not held out. Of the others, the wanted share is held
    out in order of position, until the next document would exceed it. So if there is one long
    document, most of the short ones are trained on. If the held-out documents are less than half of
    the wanted text, the end of the longest remaining document is also held out.
    """
    total = sum(document.characters for document in documents)
    wanted = _wanted(total, rule.below, row_tokens)
    places = {document: _place(document, rule) for document in documents}
    short = [document for document in documents if document.characters <= wanted]
    most = wanted * sum(document.characters for document in short) // max(total, 1)
    below, taken = 0.0, 0
    for document in sorted(short, key=places.__getitem__):
        if taken + document.characters > most:
            break
        below, taken = float(np.nextafter(places[document], 2)), taken + document.characters
    rule = rule.replace(below=below, longest=wanted)
    rest = [d for d in documents if places[d] >= below or d.characters > wanted]
    if taken >= wanted / 2 or not rest:
        return rule
    longest = max(rest, key=lambda d: (d.characters, d.by_text))
    if (characters := min(wanted - taken, longest.characters - 1)) < 1:
        return rule
    return rule.replace(tail=HeldOutTail(text_position=longest.by_text, characters=characters))


def _cut(batch: TextBatch, held_out: BoolArray, ends: dict[int, int]) -> Divided:
    """Return the batch with some documents split into a beginning and a held-out end.

    Args:
        ends: number of characters of the end, by the place of the document in the batch.
    """
    if not ends:
        return Divided(batch, held_out, np.zeros(len(held_out), dtype=bool))
    documents: list[Document] = []
    chosen, is_end = list[bool](), list[bool]()
    for place, document in enumerate(batch.documents()):
        texts = [document.text]
        if place in ends:
            texts = list(_halves(document.text, len(document.text) - ends[place]))
        documents += [document._replace(text=text) for text in texts]
        chosen += [bool(held_out[place])] if len(texts) == 1 else [False, True]
        is_end += [False] if len(texts) == 1 else [False, True]
    batch = TextBatch.from_documents(documents)
    return Divided(batch, np.array(chosen, dtype=bool), np.array(is_end, dtype=bool))


def _halves(text: str, at: int) -> tuple[str, str]:
    """Split `text` near `at`, at the end of a line or word if there is one nearby."""
    for separator in ("\n", " "):
        near = text.find(separator, at, at + min(_NEAR, (len(text) - at) // 2)) + 1
        if near:
            return text[:near], text[near:]
    return text[:at], text[at:]
