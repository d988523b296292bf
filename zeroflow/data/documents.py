"""Documents of text: single documents, and batches in columns."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import NamedTuple, Self

import numpy as np
import pyarrow as pa

from zeroflow.data import arrays
from zeroflow.data.arrays import Int64Array
from zeroflow.data.returned_text import ReturnedText

BATCH_DOCUMENTS = 1000
"""Maximum number of documents in a batch."""

BATCH_BYTES = 2**20
"""Number of characters that complete a batch. Both limits are large enough to make the overhead per
batch negligible, and small enough that the eight batches between reader, tokenizer and packing take
little memory."""

_PLACES = 10
"""Maximum number of bad lines whose place is recorded."""


class Document(NamedTuple):
    id: str
    text: str
    url: str = ""


class TextBatch(NamedTuple):
    """Non-empty documents, in columns."""

    ids: pa.BinaryArray
    """UTF-8, but may contain lone surrogates, which an id from JSON can have."""

    urls: pa.StringArray
    texts: list[str]
    """Texts without lone surrogates."""

    text_bytes: Int64Array
    """UTF-8 bytes of each text."""

    @classmethod
    def from_documents(cls, documents: list[Document]) -> Self:
        texts = [arrays.well_formed(document.text) for document in documents]
        return cls(
            arrays.binary([document.id.encode("utf-8", "surrogatepass") for document in documents]),
            arrays.strings(document.url for document in documents),
            [text for text, _ in texts],
            np.array([size for _, size in texts], dtype=np.int64),
        )

    @classmethod
    def concatenate(cls, batches: "list[TextBatch]") -> "TextBatch":
        if len(batches) == 1:
            return batches[0]
        ids, urls, texts, text_bytes = zip(*batches, strict=True)
        return cls(
            pa.concat_arrays(ids),
            pa.concat_arrays(urls),
            list(chain.from_iterable(texts)),
            np.concatenate(text_bytes),
        )

    def cut_out(self, begin: int, end: int) -> "TextBatch":
        return TextBatch(
            self.ids[begin:end],
            self.urls[begin:end],
            self.texts[begin:end],
            self.text_bytes[begin:end],
        )

    def documents(self) -> Iterator[Document]:
        ids = (value.decode("utf-8", "surrogatepass") for value in self.ids.to_pylist())
        yield from map(Document, ids, self.texts, self.urls.to_pylist())


@dataclass
class Tally:
    """Counts of documents and lines that were left out while reading, and a sample of lost text."""

    empty: int = 0
    returned: ReturnedText | None = None
    """A sample of the text that was encoded and decoded again."""

    bad_lines: int = 0
    bad_places: list[str] = field(default_factory=list)
    """Places of the first bad lines, each with the fault."""

    def add_bad_line(self, place: str) -> None:
        self.bad_lines += 1
        if len(self.bad_places) < _PLACES:
            self.bad_places.append(place)


def regroup(batches: Iterable[TextBatch]) -> Iterator[TextBatch]:
    """Yield the same documents in batches of about equal size, across the borders of files.

    Otherwise a corpus of many small files would give batches of one document.
    """
    waiting: list[TextBatch] = []
    documents = characters = 0  # in `waiting`
    for batch in batches:
        passed = list(accumulate(map(len, batch.texts), initial=0))
        begin = 0
        while begin < len(batch.texts):
            # a batch includes the text that completes it
            filled = bisect_left(passed, passed[begin] + BATCH_BYTES - characters, begin + 1)
            end = min(filled, begin + BATCH_DOCUMENTS - documents, len(batch.texts))
            waiting.append(batch.cut_out(begin, end))
            documents += end - begin
            characters += passed[end] - passed[begin]
            if documents >= BATCH_DOCUMENTS or characters >= BATCH_BYTES:
                yield TextBatch.concatenate(waiting)
                waiting, documents, characters = [], 0, 0
            begin = end
    if waiting:
        yield TextBatch.concatenate(waiting)
