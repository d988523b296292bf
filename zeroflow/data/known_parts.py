"""The parts that the pages of counts of a set list, and the verification of some of them.

Parts that no page lists yet are verified completely. Of the parts in pages, each start of a run
verifies up to `VERIFIED_BYTES`: all parts of a small set, and a different section of a large set
each time. Reading every byte of a set of a million parts would take hours.
"""

import logging
import os
import secrets
from pathlib import Path

import numpy as np
import numpy.typing as npt

from zeroflow import artifacts
from zeroflow.data import part_counts
from zeroflow.data.arrays import Int64Array
from zeroflow.data.needed import Needed
from zeroflow.data.part_counts import COLUMNS
from zeroflow.data.parts import existing_part
from zeroflow.data.shards import part_path
from zeroflow.units import count, decimal

log = logging.getLogger(__name__)

VERIFIED_BYTES = 2**33
"""Maximum number of bytes to verify at a start; they take some seconds to read and hash."""

_PART = "part-"


class KnownParts:
    """The counts of those parts in pages that exist and that a run needs."""

    def __init__(self, path: Path, needed: Needed, *, verified: bool = True) -> None:
        """
        Args:
            verified: True to verify some of the parts.
        """
        self._path, self._needed, self._lines = path, needed, part_counts.pages(path)
        self._lines = self._lines[: self._enough(self._lines)]
        self._sound = present(path, len(self._lines))
        if verified:
            self._verify_some()

    def following(self) -> Int64Array:
        """Return the lines of the needed parts that are not counted yet, up to the first damaged
        one.
        """
        begin = len(self._needed.counts)
        unsound = np.flatnonzero(~self._sound[begin:])
        end = begin + int(unsound[0]) if len(unsound) else len(self._lines)
        lines = self._lines[begin:end]
        return lines[: self._enough(lines)]

    def _enough(self, lines: Int64Array) -> int:
        """Return how many of `lines` the run needs in addition to the parts counted."""
        enough, needed = 0, self._needed
        for name in ("train_rows", "validation_rows"):
            counted, wanted = needed.counts.total(name), getattr(needed, name)
            if counted < wanted:
                rows = counted + np.cumsum(lines[:, COLUMNS.index(name)])
                enough = max(enough, int(np.searchsorted(rows, wanted)) + 1)
        return min(enough, len(lines))

    def _verify_some(self) -> None:
        parts, sizes = len(self._lines), self._lines[:, COLUMNS.index("row_bytes")]
        if not parts:
            return
        first = 0 if sizes.sum() <= VERIFIED_BYTES else secrets.randbelow(parts)
        order = (first + np.arange(parts)) % parts
        chosen = order[: max(1, int(np.searchsorted(np.cumsum(sizes[order]), VERIFIED_BYTES + 1)))]
        for number in chosen[self._sound[chosen]].tolist():
            self._sound[number] = existing_part(part_path(self._path, number)) is not None
        if len(chosen) < parts:
            log.info(
                "%s of %s verified (%s), beginning with %s; the others were verified when built or "
                "first reused",
                *(f"{len(chosen):,}", count(parts, "part"), decimal(int(sizes[chosen].sum()))),
                part_path(self._path, first).name,
            )


def complete_page(path: Path, parts: int) -> None:
    """Write a page of counts if the first `parts` parts end with a complete page."""
    number, rest = divmod(parts, part_counts.PAGE_PARTS)
    if rest:
        return
    try:
        part_counts.write_page(path, number - 1)
    except OSError as error:  # without the page, the next start reads its parts one by one
        log.warning("cannot write the counts of the parts: %s", artifacts.explained(error))


def present(path: Path, parts: int) -> npt.NDArray[np.bool_]:
    """Return which of the first parts exist, from a single listing of the folder."""
    present = np.zeros(parts, bool)
    if not parts:
        return present
    with os.scandir(path) as entries:
        for entry in entries:
            number = entry.name.removeprefix(_PART)
            if entry.name.startswith(_PART) and number.isdigit() and int(number) < parts:
                present[int(number)] = True
    return present
