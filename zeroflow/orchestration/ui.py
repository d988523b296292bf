"""Starts and stops the servers of Prefect and MLflow and a worker together."""

import logging
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from zeroflow import artifacts
from zeroflow.config import Config
from zeroflow.orchestration.early_server import USUAL_PORT
from zeroflow.orchestration.programs import Program
from zeroflow.run_folder import DEFAULT_CACHE, Cache
from zeroflow.tracking import loopback
from zeroflow.tracking.config import PORT, is_server, location
from zeroflow.tracking.viewer import Viewer, viewer

log = logging.getLogger(__name__)

_START_SECONDS = 120.0
"""Maximum time for MLflow's server to answer after its start."""

_STOP_SECONDS = 10.0
"""Time for MLflow's server to end before it is killed."""

_POLL_SECONDS = 0.5


class UiConfig(Config):
    """User interfaces. Both servers listen on the loopback interface only."""

    prefect_port: int = Field(USUAL_PORT, ge=1, le=65535)
    """Port of Prefect's server. If a server already runs there or at PREFECT_API_URL, it is used,
    and keeps running afterwards."""

    mlflow_port: int = Field(PORT, ge=1, le=65535)
    """Port of MLflow's server."""

    cache_dir: Path = DEFAULT_CACHE
    """Cache folder: MLflow shows its runs, and runs started from a form write to it unless the form
    names another. The servers' logs are in its ui/ folder."""

    @model_validator(mode="after")
    def _has_two_ports(self) -> Self:
        if self.prefect_port == self.mlflow_port:
            raise ValueError(
                f"both servers cannot listen on port {self.mlflow_port}: give --prefect-port and "
                "--mlflow-port different values"
            )
        return self


def serve(config: UiConfig) -> None:
    """Run both servers until one of them ends or this process is interrupted.

    Raises:
        ValueError: a port is taken, or another process runs a server for the same database.
        RuntimeError: a program ended or did not start, and the message has its last lines; or the
            store at MLFLOW_TRACKING_URI cannot be opened.
    """
    from zeroflow.orchestration.worker import Prefect  # slow to import

    logs = Cache(config.cache_dir).logs
    logs.mkdir(parents=True, exist_ok=True)
    prefect = Prefect(config.prefect_port, config.cache_dir, logs)
    if prefect.to_be_started:
        _require_free(config.prefect_port, "--prefect-port")
    if not is_server(location(config.cache_dir)[0]):
        _require_free(config.mlflow_port, "--mlflow-port")
    log.info("starting the servers; their logs are in %s", logs)
    mlflow = viewer(config.cache_dir, config.mlflow_port)
    with ExitStack() as ends:
        if prefect.to_be_started:
            ends.enter_context(_only_one())
        ends.callback(prefect.stop)
        prefect.start_server()
        programs = ends.enter_context(_shown(mlflow, logs))
        prefect.start_worker()
        log.info("Prefect UI        %s/deployments", prefect.api.page)
        if prefect.api.login:
            log.info("  its login       %s", prefect.api.shown_login)
        log.info("MLflow UI         %s", mlflow.runs)
        if mlflow.command:
            log.info("  it answers to   %s, without a login", mlflow.hosts)
        log.info("loss of all runs  %s", mlflow.charts)
        if prefect.to_be_started and config.prefect_port != USUAL_PORT:
            log.info("for runs from a shell, set PREFECT_API_URL=%s", prefect.api.url)
        log.info("Ctrl-C stops everything; a run in progress writes a checkpoint first")
        while True:
            prefect.require_running()
            prefect.explain_states()
            for program in programs:
                program.require_running()
            time.sleep(_POLL_SECONDS)


@contextmanager
def _only_one() -> Iterator[None]:
    """Refuse a second server with a worker for the same database of Prefect.

    The worker of one server would take runs of the other's forms, and these could not be
    cancelled: a server notifies only its own worker.

    Raises:
        ValueError: there is another one.
    """
    from prefect.settings import PREFECT_HOME  # slow to import

    home = Path(PREFECT_HOME.value())
    with ExitStack() as held:
        try:
            held.enter_context(artifacts.exclusive(home / "zeroflow" / "ui", waiting_for=None))
        except BlockingIOError as error:
            raise ValueError(
                f"another `zeroflow ui` with PREFECT_HOME {home} is running: use its pages, whose "
                "forms take any cache folder; stop it; or set another PREFECT_HOME for this one"
            ) from error
        yield


@contextmanager
def _shown(viewer: Viewer, logs: Path) -> Iterator[list[Program]]:
    """Run MLflow's server within the block, unless it runs elsewhere."""
    if viewer.command is None or viewer.environment is None:
        yield []
        return
    program = Program(
        "MLflow's server",
        viewer.command,
        environment=viewer.environment,
        log=logs / "mlflow.log",
    )
    try:
        program.wait_until(lambda: _answers(viewer.address), _START_SECONDS)
        yield [program]
    finally:
        program.stop(_STOP_SECONDS)


def _require_free(port: int, flag: str) -> None:
    try:
        with socket.create_server(("127.0.0.1", port)):
            pass
    except OSError as error:
        raise ValueError(
            f"port {port} is taken ({error.strerror}): stop the program that listens there, or set "
            f"another {flag}"
        ) from error


def _answers(address: str) -> bool:
    try:
        with loopback.open_url(f"{address}/health", timeout=5):
            return True
    except OSError:
        return False
