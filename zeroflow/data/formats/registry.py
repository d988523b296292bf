"""The known formats, by the suffix of a file's name."""

from pathlib import Path

from zeroflow.data.formats.file import COMPRESSED
from zeroflow.data.formats.format import Format
from zeroflow.data.formats.json_lines import JsonLinesFormat
from zeroflow.data.formats.parquet import ParquetFormat
from zeroflow.data.formats.plain_text import TextFormat

FORMATS: dict[str, Format] = {
    ".txt": TextFormat(),
    ".jsonl": JsonLinesFormat(),
    ".parquet": ParquetFormat(),
}
"""Formats by suffix."""

_ALIASES = {".json": ".jsonl", ".ndjson": ".jsonl", ".py": ".txt"}  # .py: files of the sample


def format_of(name: str) -> Format:
    """The format of a file, which may be compressed.

    Raises:
        ValueError: the suffix is unknown.
    """
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes = suffixes[:-1]
    suffix = _ALIASES.get(suffixes[-1], suffixes[-1]) if suffixes else ""
    if suffix not in FORMATS:
        raise ValueError(
            f"{name}: unknown kind of file. Supported are {', '.join(FORMATS)}, "
            f"plain or compressed ({', '.join(COMPRESSED)})"
        )
    return FORMATS[suffix]


def is_known(name: str) -> bool:
    """Return True if a file of this name has a known format."""
    try:
        format_of(name)
    except ValueError:
        return False
    return True


def described() -> str:
    """List of the supported kinds of files, for help texts."""
    kinds = [known.description for known in FORMATS.values()]
    return f"{', '.join(kinds[:-1])} or {kinds[-1]}, also compressed ({' '.join(COMPRESSED)})"
