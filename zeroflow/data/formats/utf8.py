"""Decoding of text files, with a message for those that are not UTF-8."""

import codecs

_MARKS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
"""Encodings by the mark with which their files begin."""


class NotUtf8(ValueError):
    """A text file is not UTF-8."""


def decode(content: bytes, *, position: int = 0, errors: str = "strict") -> str:
    """Return `content` as text, without a byte-order mark.

    Args:
        position: position of `content` in its file, for the message.
        errors: as in `bytes.decode`.

    Raises:
        NotUtf8: the message continues a sentence that begins with the name of the file or line.
    """
    body = content.removeprefix(codecs.BOM_UTF8)
    try:
        return body.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        at = error.start + len(content) - len(body)
        raise NotUtf8(_explained(content, at, position)) from error


def _explained(content: bytes, at: int, position: int) -> str:
    encoding = _MARKS.get(content[:2]) if not position else None
    remedy = f"convert the file, as in `iconv -f {encoding or 'ISO-8859-1'} -t UTF-8 OLD > NEW`"
    if encoding is None:
        remedy += " if its encoding is ISO-8859-1"
    return f"is not UTF-8: byte {position + at:,} is 0x{content[at]:02x}: {remedy}"
