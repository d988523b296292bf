"""Network, logs and watch of the ranks on several machines.

If a machine loses its power or its network, no connection is closed, and collectives have a timeout
of hours, so its peers would wait for it. A rank also outlives a killed torchrun. A thread detects
both and ends the rank, so that torchrun restarts the ranks of all machines that are available.
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
"""Time between two signs of life."""

SILENT_SECONDS = 30.0
"""Time without a sign of life after which a machine counts as failed. A shared file system may show
a change some seconds late."""

_NO_HOST = "192.0.2.1"
"""An address that RFC 5737 reserves for documentation, so the default route leads to it."""


def log_to_file(folder: RunFolder, rank: int) -> None:
    """Write all output of this process also to the rank's file in the run's folder."""
    folder.logs.mkdir(exist_ok=True)
    file = folder.logs / f"{socket.gethostname()}-rank-{rank}.log"
    # A separate process, because libraries write directly to the file descriptor. It ignores
    # signals that a scheduler sends to all processes, and so ends after the last output
    command = 'trap "" HUP INT TERM; exec tee -a "$1"'
    words = ["sh", "-c", command, "tee", str(file)]
    tee = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=2)  # standard error, as the log
    assert tee.stdin is not None
    os.dup2(tee.stdin.fileno(), 1)
    os.dup2(tee.stdin.fileno(), 2)
    tee.stdin.close()


def choose_interface() -> None:
    """Make Gloo listen on the network interface that other machines can reach.

    By default it listens on the address of this machine's name, which is often a loopback address.
    """
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        for address in (os.environ.get("MASTER_ADDR", _NO_HOST), _NO_HOST):
            if (name := interface_to(address)) is not None:
                os.environ["GLOO_SOCKET_IFNAME"] = name
                return


def interface_to(address: str) -> str | None:
    """Return the network interface that leads to `address`; None if there is none but loopback."""
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
    """Wait until the run's command has written a new job after a failure."""
    if folder.pause.exists():
        log.info("waiting until the command of the run has written a new job after a failure")
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
            end(f"no heartbeat from {silent[0]} for {SILENT_SECONDS:.0f} s")


class Neighbours:
    """Signs of life of the machines of a run: each increments a counter in a separate file.

    Times are measured by the clock of this machine. A machine is watched from its first sign of
    life.
    """

    def __init__(self, folder: RunFolder, machine: int, machines: int) -> None:
        folder.beats.mkdir(exist_ok=True)
        self._own = folder.beats / str(machine)
        others = (folder.beats / str(n) for n in range(machines) if n != machine)
        self._seen = {file: (_content(file), 0.0) for file in others}
        self._beat = 0

    @classmethod
    def of_this_rank(cls, folder: RunFolder) -> "Neighbours | None":
        """Return the neighbours to watch; None if this is not the first rank of its machine."""
        place = os.environ
        if place.get("LOCAL_RANK") != "0":
            return None
        machine = int(place.get("GROUP_RANK", place.get("SLURM_NODEID", "0")))
        machines = int(place.get("GROUP_WORLD_SIZE", place.get("SLURM_STEP_NUM_NODES", "1")))
        return cls(folder, machine, machines)

    def silent(self) -> list[str]:
        """Give a sign of life, and return the names of the machines that have stopped doing so."""
        self._beat += 1
        sign = f"{socket.gethostname()} {os.getpid()} {self._beat}"
        with suppress(OSError):  # a network file system may fail temporarily
            self._own.write_text(sign, encoding="utf-8")
        now = time.monotonic()
        for file, (before, _) in self._seen.items():
            content = _content(file)  # NFS shows changes of a file only when it is opened again
            if content not in ("", before):  # empty while it is written
                self._seen[file] = (content, now)
        signs = self._seen.values()
        return [said.split()[0] for said, at in signs if at and now - at > SILENT_SECONDS]


def _content(file: Path) -> str:
    with suppress(OSError):
        return file.read_text(encoding="utf-8")
    return ""
