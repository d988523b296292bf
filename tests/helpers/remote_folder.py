"""A folder of the first of two hosts that the second reaches over the network, with sshfs.

Unlike on one machine, the second host has its own cache of file contents and attributes, and file
locks of one host are not seen by the other.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from patience import wait_until
from two_hosts import Host, run

_PORT = "2222"


class RemoteHost(Host):
    """The second host, with a mount namespace of its own."""

    def __init__(self, host: Host, holder: int) -> None:
        self.__dict__.update(host.__dict__)
        self._holder = holder

    @property
    def _mounts(self) -> list[str]:
        return ["nsenter", f"--mount=/proc/{self._holder}/ns/mnt"]

    @property
    def prefix(self) -> list[str]:
        return [*self._mounts, *super().prefix]

    def mount(self, folder: Path, of: Host, key: Path) -> None:
        options = (
            f"IdentityFile={key},StrictHostKeyChecking=no,UserKnownHostsFile=/dev/null,"
            f"port={_PORT},reconnect"
        )
        network = f"--net=/run/netns/{self.space}"
        where = f"{of.address}:{folder}"
        run(*self._mounts, "nsenter", network, "sshfs", "-o", options, where, str(folder))


@contextmanager
def remote_folder(folder: Path, keys: Path, hosts: tuple[Host, Host]) -> Iterator[RemoteHost]:
    """Let the second host reach `folder` over the network until the block ends.

    Args:
        keys: an empty folder.
    """
    if not all(shutil.which(tool) for tool in ("sshfs", "/usr/sbin/sshd", "nsenter")):
        pytest.skip("needs sshfs and OpenSSH's server")
    first, second = hosts
    key, host_key = keys / "key", keys / "host_key"
    for file in (key, host_key):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(file))
    Path("/run/sshd").mkdir(exist_ok=True)
    settings = {
        "Port": _PORT,
        "HostKey": host_key,
        "AuthorizedKeysFile": key.with_suffix(".pub"),
        "StrictModes": "no",
        "PidFile": "none",
        "Subsystem": "sftp internal-sftp",
    }
    options = [f"-o{name}={value}" for name, value in settings.items()]
    inside = ["ip", "netns", "exec", first.space]
    server = subprocess.Popen([*inside, "/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null", *options])
    holder = subprocess.Popen(["unshare", "--mount", "--propagation", "private", "sleep", "inf"])
    mine, its = (Path(f"/proc/{pid}/ns/mnt") for pid in (os.getpid(), holder.pid))
    try:
        wait_until(lambda: its.readlink() != mine.readlink(), "the mount namespace")
        remote = RemoteHost(second, holder.pid)
        wait_until(lambda: _mounted(remote, folder, first, key), "the server")
        yield remote
    finally:
        for process in (holder, server):
            process.send_signal(signal.SIGKILL)
            process.wait()


def _mounted(remote: RemoteHost, folder: Path, first: Host, key: Path) -> bool:
    try:
        remote.mount(folder, first, key)
    except subprocess.CalledProcessError:
        return False
    return True
