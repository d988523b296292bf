"""Number of bytes of text that a token represents."""

import re

import numpy as np
import tokenizers

from zeroflow.data.arrays import Int64Array
from zeroflow.data.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_ANCHOR = "a"
"""Text before a token whose bytes are counted: at the beginning of a text, a decoder may remove the
space of a token."""


def token_bytes(tokenizer: Tokenizer, ids: Int64Array) -> Int64Array:
    """Return the number of UTF-8 bytes that each id adds to a text; 0 for the end-of-text id.

    If the tokenizer loses no text, the sum over a document is the size of its text.
    """
    loaded = tokenizer.load()
    unique, places = np.unique(ids, return_inverse=True)
    added = loaded.get_added_tokens_decoder()
    byte_level = "ByteLevel" in str(loaded.decoder)
    names = [loaded.id_to_token(token) or "" for token in unique.tolist()]
    sizes = np.empty(len(unique), dtype=np.int64)
    rest: list[int] = []
    for place, (token, name) in enumerate(zip(unique.tolist(), names, strict=True)):
        if token == tokenizer.end_of_text:
            sizes[place] = 0
        elif token in added:
            sizes[place] = len(name.encode())
        elif byte_level:
            sizes[place] = len(name)  # a character for each byte
        elif _BYTE.fullmatch(name):
            sizes[place] = 1
        else:
            rest.append(place)
    sizes[rest] = _decoded_bytes(loaded, unique[rest].tolist())
    return sizes[places.reshape(ids.shape)]


def _decoded_bytes(loaded: tokenizers.Tokenizer, ids: list[int]) -> list[int]:
    """Return the bytes that each id adds to a text before it."""
    anchor = loaded.encode(_ANCHOR, add_special_tokens=False).ids
    before = len(loaded.decode(anchor, skip_special_tokens=False).encode())
    texts = loaded.decode_batch([[*anchor, token] for token in ids], skip_special_tokens=False)
    return [len(text.encode()) - before for text in texts]
