"""TODO docstring."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from zeroflow.data import readers
from zeroflow.data.packing import Ids, Tokens


class DocumentColumns(NamedTuple):
    """What is known of documents, in columns; the first two may be of others as well."""

    ids: pa.BinaryArray
    urls: pa.StringArray
    named: Ids
    """Place of each document in those two."""

    text_bytes: Ids
    hashes: npt.NDArray[np.uint64]
    lengths: Ids
    """Tokens of each, with its end of text."""

    def only(self, chosen: npt.NDArray[np.bool_]) -> "DocumentColumns":
        return self._replace(
            named=self.named[chosen],
            text_bytes=self.text_bytes[chosen],
            hashes=self.hashes[chosen],
            lengths=self.lengths[chosen],
        )


def concatenated(several: Sequence[DocumentColumns]) -> DocumentColumns:
    ids, urls, named, *columns = zip(*several, strict=True)
    sizes = [len(column) for column in ids]
    moves = np.cumsum(sizes) - sizes
    moved = [places + move for places, move in zip(named, moves, strict=True)]
    return DocumentColumns(
        pa.concat_arrays(ids), pa.concat_arrays(urls), *map(np.concatenate, [moved, *columns])
    )


class DocumentBatch(NamedTuple):
    """Tokenised documents."""

    documents: DocumentColumns
    tokens: Tokens
    """Documents end to end, without their ends of text; some may be of others."""

    begins: Ids
    """Place of the first token of each document."""

    @property
    def ends(self) -> Ids:
        return self.begins + self.documents.lengths - 1

    def only(self, chosen: npt.NDArray[np.bool_]) -> "DocumentBatch":
        if chosen.all():
            return self
        return DocumentBatch(self.documents.only(chosen), self.tokens, self.begins[chosen])

    def alone(self) -> "DocumentBatch":
        """The same documents, in columns that hold no others."""
        named = readers.numbers(self.documents.named, pa.int64())
        documents = self.documents._replace(
            ids=self.documents.ids.take(named),
            urls=self.documents.urls.take(named),
            named=np.arange(len(named)),
        )
        bounds = zip(self.begins.tolist(), self.ends.tolist(), strict=True)
        return end_to_end(documents, [self.tokens[begin:end] for begin, end in bounds])


def end_to_end(documents: DocumentColumns, tokens: Sequence[Tokens]) -> DocumentBatch:
    lengths = documents.lengths - 1
    stream = np.concatenate([*tokens, np.empty(0, np.int32)])
    return DocumentBatch(documents, stream, np.cumsum(lengths) - lengths)


def sound_ids(ids: pa.BinaryArray) -> pa.StringArray:
    try:
        return ids.cast(pa.string())
    except pa.ArrowInvalid:
        return readers.strings(i.decode("utf-8", "surrogatepass") for i in ids.to_pylist())
