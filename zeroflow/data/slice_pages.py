"""Files slices-00001024.json ... of a shard set: pages of about 1,024 slices of the corpus.

The first page is part of plan.json, unless the corpus has many files: plan.json lists them, so
writing it again and again would be slow. The name of a page contains the number of its first slice.
Each page is planned from the one before, so all processes find the same slices, and any of them may
write the page. A page is rewritten only until it is full. Only the pages of missing parts
are read.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import NonNegativeInt

from zeroflow import artifacts
from zeroflow.data.corpus import CorpusConfig
from zeroflow.data.formats.file import CorpusFile
from zeroflow.data.slices import Slice, plan_slices
from zeroflow.records import Record

PAGE_SLICES = 1024
"""Number of slices after which a new page begins. All slices of a file are in the same page."""

_NAME = "slices-"


class SlicePage(Record):
    first: NonNegativeInt
    """Number of its first slice."""

    next_file: NonNegativeInt
    """Index of the first file of the corpus whose slices are not in this page or an earlier one."""

    slices: tuple[Slice, ...]

    @property
    def end(self) -> int:
        return self.first + len(self.slices)

    def save(self, folder: Path) -> Path:
        """Write the page into the folder of a set, and return its path."""
        path = _path(folder, self.first)
        artifacts.write_signed(path, self.as_json())
        return path


class SlicePages:
    """The slices of a set by number. They are planned up to the highest number requested."""

    def __init__(
        self,
        folder: Path,
        corpus: CorpusConfig,
        files: Sequence[CorpusFile],
        begin: SlicePage,
        save_begin: Callable[[SlicePage], None] | None = None,
    ) -> None:
        """
        Args:
            begin: the first page, which may be empty.
            save_begin: writes that page whenever slices are added to it; None to add none to it.
        """
        self._folder, self._corpus, self._files = folder, corpus, files
        self._begin = self._page = begin
        self._save_begin = save_begin

    def slice(self, number: int) -> Slice | None:
        """Return slice `number`; None if the corpus has fewer slices.

        Raises:
            hub.HubError: the hub refused or failed.
            ValueError: a Parquet file is damaged.
        """
        if not self._page.first <= number < self._page.end:
            self._page = self._nearest(number)
        while number >= self._page.end and self._page.next_file < len(self._files):
            self._page = self._following()
        here = number - self._page.first
        return self._page.slices[here] if here < len(self._page.slices) else None

    def _nearest(self, number: int) -> SlicePage:
        """Return the page with slice `number`, or the last page before it."""
        if page := self._read(_path(self._folder, number)):  # if slices are read in order
            return page
        last = _path(self._folder, number).name
        names = (path for path in self._folder.glob(f"{_NAME}*.json") if path.name <= last)
        pages = map(self._read, sorted(names, reverse=True))
        return next((page for page in pages if page), self._begin)

    def _read(self, path: Path) -> SlicePage | None:
        """Return the page at `path`; None if it is missing or damaged and has to be planned."""
        try:
            return SlicePage.model_validate(artifacts.read_signed(path))
        except artifacts.DamagedArtifact:
            return None

    def _following(self) -> SlicePage:
        """Return the current page with the slices of the next files added, or the next page."""
        page = self._page
        if len(page.slices) >= PAGE_SLICES or (page is self._begin and not self._save_begin):
            page = SlicePage(first=page.end, next_file=page.next_file, slices=())
        planned = plan_slices(self._corpus, self._files, page.next_file)
        page = page.model_copy(
            update={
                "slices": (*page.slices, *planned.slices),
                "next_file": planned.next_file,
            }
        )
        if page.first == 0 and self._save_begin:
            self._save_begin(page)
            self._begin = page
        else:
            page.save(self._folder)
        return page


def _path(folder: Path, first: int) -> Path:
    return folder / f"{_NAME}{first:08d}.json"
