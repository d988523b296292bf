"""The Prefect server of a run: an existing server, or one that is started for the run."""

import logging
import os
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from pathlib import Path

from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_API_URL, temporary_settings

from zeroflow.orchestration.programs import Program

log = logging.getLogger(__name__)

USUAL_PORT = 4200

START_SECONDS = 120.0

STOP_SECONDS = 20.0


@contextmanager
def server() -> Iterator[str]:
    """Use the server at PREFECT_API_URL, or one on this machine, or start one for the block.

    A server on this machine is expected at the usual port. The server of a run listens on another
    port, so that no other run can depend on it. Prefect's own temporary server is not used: it
    loses records of short tasks, hangs on Ctrl-C and keeps running after a killed flow.

    Yields:
        The address of its user interface.

    Raises:
        RuntimeError: the server at PREFECT_API_URL, or the started one, does not answer.
    """
    if url := api_in_use():
        with temporary_settings({PREFECT_API_URL: url}):
            yield ui_address(url)
        return
    port = _free_port()
    url = local_api(port)
    with _started(port, url), temporary_settings({PREFECT_API_URL: url}):
        yield ui_address(url)


def start_server(port: int, log_file: Path | None = None) -> Program:
    """Start a Prefect server on this machine's loopback."""
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1"]
    environment = os.environ | {
        "PREFECT_SERVER_API_PORT": str(port),  # where the UI looks for its server
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    return Program(
        "Prefect's server",
        [*command, "--port", str(port)],
        environment=environment,
        log=log_file,
    )


def api_in_use(port: int = USUAL_PORT) -> str | None:
    """Return the API of the server at PREFECT_API_URL, or of one on this machine, or None.

    Raises:
        RuntimeError: the server at PREFECT_API_URL does not answer.
    """
    if url := PREFECT_API_URL.value():
        if not answers(url):
            raise RuntimeError(
                f"no server answers at PREFECT_API_URL {url}: start that server, or unset the "
                "variable to let the run start its own server"
            )
        return url
    url = local_api(port)
    return url if answers(url) else None


def local_api(port: int) -> str:
    return f"http://127.0.0.1:{port}/api"


def ui_address(api_url: str) -> str:
    return api_url.removesuffix("/").removesuffix("/api")


def answers(api_url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{api_url.rstrip('/')}/health", timeout=5):
            return True
    except urllib.error.HTTPError as error:
        return error.code != HTTPStatus.NOT_FOUND  # it may require authentication
    except (OSError, ValueError):
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _started(port: int, url: str) -> Iterator[None]:
    log.info("starting a Prefect server for this run on port %d", port)
    server = start_server(port)
    try:
        _wait_for(server, url)
        yield
    finally:
        # Deliver queued events now: after the server has stopped, Prefect would retry for a minute
        EventsWorker.drain_all()
        APILogWorker.drain_all()
        if not server.stop(STOP_SECONDS):
            log.warning("the Prefect server did not stop in %d s", STOP_SECONDS)


def _wait_for(server: Program, url: str) -> None:
    try:
        server.wait_until(partial(answers, url), START_SECONDS)
    except RuntimeError as error:
        error.add_note("to use another server, set PREFECT_API_URL")
        raise
