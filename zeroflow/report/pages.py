"""Pages about a run: Markdown with plots."""

import base64
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from zeroflow.text.markup import Markdown, block, table

log = logging.getLogger(__name__)


class Plot(NamedTuple):
    """A PNG file on a page."""

    path: Path
    subject: str


class Table(NamedTuple):
    """A table on a page; text in it that is not `Markdown` is escaped."""

    head: Sequence[str]
    rows: Collection[Sequence[str]]
    right: str = ""
    """A character for each column; "r" aligns it on the right."""


class TextBlock(NamedTuple):
    """Lines on a page that are shown as they are, such as a sample."""

    text: str


Part = Markdown | Table | TextBlock | Plot


class Page(NamedTuple):
    """Parts of a page, which become Markdown when it is written; its plots are next to it."""

    parts: tuple[Part, ...]

    def write(self, path: Path) -> None:
        """Write the page into the folder of its plots."""
        path.write_text(f"{self.linked}\n", encoding="utf-8")

    @property
    def linked(self) -> Markdown:
        """The page with links to the files of its plots."""
        return self._joined(lambda plot: plot.path.name)

    @property
    def embedded(self) -> Markdown:
        """The page with embedded plots, for readers without access to the files."""
        return self._joined(lambda plot: data_uri(plot.path))

    def _joined(self, address: Callable[[Plot], str]) -> Markdown:
        return Markdown("\n\n".join(_markdown(part, address) for part in self.parts))


def _markdown(part: Part, address: Callable[[Plot], str]) -> str:
    match part:
        case Plot():
            return f"![{part.subject}]({address(part)})"
        case Table():
            return table(part.head, part.rows, right=part.right)
        case TextBlock():
            return block(part.text)
        case Markdown():
            return part.strip()


def data_uri(plot: Path) -> str:
    """Return an address that contains the whole PNG file."""
    return f"data:image/png;base64,{base64.b64encode(plot.read_bytes()).decode()}"


@contextmanager
def never_fatal(page: str) -> Iterator[None]:
    """Log an error of the block instead of raising it: a page must not end a run."""
    try:
        yield
    except Exception as error:
        log.warning("cannot show the %s: %s: %s", page, type(error).__name__, error)
        log.debug("cannot show the %s", page, exc_info=True)
