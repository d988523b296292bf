"""Number of bytes of text that a token represents."""

import re

import numpy as np
import tokenizers

from zeroflow.data import encoding
from zeroflow.data.arrays import BoolArray, Int64Array

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""Name of a token that represents one byte."""


def token_bytes(
    tokenizer: tokenizers.Tokenizer, ids: Int64Array, begins: BoolArray, *, end_of_text: int
) -> Int64Array:
    """Return the number of UTF-8 bytes of text that each id represents.

    If the tokenizer neither loses nor adds text, the sum over a document is the size of its text.
    Unknown tokens count as 0 bytes, because the ids do not show the text that they replace.

    Args:
        begins: True for the first id of a document. The space that a tokenizer adds before every
            text does not count.
    """
    unique, places = np.unique(ids, return_inverse=True)
    sizes = np.array(_sizes(tokenizer, unique.tolist()), dtype=np.int64).reshape(-1, 2)
    textless = [end_of_text]
    if (unknown := encoding.unknown_id(tokenizer)) is not None:
        textless.append(unknown)
    sizes[np.isin(unique, textless)] = 0
    return sizes[places.reshape(ids.shape), begins.astype(np.int64)]


def may_add_text(tokenizer: tokenizers.Tokenizer) -> bool:
    """Return True if decoding may add text, such as spaces between words and punctuation."""
    return not _is_byte_level(tokenizer)


def _is_byte_level(tokenizer: tokenizers.Tokenizer) -> bool:
    return "ByteLevel" in str(tokenizer.decoder)


def _sizes(tokenizer: tokenizers.Tokenizer, ids: list[int]) -> list[tuple[int, int]]:
    """Return the bytes of each id in two cases: after other text, and at the start of a text."""

    def decode(texts: list[list[int]]) -> list[str]:
        return tokenizer.decode_batch(texts, skip_special_tokens=False)

    [probe] = decode([tokenizer.encode("a", add_special_tokens=False).ids])
    keeps_added_space = probe.startswith(" ")
    added = tokenizer.get_added_tokens_decoder()
    byte_level = _is_byte_level(tokenizer)
    sizes = []
    # Most decoders remove the added space from the first token, and some join tokens with spaces
    for token, once, twice in zip(
        ids, decode([[i] for i in ids]), decode([[i, i] for i in ids]), strict=True
    ):
        # `id_to_token` would return the normalised form of an added token
        name = added[token].content if token in added else tokenizer.id_to_token(token) or ""
        if byte_level:  # the name has one character per byte, except for added tokens
            first = later = len(name.encode() if token in added else name)
        elif _BYTE.fullmatch(name):
            first = later = 1
        else:
            first = len(once.encode())
            later = len(twice.encode()) - first
        sizes.append((later, first - (keeps_added_space and once.startswith(" "))))
    return sizes
