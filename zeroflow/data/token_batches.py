"""Tokenised documents, in batches of columns."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from zeroflow.data import arrays
from zeroflow.data.arrays import Int64Array, TokenArray


class DocumentColumns(NamedTuple):
    """Ids, URLs and lengths of documents, in columns.

    `ids` and `urls` may also contain entries of other documents; `places` maps each document to its
    entry. So documents are selected from a batch without copying strings.
    """

    ids: pa.BinaryArray
    urls: pa.StringArray
    places: Int64Array
    """Index of each document in `ids` and `urls`."""

    text_bytes: Int64Array
    held_out: npt.NDArray[np.bool_]
    """True for a document that is held out for validation."""

    ends: npt.NDArray[np.bool_]
    """True for the held-out end of a document whose beginning is not held out."""

    hashes: npt.NDArray[np.uint64]
    """Hash of each text if duplicates are left out; otherwise 0."""

    lengths: Int64Array
    """Number of tokens of each document, its end of text included."""

    def choose(self, chosen: npt.NDArray[np.bool_]) -> "DocumentColumns":
        return self._replace(
            places=self.places[chosen],
            text_bytes=self.text_bytes[chosen],
            held_out=self.held_out[chosen],
            ends=self.ends[chosen],
            hashes=self.hashes[chosen],
            lengths=self.lengths[chosen],
        )


def concatenate(several: Sequence[DocumentColumns]) -> DocumentColumns:
    """The documents of several tables, in order."""
    ids, urls, places, *columns = zip(*several, strict=True)
    sizes = [len(column) for column in ids]
    shifts = np.cumsum(sizes) - sizes
    shifted = [own + shift for own, shift in zip(places, shifts, strict=True)]
    return DocumentColumns(
        pa.concat_arrays(ids), pa.concat_arrays(urls), *map(np.concatenate, [shifted, *columns])
    )


class TokenBatch(NamedTuple):
    """Tokenised documents."""

    documents: DocumentColumns
    tokens: TokenArray
    """Token ids of the documents, without their ends of text; may contain other documents too."""

    begins: Int64Array
    """Index in `tokens` at which each document begins."""

    @property
    def ends(self) -> Int64Array:
        return self.begins + self.documents.lengths - 1

    def choose(self, chosen: npt.NDArray[np.bool_]) -> "TokenBatch":
        """Some of the documents, without a copy of their ids, URLs and tokens."""
        if chosen.all():
            return self
        return TokenBatch(self.documents.choose(chosen), self.tokens, self.begins[chosen])

    def copy(self) -> "TokenBatch":
        """The same documents in arrays that contain no others."""
        places = arrays.numbers(self.documents.places, pa.int64())
        documents = self.documents._replace(
            ids=self.documents.ids.take(places),
            urls=self.documents.urls.take(places),
            places=np.arange(len(places)),
        )
        bounds = zip(self.begins.tolist(), self.ends.tolist(), strict=True)
        return end_to_end(documents, [self.tokens[begin:end] for begin, end in bounds])


def end_to_end(documents: DocumentColumns, tokens: Sequence[TokenArray]) -> TokenBatch:
    """A batch made of the tokens of each document, which have no ends of text."""
    lengths = documents.lengths - 1
    stream = np.concatenate([*tokens, np.empty(0, np.int32)])
    return TokenBatch(documents, stream, np.cumsum(lengths) - lengths)
