"""A slow network between the ranks of one machine: network namespaces joined by shaped links.

Every rank has a namespace with one interface, whose other end is a port of a bridge. `tc` limits
what the rank sends. Inside this program only the ranks are in the namespaces; they meet in a file,
so no port is needed. Linux only.
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from zeroflow.config import Config

INTERFACE = "link0"
"""Name of the interface in every namespace."""

_NAMESPACES = Path("/run/netns")
_CLONE_NEWNET = 0x40000000

_PACKET_BYTES = 2**14
"""Largest packet. Linux would send up to 64 KiB at once, which is a long burst on a slow link."""

_BURST_SECONDS = 0.0025
"""After a pause, a link sends the bytes of this time at once. A step has many pauses, so a larger
burst would let many bytes pass without a limit. With a smaller one, the link would be idle if a
busy core is late in sending."""

_BURST_BYTES = (2 * _PACKET_BYTES, 2**17)
"""Smallest and largest burst."""

HEADERS = 1514 / 1448
"""Bytes on the link for each byte of data: an Ethernet frame carries 1,448 bytes over TCP."""

_CONGESTION_CONTROL = Path("/proc/sys/net/ipv4/tcp_congestion_control")
"""That of the namespace of the process that writes it."""


class Network(Config):
    """Namespaces of the ranks, in their order."""

    namespaces: tuple[str, ...]


@contextmanager
def network(ranks: int) -> Iterator[Network]:
    """Create a namespace for every rank, all joined by a bridge, until the block ends.

    Raises:
        ValueError: this process may not create namespaces, or the tools are missing.
    """
    require_tools()
    switch = f"zf{os.getpid()}s"
    names = tuple(f"zf{os.getpid()}r{rank}" for rank in range(ranks))
    created: list[str] = []
    try:
        for name in (switch, *names):
            _ip("netns", "add", name)
            created.append(name)
        _ip("-n", switch, "link", "add", "bridge0", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge0", "up")
        for rank, name in enumerate(names):
            _connect(name, rank, switch)
        yield Network(namespaces=names)
    finally:
        for name in created:  # their interfaces go with them
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def _connect(name: str, rank: int, switch: str) -> None:
    port = f"port{rank}"
    peer = ("peer", "name", port, "netns", switch)
    _ip("-n", name, "link", "add", INTERFACE, "type", "veth", *peer)
    _ip("-n", name, "address", "add", f"10.78.0.{rank + 1}/24", "dev", INTERFACE)
    _ip("-n", name, "link", "set", INTERFACE, "gso_max_size", str(_PACKET_BYTES))
    for device in ("lo", INTERFACE):
        _ip("-n", name, "link", "set", device, "up")
    _ip("-n", switch, "link", "set", port, "master", "bridge0", "up")


def require_tools() -> None:
    """
    Raises:
        ValueError: this process may not create network namespaces, or the tools are missing.
    """
    needed = (
        "--bandwidth-gbps limits the links between ranks with `tc` in network namespaces, which"
    )
    missing = [tool for tool in ("ip", "tc") if not shutil.which(tool)]
    if missing:
        raise ValueError(
            f"{needed} needs {' and '.join(missing)} of iproute2: install it, or drop the setting"
        )
    if os.geteuid():
        raise ValueError(f"{needed} needs root: run the command as root, or drop the setting")


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(
            "network namespaces for --bandwidth-gbps cannot be created here: `ip "
            f"{' '.join(words)}` failed with {done.stderr.strip()}"
        )


def enter(network: Network, rank: int) -> None:
    """Move this process into the namespace of its rank, before it opens a connection."""
    libc = ctypes.CDLL(None, use_errno=True)
    with (_NAMESPACES / network.namespaces[rank]).open("rb") as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), file.name)
    # BBR, the default of some systems, stops for 0.2 s every 10 s to measure an empty link
    with suppress(OSError):  # some containers cannot change settings of the kernel
        _CONGESTION_CONTROL.write_text("reno", encoding="ascii")
    os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE


def limit(gbps: float | None) -> None:
    """Limit what this process's rank sends, in 10⁹ bits per second; None for no limit.

    Raises:
        RuntimeError: the kernel cannot limit it.
    """
    subprocess.run(["tc", "qdisc", "delete", "dev", INTERFACE, "root"], capture_output=True)
    if gbps is None:
        return
    smallest, largest = _BURST_BYTES
    burst = min(max(round(gbps * 1e9 / 8 * _BURST_SECONDS), smallest), largest)
    rate = ("rate", f"{round(gbps * 1e6)}kbit", "burst", str(burst), "latency", "1s")
    words = ["tc", "qdisc", "add", "dev", INTERFACE, "root", "tbf", *rate]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(words)}` failed: {done.stderr.strip()}")


def sent_bytes() -> int:
    """Return the bytes that this process's rank has sent, with the headers of packets.

    /sys shows the interfaces of the namespace in which it was mounted, /proc those of the reader.
    """
    for line in Path("/proc/thread-self/net/dev").read_text(encoding="utf-8").splitlines():
        name, _, fields = line.partition(":")
        if name.strip() == INTERFACE:
            return int(fields.split()[8])
    raise RuntimeError(f"{INTERFACE} is not in this namespace")
