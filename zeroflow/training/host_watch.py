"""What a rank needs where several machines train together.

A rank would wait forever for a machine that has lost its power or its network: no connection is
closed, and collectives have a timeout of hours. A rank also outlives a killed torchrun. A thread
watches for both, and ends the rank, so that torchrun restarts the ranks of all machines that are
there.
"""

import logging
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from zeroflow.run_folder import RunFolder

log = logging.getLogger(__name__)

_BEAT_SECONDS = 2.0

SILENT_SECONDS = 30.0
"""Time without a sign of life after which a machine is considered gone. A shared file system may
show a change some seconds late."""

_NO_HOST = "192.0.2.1"
"""An address for documentation, RFC 5737; the way to it is the default route."""


def log_to_file(folder: RunFolder, rank: int) -> None:
    """Write all output of this process also to the rank's file in the run's folder."""
    folder.logs.mkdir(exist_ok=True)
    file = folder.logs / f"{socket.gethostname()}-rank-{rank}.log"
    # A process, because libraries write to the descriptor; it ends with this one, after its output
    command = ["tee", "--append", "--ignore-interrupts", str(file)]
    tee = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    assert tee.stdin is not None
    os.dup2(tee.stdin.fileno(), 1)
    os.dup2(tee.stdin.fileno(), 2)
    tee.stdin.close()


def choose_interface() -> None:
    """Make Gloo listen where other machines reach this one.

    By default it listens at the address of this machine's name, which on many is a loopback.
    """
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        for address in (os.environ.get("MASTER_ADDR", _NO_HOST), _NO_HOST):
            if (name := interface_to(address)) is not None:
                os.environ["GLOO_SOCKET_IFNAME"] = name
                return


def interface_to(address: str) -> str | None:
    """Return the network interface that leads to `address`; None for none and for the loopback."""
    with suppress(OSError):
        family, _, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing
            own = probe.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            if any(found.address.partition("%")[0] == own for found in addresses):
                return None if own.startswith("127.") or own == "::1" else name
    return None


def wait_for_job(folder: RunFolder) -> None:
    """Wait until the run's command has answered the last failure with a new job."""
    if folder.pause.exists():
        log.info("waiting for the run's command, which ended after a failure")
        while folder.pause.exists():
            time.sleep(1)


def watch(folder: RunFolder, end: Callable[[str], None]) -> None:
    """Start the thread that calls `end` with the reason when this rank has to end."""
    threading.Thread(target=_watch, args=(folder, end), daemon=True).start()


def _watch(folder: RunFolder, end: Callable[[str], None]) -> None:
    parent = os.getppid()
    neighbours = Neighbours.of_this_rank(folder)
    while True:
        time.sleep(_BEAT_SECONDS)
        if os.getppid() != parent:
            end(f"torchrun on {socket.gethostname()} has ended")
        if folder.pause.exists():
            end("the run's command ends the ranks after a failure")
        if neighbours and (silent := neighbours.silent()):
            end(f"no sign of life from {silent[0]} for {SILENT_SECONDS:.0f} s")


class Neighbours:
    """Signs of life of the machines of a training: each adds to a counter in a file of its own.

    Times are measured by the clock of this machine. A neighbour counts from its first sign on.
    """

    def __init__(self, folder: RunFolder, machine: int, machines: int) -> None:
        folder.beats.mkdir(exist_ok=True)
        self._own = folder.beats / str(machine)
        others = (folder.beats / str(n) for n in range(machines) if n != machine)
        self._seen = {file: (_content(file), 0.0) for file in others}
        self._beat = 0

    @classmethod
    def of_this_rank(cls, folder: RunFolder) -> "Neighbours | None":
        """Return the neighbours that this rank watches: the first of each machine watches all."""
        place = os.environ
        if place.get("LOCAL_RANK") != "0":
            return None
        machine = int(place.get("GROUP_RANK", place.get("SLURM_NODEID", "0")))
        machines = int(place.get("GROUP_WORLD_SIZE", place.get("SLURM_STEP_NUM_NODES", "1")))
        return cls(folder, machine, machines)

    def silent(self) -> list[str]:
        """Give a sign of life; return the names of machines whose last one is too long ago."""
        self._beat += 1
        self._own.write_text(f"{socket.gethostname()} {os.getpid()} {self._beat}", encoding="utf-8")
        now = time.monotonic()
        for file, (before, _) in self._seen.items():
            content = _content(file)  # opening a file makes NFS ask its server
            if content not in ("", before):  # empty while it is written
                self._seen[file] = (content, now)
        signs = self._seen.values()
        return [said.split()[0] for said, at in signs if at and now - at > SILENT_SECONDS]


def _content(file: Path) -> str:
    with suppress(OSError):
        return file.read_text(encoding="utf-8")
    return ""
