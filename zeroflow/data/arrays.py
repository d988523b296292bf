"""Array types of the data path, and functions that create and read Arrow arrays without pandas.

`pa.array`, `pa.scalar` and `to_numpy` would return the same values, but they import pandas, which
takes a third of a second.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

TokenArray = npt.NDArray[np.int32]
"""Token ids of documents, end to end."""

RowArray = npt.NDArray[np.integer[Any]]
"""Token ids in rows, (rows, row_tokens), in the integer type of the shards."""

Int64Array = npt.NDArray[np.int64]
"""Lengths, offsets, or indices of documents and rows."""

Float64Array = npt.NDArray[np.float64]
"""Sums over rows or documents."""

BoolArray = npt.NDArray[np.bool_]


def sums(groups: Int64Array, values: npt.ArrayLike) -> Float64Array:
    """Return the sum of the `values` of each group, from group 0."""
    return np.bincount(groups, np.asarray(values)).astype(np.float64)


def numbers(values: npt.NDArray[Any], kind: pa.DataType) -> pa.Array:
    """Return an Arrow array of integers; nothing is copied if `values` already have the type."""
    buffer = pa.py_buffer(np.ascontiguousarray(values, dtype=str(kind)))
    return pa.Array.from_buffers(kind, len(values), [None, buffer])


def whole_numbers(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """Return the integers of a column without nulls, in their own type."""
    kind = np.dtype(str(column.type))
    chunks = [
        np.frombuffer(chunk.buffers()[1], kind, len(chunk), kind.itemsize * chunk.offset)
        for chunk in column.chunks
        if len(chunk)
    ]
    return np.concatenate(chunks) if chunks else np.empty(0, kind)


def equals(column: pa.ChunkedArray, text: str) -> BoolArray:
    """Return for each string of a column without nulls whether it is `text`."""
    found = pc.is_in(column, value_set=strings([text]))
    return whole_numbers(found.cast(pa.uint8())).astype(bool)


def binary(values: Sequence[bytes]) -> pa.BinaryArray:
    """An Arrow array of byte strings."""
    offsets = np.zeros(len(values) + 1, dtype=np.int32)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(values))]
    return pa.Array.from_buffers(pa.binary(), len(values), buffers)


def strings(values: Iterable[str]) -> pa.StringArray:
    """An Arrow array of strings; U+FFFD replaces lone surrogates."""
    return binary([well_formed(value)[0].encode() for value in values]).view(pa.string())


def well_formed_strings(values: pa.BinaryArray) -> pa.StringArray:
    """The same values as strings; U+FFFD replaces lone surrogates."""
    try:
        return values.cast(pa.string())
    except pa.ArrowInvalid:
        return strings(value.decode("utf-8", "surrogatepass") for value in values.to_pylist())


def byte_lengths(values: pa.StringArray) -> Int64Array:
    """Number of UTF-8 bytes of each string; no string may be null."""
    if not len(values):
        return np.empty(0, dtype=np.int64)
    offsets = np.frombuffer(values.buffers()[1], np.int32, len(values) + 1, 4 * values.offset)
    return np.diff(offsets).astype(np.int64)


def well_formed(text: str) -> tuple[str, int]:
    """Return `text` without lone surrogates, and its length in UTF-8 bytes.

    JSON can contain one half of a UTF-16 surrogate pair. It is not a character and cannot be
    encoded as UTF-8, so it is replaced by U+FFFD.
    """
    try:
        return text, len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError:
        mended = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return mended, len(mended.encode())
