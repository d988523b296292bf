"""Claims: each part is built by one process, on any of several machines.

A claim is a file in the shared folder, `.part-00007.claim-1`, which only one process can create.
The holder increments a counter in it. If the counter has not changed for `LEASE_SECONDS`, measured
by the clock of the process that reads it, the holder counts as dead. The first process that creates
`.part-00007.claim-2` then takes over.

Claims only avoid double work. If a holder was slow and not dead, it may also finish: the part has
the same content whoever builds it, and the first complete one is kept.

Claims need neither file locks, which some shared file systems do not have, nor a common clock.
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
"""Time without a change of the counter after which a claim may be taken over. It is longer than a
network file system takes to show a change."""

BEAT_SECONDS = 5.0
"""Time between two increments of the counter."""


class _Seen(NamedTuple):
    """The contents of the claims on a part, and the time when they were first seen."""

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
        """Increment the counter, to show that the holder is alive."""
        content = f"{self._beats:012d} {socket.gethostname()} {self.mark}\n".encode()
        self._beats += 1
        os.pwrite(self._handle, content, 0)
        os.fsync(self._handle)

    @property
    def is_lost(self) -> bool:
        """True if another process has taken over the part."""
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
        """Claim `path`. Return None if it exists or another process holds a claim on it."""
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
            match content.decode(errors="replace").split():
                case [_, host, mark]:
                    log.warning("taking over %s: its build on %s has stopped", path.name, host)
                    shutil.rmtree(artifacts.partial_path(path, mark), ignore_errors=True)
                case _:  # its holder ended before it wrote anything
                    log.warning("taking over %s: its build was not started", path.name)
        claim = Claim(path, generation, handle)
        with self._lock:
            self._held.add(claim)
        if path.exists():  # another process has completed it since the first check
            self.release(claim)
            return None
        return claim

    def release(self, claim: Claim) -> None:
        with self._lock:
            if claim in self._held:
                self._held.remove(claim)
                claim.release()

    def _is_free(self, path: Path, claims: list[bytes]) -> bool:
        """Return True if there are no `claims`, or they have not changed for `LEASE_SECONDS`."""
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
                    with suppress(OSError):  # then the build also fails, or others take over
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
    """Return the contents of the claims on `path`, oldest first.

    The files are opened, because NFS may show the state of an unopened file a minute late.
    """
    with suppress(FileNotFoundError):
        for generation in count(1):
            yield _file(path, generation).read_bytes()


def _file(path: Path, generation: int) -> Path:
    return path.with_name(f".{path.name}.claim-{generation}")
