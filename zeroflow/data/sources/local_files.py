"""Files on this machine: the user's own, and a sample that every machine has."""

import contextvars
import errno
import glob
import hashlib
import logging
import os
import sysconfig
import threading
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import IO

from zeroflow import artifacts
from zeroflow.data.formats.file import CorpusFile
from zeroflow.data.formats.registry import described, is_known
from zeroflow.data.sources.known_digests import FileDigest, digest_files, stamp
from zeroflow.data.sources.source import Source
from zeroflow.text.markup import is_utf8
from zeroflow.units import count, decimal

log = logging.getLogger(__name__)

_NAMED = 3
"""Maximum number of left-out files that a message names; it gives the number of the others."""


_SILENT_SECONDS = 2.0
"""Time after which a log line says that files are being read."""


_pinned: dict[Path, FileDigest] = {}
"""Digest and state of each file when this process last pinned a revision."""


_revisions: dict["LocalSource", str] = {}
"""Revision of each source when this process last computed it."""


@contextmanager
def _logged_if_slow(paths: Collection[Path]) -> Iterator[None]:
    """Log what is being read if the block, which computes digests, takes several seconds."""

    def say() -> None:
        with suppress(OSError):  # a file was just removed, which its reader reports
            size = decimal(sum(path.stat().st_size for path in paths))
            log.info("reading %s, %s, to identify the text", count(len(paths), "file"), size)

    # The context tells Prefect which run the line belongs to
    timer = threading.Timer(_SILENT_SECONDS, contextvars.copy_context().run, [say])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class LocalSource(Source):
    """Files on this machine; their revision is a digest of names and contents."""

    is_local = True

    apart: "LocalFiles | None" = None
    """The files for validation. This source excludes them and their copies."""

    @property
    @abstractmethod
    def title(self) -> str:
        """The files, in error messages."""

    @abstractmethod
    def find(self) -> dict[str, Path]:
        """The path of each file by its name in the corpus, in reading order, including files that
        are left out.
        """

    def pin(self, revision: str | None, known: Path | None = None) -> str:
        _paths.cache_clear()  # files may have been added since the last call
        earlier = _revisions.pop(self, None)
        digest, paths = hashlib.sha256(), _paths(self)
        with _logged_if_slow(paths.values()):
            _pinned.update(digest_files(paths.values(), known and known / self._file_of_digests))
        for name, path in paths.items():
            digest.update(f"{name}\n{_pinned[path].sha256}\n".encode())
        found = digest.hexdigest()[:16]
        left_out = self._left_out() if found != earlier else ""
        if left_out:
            log.warning("%s", left_out)
        if revision not in (None, found):
            raise ValueError(
                f"{self.title} have changed: their digest is {found}, but the run was started "
                f"with {revision}. {left_out and left_out + '. '}"
                "Restore the files, or use another --run-name"
            )
        _revisions[self] = found
        return found

    @property
    def _file_of_digests(self) -> str:
        return f"{artifacts.fingerprint(repr(self))}.json"

    def _left_out(self) -> str:
        """Return a sentence about the files that are left out; "" if there are none."""
        if self.apart is None:
            return ""
        names = [name for name in self.find() if name not in _paths(self)]
        if not names:
            return ""
        more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
        return (
            f"{count(len(names), 'file')} left out of training, because {self.apart.flag} names "
            f"the same text: {', '.join(names[:_NAMED])}{more}"
        )

    def look_again(self) -> None:
        _paths.cache_clear()
        for path in _paths(self).values():
            _pinned.pop(path, None)

    def require_revision(self, revision: str) -> None:
        if _revisions.get(self) != revision:
            self.pin(revision)

    def files(self, revision: str) -> list[CorpusFile]:
        return [CorpusFile(name=n, size=path.stat().st_size) for n, path in _paths(self).items()]

    def open(self, file: CorpusFile, revision: str) -> IO[bytes]:
        return self.path(file).open("rb")

    def path(self, file: CorpusFile) -> Path:
        return _paths(self)[file.name]

    def place(self, file: CorpusFile) -> str:
        return str(self.path(file))

    def digests(self) -> dict[str, str]:
        if self not in _revisions:  # the text of a complete run may be gone
            return {}
        paths = _paths(self).items()
        return {name: _pinned[path].sha256[:12] for name, path in paths if path in _pinned}

    def require_unchanged(self, file: CorpusFile) -> None:
        """Check size and time of modification.

        Readers call this before and after they read a file: if it has changed in between, the
        content that was read may not be that of the revision.
        """
        path = self.path(file)
        now, pinned = stamp(path), _pinned.get(path)
        if now.size != file.size or (pinned and now[:2] != pinned.stamp[:2]):
            raise ValueError(f"{path} has changed since the run began: start the run again")


@lru_cache(maxsize=4)
def _paths(source: LocalSource) -> dict[str, Path]:
    """Return the files of a source without those that are left out.

    The result is cached, because a corpus may have thousands of files that are opened one by one.

    Raises:
        ValueError: no file is left, or as `find` does.
    """
    found = source.find()
    if source.apart is None:
        return found
    is_copy = _copies(_paths(source.apart).values())
    if rest := {name: path for name, path in found.items() if not is_copy(path)}:
        return rest
    raise ValueError(
        f"{source.title} are those of {source.apart.flag} or copies of them, so no text is left to "
        f"train on: name other text for validation, or drop {source.apart.flag} to hold out a "
        "fraction of the text"
    )


def _copies(files: Iterable[Path]) -> Callable[[Path], bool]:
    """Return a function that returns True for each of `files` and for files with equal content.

    It only reads files that have the same size as one of `files`.
    """
    given = list(files)
    resolved = {file.resolve() for file in given}
    sizes = {file.stat().st_size for file in given}

    @cache
    def digests(size: int) -> set[str]:
        return {artifacts.file_sha256(file) for file in given if file.stat().st_size == size}

    def is_copy(path: Path) -> bool:
        if path.resolve() in resolved:
            return True
        size = path.stat().st_size
        return size > 0 and size in sizes and artifacts.file_sha256(path) in digests(size)

    return is_copy


def _leads_to_itself(link: Path) -> bool:
    try:
        link.stat()
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


@dataclass(frozen=True)
class LocalFiles(LocalSource):
    """The user's own files."""

    patterns: tuple[str, ...]
    """Paths or globs."""

    flag: str = field(default="--data-path", compare=False)
    """The setting that named them."""

    apart: "LocalFiles | None" = None

    @property
    def title(self) -> str:
        return f"the files of {self.flag}"

    def find(self) -> dict[str, Path]:
        """The files sorted by name; names are relative to the common folder of all files.

        A link is used under its own name, because the hub's cache has links to files without a
        suffix. A file with several names is read once, under the first.

        Raises:
            ValueError: a pattern matches no file, a file's format is unknown, or a link is broken.
        """
        found: dict[Path, Path] = {}
        for pattern in self.patterns:
            found |= {Path(os.path.normpath(path)): path for path in self._matching(pattern)}
        first: dict[Path, Path] = {}
        for name in sorted(found):
            if not is_utf8(str(name)):
                encoded = os.fsencode(name)
                raise ValueError(f"{self.flag}: the name of {encoded!r} is not UTF-8: rename it")
            known = first.setdefault(found[name].resolve(), name)
            if self.format_of(str(known)) is not self.format_of(str(name)):
                raise ValueError(
                    f"{self.flag}: {known} and {name} are the same file, and their names are of "
                    "different kinds: give only one of them"
                )
        names = first.values()
        common = Path(os.path.commonpath([name.parent for name in names]))
        return dict(sorted((name.relative_to(common).as_posix(), found[name]) for name in names))

    def _matching(self, pattern: str) -> list[Path]:
        plain = Path(pattern).expanduser()
        matched = (
            [plain] if os.path.lexists(plain) else map(Path, glob.glob(str(plain), recursive=True))
        )
        paths = [path.absolute() for path in matched]
        for path in paths:
            if path.is_symlink() and _leads_to_itself(path):
                raise ValueError(
                    f"{self.flag}: {path} is a link that leads to itself: restore the file, or "
                    "remove the link"
                )
            if path.is_symlink() and not path.exists():
                raise ValueError(
                    f"{self.flag}: {path} is a link to {path.readlink()}, which does not exist: "
                    "restore the file, or remove the link"
                )
        if files := [path for path in paths if path.is_file()]:
            return files
        if special := [path for path in paths if path.exists() and not path.is_dir()]:
            raise ValueError(
                f"{self.flag}: {special[0]} is not a regular file, and a run reads its text more "
                "than once: write the text to a file"
            )
        if plain.is_dir():
            raise ValueError(f"{self.flag} {pattern} is a folder{_files_of(plain)}")
        raise ValueError(f"{self.flag} {pattern} matches no file in {Path.cwd()}")


def _files_of(folder: Path) -> str:
    """Return which pattern names the files of `folder` that can be read, for an error message."""
    ours = [name for path in folder.rglob("*") if is_known(name := path.name) and path.is_file()]
    if not ours:
        return f" without a file of a supported kind: {described()}"
    [(suffix, _)] = Counter(Path(name).suffix for name in ours).most_common(1)
    inner = "" if any(folder.glob(f"*{suffix}")) else "**"
    return f": name its files, as in '{Path(glob.escape(str(folder)), inner, f'*{suffix}')}'"


@dataclass(frozen=True)
class StandardLibrary(LocalSource):
    """The source files of Python's standard library, a text that every machine has."""

    has_columns = False
    skips_undecodable = True  # tests of the standard library contain files that are not UTF-8
    title = "the files of Python's standard library"

    apart: LocalFiles | None = None

    def find(self) -> dict[str, Path]:
        library = Path(sysconfig.get_path("stdlib"))
        found = ((path.relative_to(library).as_posix(), path) for path in _modules(library))
        # Sorted by a hash: files with similar names have similar content, and a short run should
        # see a mixture
        return dict(sorted(found, key=lambda item: hashlib.sha256(item[0].encode()).digest()))


def _modules(library: Path) -> Iterator[Path]:
    """Yield the Python files in `library` and its folders, except those of installed packages."""
    for folder, folders, files in os.walk(library):
        folders[:] = [name for name in folders if name not in ("site-packages", "dist-packages")]
        yield from (Path(folder, name) for name in files if name.endswith(".py"))
