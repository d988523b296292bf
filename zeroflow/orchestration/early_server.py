"""Starts a run's Prefect server while the command imports its libraries, which takes seconds.

This module does not import Prefect. The process of the server does, and finds out whether another
server is in use; see `server.main`.
"""

import atexit
import os
import secrets
import socket
import sys
from contextlib import suppress
from typing import NamedTuple

from zeroflow.orchestration.programs import Program
from zeroflow.training import interpreter

USUAL_PORT = 4200
"""Prefect's default port."""

LOGIN = "ZEROFLOW_SERVER_LOGIN"
"""Environment variable with the login of the server, unless the user has chosen one."""


class EarlyServer(NamedTuple):
    """A server that is starting. It ends by itself if another server turns out to be in use."""

    program: Program
    port: int
    login: str


_started: list[EarlyServer] = []
"""The server of `start`, until it is taken."""


def start() -> None:
    """Start the server that `server.server` would start.

    A server that is not taken ends with this process.
    """
    if os.environ.get("PREFECT_API_URL") or _listens(USUAL_PORT):
        return  # that server is probably used
    port, login = free_port(), random_login()
    program = Program(
        "Prefect's server",
        [sys.executable, "-m", interpreter.__name__, "zeroflow.orchestration.server", str(port)],
        environment=os.environ | {LOGIN: login},
        umask=0o077,  # its database may hold secrets
    )
    _started.append(EarlyServer(program, port, login))
    atexit.register(end_unused)


def take() -> EarlyServer | None:
    """Return the server that was started, if it runs."""
    early = _started.pop() if _started else None
    return early if early and early.program.running else None


def end_unused() -> None:
    """End the server that was started. Nothing is lost, because no client knows it."""
    while _started:
        _started.pop().program.stop(0)


def random_login() -> str:
    return f"zeroflow:{secrets.token_urlsafe(24)}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    """Return True if a program on this machine listens on `port`."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
