"""Detection of documents whose text occurred earlier, by hashes of the texts."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from zeroflow.data import document_table


def hash_texts(texts: Sequence[str]) -> npt.NDArray[np.uint64]:
    """Return a 64-bit hash of each text; 10^8 texts collide with a probability of 1 in 3,700."""
    digests = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(b"".join(digests), dtype=np.uint64)


class SeenTexts:
    """Hashes of the texts seen so far."""

    def __init__(self, earlier: Iterable[Path]) -> None:
        """
        Args:
            earlier: preceding parts, whose tables contain the hashes.
        """
        columns = [
            document_table.read(part, ["text_hash"]).column(0).to_numpy() for part in earlier
        ]
        self._earlier = np.unique(np.concatenate([*columns, np.empty(0, np.uint64)]))
        self._here: set[int] = set()

    def add(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """True for each hash that is new."""
        new = ~np.isin(hashes, self._earlier)
        for place in np.flatnonzero(new).tolist():
            value = int(hashes[place])
            new[place] = value not in self._here
            self._here.add(value)
        return new
