"""Two "hosts" on this machine: network namespaces with names, joined by a cable of their own."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

NAMES = ("first", "second")
_NETNS = Path("/etc/netns")


def run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)


class Host:
    """A host: its loopback, its address and the table of names are its own."""

    def __init__(self, number: int) -> None:
        self.name = NAMES[number]
        self.space = f"zf{os.getpid()}{number}"
        self.cable = f"zf{os.getpid() % 10**6}-{number}"
        self.address = f"10.77.{os.getpid() % 250}.{number + 1}"

    @property
    def prefix(self) -> list[str]:
        """Words before a command that runs on the host."""
        named = f'hostname {self.name} && exec "$@"'
        return ["ip", "netns", "exec", self.space, "unshare", "--uts", "sh", "-c", named, "sh"]

    def create(self, others: list["Host"]) -> None:
        # As Debian does: the own name is at a loopback
        names = [f"127.0.1.1 {self.name}", *(f"{o.address} {o.name}" for o in others)]
        folder = _NETNS / self.space
        folder.mkdir(parents=True)
        (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
        run("ip", "netns", "add", self.space)

    def connect(self) -> None:
        inside = ("ip", "-n", self.space)
        run("ip", "link", "set", self.cable, "netns", self.space)
        run(*inside, "address", "add", f"{self.address}/24", "dev", self.cable)
        for device in ("lo", self.cable):
            run(*inside, "link", "set", device, "up")
        run(*inside, "route", "add", "default", "dev", self.cable)

    def pull_cable(self) -> None:
        """Lose the network without closing any connection, as at a loss of power."""
        run("ip", "-n", self.space, "link", "set", self.cable, "down")

    def remove(self) -> None:
        pids = ["ip", "netns", "pids", self.space]  # also of daemons without a parent
        for pid in subprocess.run(pids, capture_output=True, text=True).stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        subprocess.run(["ip", "netns", "delete", self.space], capture_output=True)
        shutil.rmtree(_NETNS / self.space, ignore_errors=True)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Create two hosts until the block ends, or skip the test where that is not allowed."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    hosts = Host(0), Host(1)
    try:
        try:
            for host in hosts:
                host.create([other for other in hosts if other is not host])
            run("ip", "link", "add", hosts[0].cable, "type", "veth", "peer", hosts[1].cable)
            for host in hosts:
                host.connect()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr}")
        yield hosts
    finally:
        for host in hosts:
            host.remove()
