"""Copies of the files of a shard set on a disk of this machine, made at the first read."""

import logging
import shutil
from pathlib import Path

from zeroflow import artifacts

log = logging.getLogger(__name__)

_KEPT_FREE = 0.05
"""Fraction of the disk that copies leave free."""


class LocalCopies:
    """Copies of the files of `folder`, in a folder of the same name in `local`.

    All ranks of the machine share the copies. Only one rank copies at a time, and each file once.
    Meanwhile the others read the original, so no rank waits for another.
    """

    def __init__(self, folder: Path, local: Path) -> None:
        self._folder, self._copies = folder, local / folder.name
        self._is_full = False

    def of(self, file: Path) -> Path:
        """Return the copy of `file`; `file` itself if there is none and it cannot be made now."""
        copy = self._copies / file.relative_to(self._folder)
        if _is_copy(copy, file):
            return copy
        if self._is_full:
            return file
        try:
            with artifacts.exclusive(self._copies / "copying", waiting_for=None):
                if _is_copy(copy, file) or self._copy(file, copy):
                    return copy
        except BlockingIOError:
            pass  # another rank is copying
        except OSError as error:
            self._give_up(artifacts.explained(error))
        return file

    def _copy(self, file: Path, copy: Path) -> bool:
        disk = shutil.disk_usage(self._copies)
        if disk.free - file.stat().st_size < _KEPT_FREE * disk.total:
            self._give_up("its disk is nearly full")
            return False
        copy.parent.mkdir(parents=True, exist_ok=True)
        partial = copy.with_name(f".{copy.name}.partial")
        shutil.copy2(file, partial)
        partial.replace(copy)
        return True

    def _give_up(self, why: str) -> None:
        log.warning("no more shards are copied to %s: %s", self._copies, why)
        self._is_full = True


def _is_copy(copy: Path, file: Path) -> bool:
    """Return True if `copy` exists and `file` has not been rebuilt since."""
    try:
        there, here = file.stat(), copy.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return (there.st_size, there.st_mtime_ns) == (here.st_size, here.st_mtime_ns)
