"""Reads single rows of an Arrow file of a shard set.

The files are not mapped into memory. Around a mapped row of 8 KB, Linux reads hundreds of KB, and
if a file server fails, access to a mapped file ends the process without a message.

Source: https://arrow.apache.org/docs/format/Columnar.html#ipc-file-format
"""

import os
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa

from zeroflow.artifacts import DamagedArtifact
from zeroflow.data.arrays import RowArray

_MAGIC = b"ARROW1\0\0"
_CONTINUATION = b"\xff\xff\xff\xff"
_HEAD_BYTES = 2**12
"""Maximum size of magic, schema and metadata of the record batch."""


class ShardFile:
    """An open file. It is closed when its last reference is gone, so threads may share it."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            DamagedArtifact: the file is missing, or is not one of a shard set.
        """
        self._handle = -1
        self._path = path
        try:
            self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            os.posix_fadvise(self._handle, 0, 0, os.POSIX_FADV_RANDOM)
            head = os.pread(self._handle, _HEAD_BYTES, 0)
            size = os.fstat(self._handle).st_size
            column, batch, self._begin = _parse(head)
            self.rows, body = _rows_and_body(batch)
        except (OSError, ValueError, struct.error, pa.ArrowException) as error:
            raise _damaged(path, f"cannot be read: {error}") from error
        self.row_tokens: int = column.list_size
        self.dtype = np.dtype(str(column.value_type))
        self._row_bytes = self.row_tokens * self.dtype.itemsize
        if body < self.rows * self._row_bytes or size < self._begin + body:
            raise _damaged(path, f"has {size:,} bytes, too few for {self.rows:,} rows")

    def read_into(self, row: int, out: RowArray) -> None:
        """Read row number `row` into `out`, which is contiguous.

        Raises:
            DamagedArtifact: the file has become shorter.
        """
        begin = self._begin + row * self._row_bytes
        if os.preadv(self._handle, [out.data], begin) != self._row_bytes:
            raise _damaged(self._path, f"ends before its row {row:,}")

    def __del__(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)


def _damaged(path: Path, why: str) -> DamagedArtifact:
    return DamagedArtifact(
        f"{path} {why}: run the command of the run again, which sets a damaged part aside and "
        "rebuilds it"
    )


def _parse(head: bytes) -> tuple[pa.FixedSizeListType, bytes, int]:
    """Return the type of the column, the record batch's metadata, and where its body begins.

    Raises:
        ValueError: the file has another format.
    """
    if not head.startswith(_MAGIC):
        raise ValueError("it is not an Arrow file")
    schema = pa.ipc.read_schema(pa.py_buffer(head[len(_MAGIC) :]))
    _, after_schema = _message(head, len(_MAGIC))
    batch, begin = _message(head, after_schema)
    return schema.field(0).type, batch, begin


def _message(head: bytes, begin: int) -> tuple[bytes, int]:
    """Return the metadata of the message at `begin`, and the position after it."""
    if head[begin : begin + 4] != _CONTINUATION:
        raise ValueError("it has no message where one should begin")
    (size,) = struct.unpack_from("<i", head, begin + 4)
    end = begin + 8 + size
    if not size > 0 or end > len(head):
        raise ValueError("its metadata is cut short")
    return head[begin + 8 : end], end


def _rows_and_body(batch: bytes) -> tuple[int, int]:
    """Return the rows and the bytes of a record batch, from its FlatBuffers metadata.

    The column is not nullable, so the body begins with the buffer of its values.
    """
    (message,) = struct.unpack_from("<I", batch, 0)
    header = _field(batch, message, 2)
    (offset,) = struct.unpack_from("<I", batch, header)
    (rows,) = struct.unpack_from("<q", batch, _field(batch, header + offset, 0))
    (body,) = struct.unpack_from("<q", batch, _field(batch, message, 3))
    return rows, body


def _field(content: bytes, table: int, number: int) -> int:
    """Return the position of a table's field. A field with the default value, 0 rows, is absent."""
    (back,) = struct.unpack_from("<i", content, table)
    (place,) = struct.unpack_from("<H", content, table - back + 4 + 2 * number)
    if not place:
        raise ValueError("it has no rows")
    return table + place
