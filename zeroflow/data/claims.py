"""Claims of processes, on any machines, on the parts that each of them builds.

A claim is a file in a folder that all share, `.part-00007.claim-1`. Creating it is exclusive. Its
holder keeps counting in it; if the count stands still for `LEASE_SECONDS`, by the clock of who
looks, the holder is taken for dead, and who creates `.part-00007.claim-2` first takes over. Claims
only avoid double work. A holder that was merely slow may finish too: parts are the same whoever
builds them, and the first one that is complete stays.

No lock of the kernel is needed, which not every shared file system has, and no common clock.
"""

import logging
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import NamedTuple

from zeroflow import artifacts

log = logging.getLogger(__name__)

LEASE_SECONDS = 60.0
BEAT_SECONDS = 5.0


class _Seen(NamedTuple):
    """The claims on a part, and since when they look like this."""

    claims: list[bytes]
    since: float


class Claim:
    """A claim that this process holds."""

    def __init__(self, path: Path, generation: int, handle: int) -> None:
        self.path, self.generation, self._handle = path, generation, handle
        self.mark = secrets.token_hex(4)
        """Part of the name of the directory in which the holder writes."""

        self._beats = 0
        self.beat()

    def beat(self) -> None:
        """Show that the holder is alive."""
        content = f"{self._beats:012d} {socket.gethostname()} {self.mark}\n".encode()
        self._beats += 1
        os.pwrite(self._handle, content, 0)
        os.fsync(self._handle)

    @property
    def is_lost(self) -> bool:
        """True if another process has taken over."""
        return _file(self.path, self.generation + 1).exists()

    def release(self) -> None:
        os.close(self._handle)
        if self.is_lost:
            return
        for generation in range(1, self.generation + 1):
            _file(self.path, generation).unlink(missing_ok=True)


class Claims:
    """The claims of this process. A thread keeps them alive until the block ends."""

    def __init__(self) -> None:
        self._seen: dict[Path, _Seen] = {}
        self._held: set[Claim] = set()
        self._lock, self._end = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="claims", daemon=True)

    def take(self, path: Path) -> Claim | None:
        """Claim `path`; None while another process holds it, or if it exists."""
        earlier = list(_generations(path))
        if path.exists() or not self._is_free(path, earlier):
            return None
        generation = len(earlier) + 1
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            handle = os.open(_file(path, generation), flags, 0o666)
        except FileExistsError:
            return None
        for content in earlier:
            _, host, mark = content.decode(errors="replace").split()
            log.warning("%s is taken over: its build on %s has stopped", path.name, host)
            shutil.rmtree(artifacts.partial_path(path, mark), ignore_errors=True)
        claim = Claim(path, generation, handle)
        with self._lock:
            self._held.add(claim)
        if path.exists():  # completed, and its claim removed, since it was looked for
            self.release(claim)
            return None
        return claim

    def release(self, claim: Claim) -> None:
        with self._lock:
            if claim in self._held:
                self._held.remove(claim)
                claim.release()

    def _is_free(self, path: Path, claims: list[bytes]) -> bool:
        """True if there are no `claims`, or the newest has not changed for the time of a lease."""
        if not claims:
            self._seen.pop(path, None)
            return True
        now, seen = time.monotonic(), self._seen.get(path)
        if seen is None or seen.claims != claims:
            self._seen[path] = _Seen(claims, now)
            return False
        return now - seen.since > LEASE_SECONDS

    def _keep_alive(self) -> None:
        while not self._end.wait(BEAT_SECONDS):
            with self._lock:
                for claim in self._held:
                    with suppress(OSError):  # the build fails too, or others take over
                        claim.beat()

    def __enter__(self) -> "Claims":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        for claim in list(self._held):
            self.release(claim)


def _generations(path: Path) -> Iterator[bytes]:
    """The contents of the claims on `path`, oldest first.

    Files are opened: what NFS remembers of files that are not may be a minute old.
    """
    with suppress(FileNotFoundError):
        for generation in count(1):
            yield _file(path, generation).read_bytes()


def _file(path: Path, generation: int) -> Path:
    return path.with_name(f".{path.name}.claim-{generation}")
