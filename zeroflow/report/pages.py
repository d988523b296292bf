"""Pages of a run: Markdown with pictures, on disk and elsewhere."""

import base64
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from zeroflow.text.markup import Markdown

log = logging.getLogger(__name__)


class Picture(NamedTuple):
    """A PNG file on a page."""

    path: Path
    subject: str


class Page(NamedTuple):
    """Sections of Markdown and pictures; the picture files are next to the page."""

    parts: tuple[Markdown | Picture, ...]

    def write(self, path: Path) -> None:
        """Write the page into the folder of its pictures."""
        path.write_text(f"{self.linked}\n", encoding="utf-8")

    @property
    def linked(self) -> Markdown:
        """The page with links to the files of its pictures."""
        return self._joined(lambda picture: picture.path.name)

    @property
    def embedded(self) -> Markdown:
        """The page with embedded pictures, for readers without access to the files."""
        return self._joined(lambda picture: data_uri(picture.path))

    def _joined(self, address: Callable[[Picture], str]) -> Markdown:
        sections = (
            f"![{part.subject}]({address(part)})" if isinstance(part, Picture) else part.strip()
            for part in self.parts
        )
        return Markdown("\n\n".join(sections))


def data_uri(picture: Path) -> str:
    """Address that contains a PNG file."""
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"


@contextmanager
def never_fatal(page: str) -> Iterator[None]:
    """Log an error of the block instead of raising it: a page must not end a run."""
    try:
        yield
    except Exception as error:
        log.warning("cannot show the %s: %s: %s", page, type(error).__name__, error)
        log.debug("cannot show the %s", page, exc_info=True)
