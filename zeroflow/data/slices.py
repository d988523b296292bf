"""Slices of a corpus: pieces of about equal size that can be read independently.

The documents of a slice do not depend on what was read before, so slices can be processed in any
order, by several processes, and individually after an interruption.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from typing import NamedTuple

import numpy as np
from pydantic import NonNegativeInt

from zeroflow import artifacts
from zeroflow.config import Config
from zeroflow.data.corpus import CorpusConfig, document_file, list_files
from zeroflow.data.documents import Document, Tally, TextBatch, regroup
from zeroflow.data.formats.file import UNREADABLE, CorpusFile, DocumentFile, is_compressed
from zeroflow.data.formats.utf8 import NotUtf8

SLICE_BYTES = 2**25
"""Approximate bytes of text of a slice. A killed build loses the slices in progress, some seconds
of work each. Smaller slices would lose less, but create more part directories for a large
corpus."""

CHARACTERS_PER_TOKEN = 4
"""Assumed when text is held out, because that choice must not depend on the tokenizer."""

# Bytes of text per token, by vocabulary size. Byte-level BPEs were trained on 6 MB of Python's
# standard library, and on 6 MB of English manuals. These are the means; both differ from them by up
# to 11 %
_BYTES_PER_TOKEN = {300: 1.4, 512: 1.9, 1024: 2.4, 2048: 2.8, 8192: 3.7, 32_768: 4.3, 131_072: 4.6}

_COMPRESSION = 3
"""Bytes of text per byte on disk, assumed for compressed files."""


class Slice(Config):
    """A piece of a corpus."""

    files: tuple[CorpusFile, ...] = ()
    """Whole files, or the single file of which the slice is a part. Empty for synthetic data."""

    start: NonNegativeInt = 0
    """Start of the part: row group of a .parquet file, byte of a .jsonl file, or synthetic
    block."""

    stop: NonNegativeInt | None = None
    """Start of the next part; None for whole files."""

    held_out: bool = False
    """True for a slice of files that are used for validation only."""


class PlannedSlices(NamedTuple):
    slices: list[Slice]
    next_file: int
    """Index of the first file after them."""


def plan_slices(corpus: CorpusConfig, files: Sequence[CorpusFile], first: int) -> PlannedSlices:
    """Return the next slices of a resolved corpus, beginning with file number `first`.

    A large file is cut if its format allows that; otherwise it is one slice of any size. Small
    files share a slice.

    Raises:
        hub.HubError: the hub refused or failed.
        ValueError: a Parquet file is damaged.
    """
    if _is_cut(corpus, files[first]):
        return PlannedSlices(_cut(corpus, files[first]), first + 1)
    together: list[CorpusFile] = []
    size = 0
    for file in islice(files, first, None):
        if together and (size >= SLICE_BYTES or _is_cut(corpus, file)):
            break
        together.append(file)
        size += text_bytes(corpus, file)
    return PlannedSlices([Slice(files=tuple(together))], first + len(together))


def read_slice(corpus: CorpusConfig, piece: Slice, tally: Tally) -> Iterator[TextBatch]:
    """The documents of a slice, always in the same order and batches; empty ones are left out.

    Raises:
        ValueError: the content of a file does not match its suffix, or more than
            `bad_lines_limit` lines are bad. The message names file and place.
        hub.HubError: the hub failed while a file was read.
    """
    return regroup(_read_files(corpus, piece, tally))


def all_slices(corpus: CorpusConfig) -> Iterator[Slice]:
    """Yield all slices of a resolved text corpus; each is planned when it is requested."""
    files, first = list_files(corpus), 0
    while first < len(files):
        planned, first = plan_slices(corpus, files, first)
        yield from planned


def read_documents(corpus: CorpusConfig) -> Iterator[Document]:
    """All documents of a resolved text corpus, in order."""
    for piece in all_slices(corpus):
        for batch in read_slice(corpus, piece, Tally()):
            yield from batch.documents()


def local_text_bytes(corpus: CorpusConfig) -> float:
    """Approximate bytes of text; infinite if the files are not on this machine."""
    if not corpus.is_text or corpus.data_mode == "auto" or not corpus.source.is_local:
        return math.inf
    files = corpus.source.files(corpus.data_revision or "")
    return sum(text_bytes(corpus, file) for file in files)


def require_readable(corpus: CorpusConfig) -> None:
    """Check the user's own files of a corpus, resolved or not, in a moment.

    This checks their names and reads the beginning of the first non-empty file.

    Raises:
        ValueError: there are no such files, all are empty, or the content of the first does not
            match its suffix or the settings.
    """
    if validation := corpus.validation:
        require_readable(validation)
    if corpus.data_mode != "files":
        return
    unread = corpus.replace(data_revision=corpus.data_revision or "unread")
    unread.source.look_again()
    files = list_files(unread)
    filled = [file for file in files if file.size or is_compressed(file.name)]
    if not filled:
        found = document_file(unread, files[0]).place
        found += " is" if len(files) == 1 else f" and all other files of {corpus.files_flag} are"
        raise ValueError(f"{found} empty: name files that contain text")
    first = filled[0]
    if corpus.source.format_of(first.name).can_be_cut or text_bytes(corpus, first) <= SLICE_BYTES:
        next(_read_files(unread, Slice(files=(first,)), Tally()), None)


def bytes_per_token(vocab_size: int) -> float:
    """Return the approximate bytes of text per token, for a tokenizer that suits the text."""
    sizes = [math.log(size) for size in _BYTES_PER_TOKEN]
    return float(np.interp(math.log(vocab_size), sizes, list(_BYTES_PER_TOKEN.values())))


def _read_files(corpus: CorpusConfig, piece: Slice, tally: Tally) -> Iterator[TextBatch]:
    source = corpus.source
    for listed in piece.files:
        file = document_file(corpus, listed)
        try:
            source.require_unchanged(listed)
            yield from source.format_of(file.name).read(file, piece.start, piece.stop, tally)
        except UNREADABLE as error:
            source.require_unchanged(listed)  # raises a better explanation if the file changed
            raise _unreadable(file, error) from error
        except ValueError as error:
            if isinstance(error, NotUtf8) and source.skips_undecodable:
                continue
            source.require_unchanged(listed)
            raise
        source.require_unchanged(listed)


def _unreadable(file: DocumentFile, error: Exception) -> ValueError:
    why = artifacts.explained(error) if isinstance(error, OSError) else str(error)
    return ValueError(f"{file.place} cannot be read: {why}")


def text_bytes(corpus: CorpusConfig, file: CorpusFile) -> int:
    """Approximate bytes of text of a file."""
    dense = is_compressed(file.name) or corpus.source.format_of(file.name).is_dense
    return file.size * (_COMPRESSION if dense else 1)


def _is_cut(corpus: CorpusConfig, file: CorpusFile) -> bool:
    large = text_bytes(corpus, file) > SLICE_BYTES
    can_be_cut = corpus.source.format_of(file.name).can_be_cut
    return large and can_be_cut and not is_compressed(file.name)


def _cut(corpus: CorpusConfig, listed: CorpusFile) -> list[Slice]:
    file = document_file(corpus, listed)
    try:
        corpus.source.require_unchanged(listed)
        cuts = corpus.source.format_of(file.name).cuts(file, SLICE_BYTES)
    except UNREADABLE as error:
        raise _unreadable(file, error) from error
    return [Slice(files=(listed,), start=start, stop=stop) for start, stop in pairwise(cuts)]
