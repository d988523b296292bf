"""Choice of the text that is held out for validation.

A hash of its id decides whether a document is held out. So the choice does not depend on the rest
of the corpus, and parts can be built in any order by any number of processes. If ids repeat, the
hash of the text is used instead, because otherwise all documents with one id would be on the same
side. In a corpus of few documents, the end of the longest document may be held out: no choice of
whole documents would be near the fraction.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import NonNegativeInt, PositiveInt

from zeroflow.config import Config
from zeroflow.data.corpus import CorpusConfig
from zeroflow.data.documents import Document, TextBatch
from zeroflow.data.duplicates import hash_texts
from zeroflow.data.slices import CHARACTERS_PER_TOKEN, local_text_bytes, read_documents

FEW_DOCUMENTS = 1000
"""Number of documents from which on about `validation_fraction` of the documents is held out. A
smaller corpus is measured first, and the fraction of its characters is exact."""

_SOME_ROWS = 4
"""Minimum number of held-out rows, because the loss of fewer is too noisy. Fewer are held out if
these would be more than `_MOST_OF_A_SMALL_CORPUS` of the text."""

_MOST_OF_A_SMALL_CORPUS = 0.2
"""Maximum share of the text that is held out to reach the minimum number of rows."""

_NEAR = 1000
"""Number of characters within which a cut looks for the end of a line or word."""

BoolArray = npt.NDArray[np.bool_]


class Tail(Config):
    """The end of a document that is held out. The rest of the document is used for training."""

    text_position: float
    """Position of the document, by the hash of its text, so that all copies are cut equally."""

    characters: PositiveInt


class Holdout(Config):
    """The rule by which documents are held out."""

    by: Literal["id", "text"] = "id"
    """Whether the position of a document is a hash of its id or of its text."""

    below: float
    """Documents with a lower position are held out."""

    longest: NonNegativeInt | None = None
    """Documents with more characters are not held out; None for no limit. Otherwise a single long
    document could make the held-out fraction much too large."""

    tail: Tail | None = None

    def apply(self, batch: TextBatch) -> tuple[TextBatch, BoolArray]:
        """Return the documents, one of them cut in two if the rule has a tail, and a mask of those
        that are held out.
        """
        positions = self.positions(batch.ids.to_pylist(), batch.texts)
        held_out = positions < self.below
        if self.longest is not None:
            held_out &= np.array([len(text) <= self.longest for text in batch.texts], dtype=bool)
        if self.tail is None:
            return batch, held_out
        cut = np.flatnonzero(_text_positions(batch.texts) == self.tail.text_position).tolist()
        return _cut(batch, held_out, cut, self.tail.characters) if cut else (batch, held_out)

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
    """Return the rule that holds out `fraction` of a resolved corpus.

    This reads the first `FEW_DOCUMENTS` documents: all documents of a small corpus, and enough of a
    large one to see whether ids repeat.
    """
    if not corpus.is_text:
        return Holdout(below=fraction)
    documents = list(islice(_measured(corpus), FEW_DOCUMENTS))
    ids = {document.by_id for document in documents}
    rule = Holdout(by="id" if len(ids) == len(documents) else "text", below=fraction)
    if len(documents) < FEW_DOCUMENTS:
        return _of_few(documents, rule, row_tokens)
    # A document longer than the whole held-out text would exceed the fraction by itself
    share = fraction * local_text_bytes(corpus)
    return rule.replace(longest=None if math.isinf(share) else int(share))


def _measured(corpus: CorpusConfig) -> Iterator[_Measured]:
    seen = set[float]()
    for document in read_documents(corpus):
        [by_id] = holdout_positions([document.id.encode("utf-8", "surrogatepass")]).tolist()
        [by_text] = _text_positions([document.text]).tolist()
        if not (corpus.deduplicate and by_text in seen):
            yield _Measured(by_id, by_text, len(document.text))
        seen.add(by_text)


def _of_few(documents: list[_Measured], rule: Holdout, row_tokens: int) -> Holdout:
    """Return the rule that holds out the fraction of the characters, and at least a few rows.

    Documents are taken in order of position until the next one would exceed the wanted number of
    characters. If less than half of it was reached, the end of the longest remaining document is
    held out in addition.
    """
    fraction = rule.below
    total = sum(document.characters for document in documents)
    rows = _SOME_ROWS * row_tokens * CHARACTERS_PER_TOKEN
    wanted = int(max(fraction * total, min(rows, _MOST_OF_A_SMALL_CORPUS * total)))
    below, taken = 0.0, 0
    places = {d: d.by_id if rule.by == "id" else d.by_text for d in documents}
    for document in sorted(documents, key=places.__getitem__):
        if document.characters > wanted:
            continue
        if taken + document.characters > wanted:
            break
        below, taken = float(np.nextafter(places[document], 2)), taken + document.characters
    rule = rule.replace(below=below, longest=wanted)
    rest = [d for d in documents if places[d] >= below or d.characters > wanted]
    if taken >= wanted / 2 or not rest:
        return rule
    longest = max(rest, key=lambda d: (d.characters, d.by_text))
    if (characters := min(wanted - taken, longest.characters - 1)) < 1:
        return rule
    return rule.replace(tail=Tail(text_position=longest.by_text, characters=characters))


def _cut(
    batch: TextBatch, held_out: BoolArray, cut: list[int], characters: int
) -> tuple[TextBatch, BoolArray]:
    """Return the batch with the documents at `cut` split into a beginning and a held-out end."""
    documents: list[Document] = []
    chosen: list[bool] = []
    for place, document in enumerate(batch.documents()):
        texts = [document.text]
        if place in cut:
            texts = list(_halves(document.text, len(document.text) - characters))
        documents += [document._replace(text=text) for text in texts]
        chosen += [bool(held_out[place])] if len(texts) == 1 else [False, True]
    return TextBatch.from_documents(documents), np.array(chosen, dtype=bool)


def _halves(text: str, at: int) -> tuple[str, str]:
    """Split `text` near `at`, at the end of a line or word if there is one nearby."""
    for separator in ("\n", " "):
        near = text.find(separator, at, at + min(_NEAR, (len(text) - at) // 2)) + 1
        if near:
            return text[:near], text[near:]
    return text[:at], text[at:]
