"""What knows Prefect besides flows/: the server, log delivery, retry reasons, artifacts."""

import base64
import logging
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from prefect import runtime
from prefect.artifacts import create_markdown_artifact
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogHandler, APILogWorker, PrefectConsoleHandler
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, State
from prefect.task_runners import TaskRunner
from prefect.tasks import Task

from zeroflow.data.hub import HubError
from zeroflow.data.parts import BuiltPart, PartJob
from zeroflow.data.shards import RunParts, in_threads, outcome
from zeroflow.run import BuildChoice
from zeroflow.training.job import TrainingFailed

log = logging.getLogger(__name__)

_USUAL_PORT = 4200
_START_SECONDS = 120.0
_STOP_SECONDS = 10.0

# The shell outlives its parent by no more than it takes to stop the server: the end of its input
# is the end of the flow, however that came about.
_KEEPER = '"$@" </dev/null & child=$!; read -r _; kill "$child"; wait "$child"'


@contextmanager
def server() -> Iterator[str]:
    """Use the Prefect server at PREFECT_API_URL, else one on this machine, else run one meanwhile.

    One on this machine is looked for at the usual port. The server of a run listens at another, so
    that no second run comes to depend on it.

    Prefect's own temporary server is not used: it loses records of quick tasks, hangs on Ctrl-C
    and outlives a killed flow.

    Yields:
        the address of its user interface

    Raises:
        RuntimeError: the server named does not answer, or the one that was started.
    """
    if url := PREFECT_API_URL.value():
        if not _answers(url):
            raise RuntimeError(
                f"nothing answers at PREFECT_API_URL {url}: start that server, or unset the "
                "variable, and the run starts one of its own"
            )
        yield _ui(url)
        return
    url = f"http://127.0.0.1:{_USUAL_PORT}/api"
    if _answers(url):
        with temporary_settings({PREFECT_API_URL: url}):
            yield _ui(url)
        return
    port = _free_port()
    url = f"http://127.0.0.1:{port}/api"
    with _started(port, url), temporary_settings({PREFECT_API_URL: url}):
        yield _ui(url)


@contextmanager
def logs_delivered() -> Iterator[None]:
    """Send what zeroflow logs within the block to the flow run's log as well."""
    logger, handler = logging.getLogger("zeroflow"), APILogHandler()
    handler.setLevel(logging.INFO)
    if logger.level == logging.NOTSET:  # no command line has set it
        logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def silence_console() -> None:
    """Keep Prefect's own lines out of the terminal; they are in the flow run's log."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, PrefectConsoleHandler):
            root.removeHandler(handler)


def may_succeed_later(task: Any, task_run: Any, state: State) -> bool:
    """Whether a failed task is worth another try: the hub was out of reach or busy."""
    try:
        state.result()
    except HubError as error:
        return error.transient
    except BaseException:
        return False
    return False


def was_helped(task: Any, task_run: Any, state: State) -> bool:
    """Whether something was changed about a training that failed, so that a retry has a chance."""
    try:
        state.result()
    except TrainingFailed as failure:
        return failure.will_retry
    except BaseException:
        return False
    return False


@contextmanager
def part_runner(build_part: Task[[PartJob], BuiltPart], build: BuildChoice) -> Iterator[RunParts]:
    """What runs `build_part` for several parts, as tasks of the flow run.

    Raises:
        ValueError: Dask is asked for and not installed.
    """
    if build.data_runner == "threads":
        # Not Prefect's own threads: Ctrl-C would wait for them
        yield partial(in_threads, build_part=build_part)
        return
    with _dask(build) as runner:

        def run_parts(jobs: list[PartJob]) -> list[BuiltPart | Exception]:
            futures = [runner.submit(build_part, parameters={"job": job}) for job in jobs]
            return [outcome(future.result) for future in futures]

        yield run_parts


def _dask(build: BuildChoice) -> TaskRunner[Any]:
    os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "warning")  # else a dozen lines a worker
    try:
        from prefect_dask import DaskTaskRunner  # an extra of the package
    except ImportError as error:
        raise ValueError(
            f"--data-runner dask needs a package ({error}): pip install 'zeroflow[dask]'"
        ) from error
    if build.dask_address:
        return DaskTaskRunner(address=build.dask_address)
    workers = {"n_workers": build.data_workers, "threads_per_worker": 1, "dashboard_address": None}
    return DaskTaskRunner(cluster_kwargs=workers)


def completed(result: Any, *, reused: bool) -> State:
    """The end of a task, that the UI shows as Reused where nothing had to be done."""
    return Completed(name="Reused" if reused else None, data=result)


def publish(markdown: str, subject: str, run_name: str) -> None:
    """Show a page on the flow run's page."""
    key = "".join(c if c.isalnum() else "-" for c in f"{subject}-{run_name}".lower()).strip("-")
    try:
        create_markdown_artifact(markdown, key=key, description=f"{subject} of {run_name}")
    except Exception as error:  # the server is gone; what it would show is on disk
        log.warning("the %s could not be shown in Prefect: %s", subject, error)


def publish_picture(picture: Path, subject: str, run_name: str) -> None:
    """Show a PNG file on the flow run's page."""
    # in markdown, as Prefect prints the whole data URI of an image artifact over its page
    data = base64.b64encode(picture.read_bytes()).decode()
    publish(f"![{subject}](data:image/png;base64,{data})", subject, run_name)


def tags() -> dict[str, str]:
    """Tags that lead from another tool's record to this flow run."""
    flow_run_id = runtime.flow_run.id
    return {"prefect.flow_run_id": str(flow_run_id)} if flow_run_id else {}


def _ui(api_url: str) -> str:
    return api_url.removesuffix("/").removesuffix("/api")


def _answers(api_url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{api_url.rstrip('/')}/health", timeout=5):
            return True
    except urllib.error.HTTPError:
        return True  # it wants to know who asks
    except (OSError, ValueError):
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _started(port: int, url: str) -> Iterator[None]:
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1"]
    environment = os.environ | {
        "PREFECT_SERVER_API_PORT": str(port),  # where the UI looks for its server
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    log.info("starting a Prefect server for this run on port %d", port)
    process = subprocess.Popen(
        ["sh", "-c", _KEEPER, "keeper", *command, "--port", str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=environment,
    )
    try:
        _wait_for(process, url)
        yield
    finally:
        # What is still on its way would be tried for a minute against a server that is gone
        EventsWorker.drain_all()
        APILogWorker.drain_all()
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            log.warning("the Prefect server did not stop in %d s", _STOP_SECONDS)


def _wait_for(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not _answers(url):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(
                "the Prefect server did not start; `prefect server start` shows why. With a server "
                "elsewhere, set PREFECT_API_URL"
            )
        time.sleep(0.2)
