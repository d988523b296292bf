"""Which documents are held out for validation.

A document's id decides, so that a document is on the same side whatever else the corpus holds and
whoever builds the shards.
"""

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from zeroflow.data.corpus import CorpusConfig
from zeroflow.data.slices import CHARACTERS_PER_TOKEN, read_documents

FEW_DOCUMENTS = 1000
"""A corpus of so many documents is left to chance: about `validation_fraction` is held out."""


def holdout_positions(ids: Iterable[bytes]) -> npt.NDArray[np.float64]:
    """Position of each document in [0, 1), a hash of its id; the lowest are held out."""
    digests = b"".join(hashlib.sha256(i).digest()[:8] for i in ids)
    return np.frombuffer(digests, ">u8") / 2.0**64


def holdout_limit(corpus: CorpusConfig, *, fraction: float, row_tokens: int) -> float:
    """Documents of a resolved corpus whose position is below this are held out.

    With few documents, chance could hold out none of them, or all. The documents with the lowest
    positions are then held out even above `fraction`, until they fill a row or are half of the
    corpus; the one with the highest position never is.
    """
    if not corpus.is_text:
        return fraction
    few: list[tuple[float, int]] = []  # without the texts, which may be books
    seen: set[bytes] = set()
    for document in read_documents(corpus):
        if corpus.deduplicate:
            digest = hashlib.sha256(document.text.encode()).digest()
            if digest in seen:
                continue
            seen.add(digest)
        [position] = holdout_positions([document.id.encode("utf-8", "surrogatepass")]).tolist()
        few.append((position, len(document.text)))
        if len(few) >= FEW_DOCUMENTS:
            return fraction
    few.sort()
    limit, tokens = fraction, 0.0
    for position, characters in few[: max(1, len(few) // 2)]:
        if tokens >= row_tokens:
            break
        tokens += characters / CHARACTERS_PER_TOKEN
        limit = max(limit, float(np.nextafter(position, 1)))
    return min(limit, few[-1][0]) if few else limit
