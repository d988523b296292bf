"""Prefect's server, its worker and the deployments of prefect.yaml."""

import logging
import os
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from http import HTTPStatus
from pathlib import Path

import psutil
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.worker import EventsWorker
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_API_URL, temporary_settings

from zeroflow.programs import Program

log = logging.getLogger(__name__)

FLOW = "pretrain"
SWEEP, SWEEP_DEPLOYMENT = "sweep", "sizes"
WORK_POOL = "zeroflow"
AUTOMATION = "zeroflow: a flow run whose process is gone has crashed"

GPU_LIMIT = "zeroflow-gpu"
"""Of jobs on GPUs that go on at once, over all runs that the server knows."""

USUAL_PORT = 4200

# Five of Prefect's heartbeats, one every 180 s. At 90 s a server that was away for 120 s marked
# live runs crashed.
SILENCE = timedelta(minutes=15)

_ROOT = Path(__file__).parents[1]
_DEPLOYMENTS = "prefect.yaml"
_ENGINE = {"prefect.engine", "prefect.flow_engine"}
_WORKER = ("worker", "start", "--pool", WORK_POOL, "--limit", "1")

# Of Prefect 3.8.8: a worker with a limit ends with this if a run is retried while its process,
# which has told of the run's end, is on its way out.
_RETRIED_TOO_SOON = "this borrower is already holding one of this CapacityLimiter's tokens"

_START_SECONDS = 120.0
_STOP_SECONDS = 20.0
_SAVE_SECONDS = 150.0
"""That a training has to write a checkpoint, and some."""


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
    if url := _in_use():
        with temporary_settings({PREFECT_API_URL: url}):
            yield _ui(url)
        return
    port = _free_port()
    url = _local(port)
    with _started(port, url), temporary_settings({PREFECT_API_URL: url}):
        yield _ui(url)


def set_up(silence: timedelta = SILENCE) -> None:
    """Have the server in use know what deployments and killed runs need; again changes nothing.

    That is the work pool of prefect.yaml, a limit of one job on a GPU at a time, and an automation
    that marks a run of the flow crashed when its process is gone without a word, so that it can be
    retried.

    Args:
        silence: time without a heartbeat after which a process counts as gone. A server that was
            away for as long takes live runs for crashed, until they end.

    Raises:
        RuntimeError: no server answers.
    """
    from prefect.workers.process import ProcessWorker  # its import sets up logging

    if (url := _in_use()) is None:
        raise RuntimeError(
            f"no Prefect server answers on port {USUAL_PORT}: start one with `prefect server "
            "start`, or name one in PREFECT_API_URL"
        )
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        template = ProcessWorker.get_default_base_job_template()
        pool = WorkPoolCreate(name=WORK_POOL, type="process", base_job_template=template)
        with suppress(ObjectAlreadyExists):
            client.create_work_pool(pool)
        with suppress(ObjectAlreadyExists):
            client.create_global_concurrency_limit(
                GlobalConcurrencyLimitCreate(name=GPU_LIMIT, limit=1)
            )
        automation = _crash_detection(silence)
        if there := client.read_automations_by_name(AUTOMATION):
            client.update_automation(there[0].id, automation)
        else:
            client.create_automation(automation)
    minutes = silence / timedelta(minutes=1)
    log.info("Prefect at %s has", _ui(url))
    log.info("  work pool   %s", WORK_POOL)
    log.info("  limit       %s, of jobs on GPUs at once", GPU_LIMIT)
    log.info("  automation  %s, after %g minutes without a heartbeat", AUTOMATION, minutes)


class Prefect:
    """Prefect's server with the deployments, and a worker that runs them one at a time.

    Args:
        cache: folder that the deployments write to, if their form names no other.
        port: of a server that is used if it is there, unless PREFECT_API_URL names one, and
            started otherwise.
        logs: folder for their output.

    Raises:
        RuntimeError: the server that PREFECT_API_URL names does not answer.
        ValueError: there is nothing to deploy.
    """

    def __init__(self, port: int, cache: Path, logs: Path) -> None:
        if not (_ROOT / _DEPLOYMENTS).exists():
            raise ValueError(
                f"no {_DEPLOYMENTS} in {_ROOT}: install zeroflow from its tree, with `make venv`"
            )
        found = _in_use(port)
        self.url, self.to_be_started = found or _local(port), found is None
        self.programs: list[Program] = []
        self._port, self._cache, self._logs = port, cache.absolute(), logs

    @property
    def address(self) -> str:
        """Of the user interface."""
        return _ui(self.url)

    def start_server(self) -> None:
        if self.to_be_started:
            self.programs.append(_start_server(self._port, self._logs / "prefect.log"))

    def start_worker(self) -> None:
        """Once the server answers: set it up, deploy, and have the deployments run.

        Raises:
            RuntimeError: one of these did not work; with its last lines.
        """
        for server in self.programs:
            server.wait_until(partial(answers, self.url), _START_SECONDS)
        with temporary_settings({PREFECT_API_URL: self.url}):
            set_up()
            deployments = self._write_deployments()
        deploy = ("deploy", "--all", "--prefect-file", str(deployments))
        self._run(*deploy, wait=_START_SECONDS)
        self._run(*_WORKER)

    def require_running(self) -> None:
        """
        Raises:
            RuntimeError: a program has ended; with its last lines.
        """
        for program in list(self.programs):
            try:
                program.require_running()
            except RuntimeError as error:
                if _RETRIED_TOO_SOON not in str(error):
                    raise
                log.info("starting Prefect's worker again, as a run was retried before its end")
                self.programs.remove(program)
                self._run(*_WORKER)

    def _write_deployments(self) -> Path:
        """Those of prefect.yaml, for this cache, and without what would undo a person's choices."""
        plan = yaml.safe_load((_ROOT / _DEPLOYMENTS).read_text(encoding="utf-8"))
        with get_client(sync_client=True) as client:
            for deployment in plan["deployments"]:
                flow = deployment["entrypoint"].rsplit(":", 1)[1]
                with suppress(ObjectNotFound):
                    client.read_deployment_by_name(f"{flow}/{deployment['name']}")
                    deployment.pop("schedules", None)  # it keeps those that it has
                parameters = deployment["parameters"]
                run = (
                    parameters["sweep"].setdefault("run", {})
                    if flow == SWEEP
                    else parameters["run"]
                )
                run["cache_dir"] = str(self._cache)
        path = (self._logs / _DEPLOYMENTS).absolute()
        path.write_text(yaml.safe_dump(plan, sort_keys=False), encoding="utf-8")
        return path

    def stop(self) -> None:
        """Runs of the worker save and stop before it does; a server that was there stays."""
        for program in reversed(self.programs):
            runs = _flow_runs(program.pid)
            for run in runs:
                log.info("asking the flow run in process %d to save and stop", run.pid)
                with suppress(psutil.NoSuchProcess):
                    run.terminate()
            # A worker that is stopped kills its runs
            psutil.wait_procs(runs, timeout=_SAVE_SECONDS)
            if not program.stop(_STOP_SECONDS):
                log.warning("%s did not stop in %d s: killed", program.name, _STOP_SECONDS)

    def _run(self, *arguments: str, wait: float | None = None) -> None:
        program = Program(
            f"prefect {arguments[0]}",
            [sys.executable, "-m", "prefect", "--no-prompt", *arguments],
            environment=os.environ | {"PREFECT_API_URL": self.url, "DO_NOT_TRACK": "1"},
            log=self._logs / f"{arguments[0]}.log",
            folder=_ROOT,
        )
        if wait:
            program.wait_for_end(wait)
        else:
            self.programs.append(program)


def _flow_runs(pid: int) -> list[psutil.Process]:
    """Processes of flow runs below process `pid`."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if _ENGINE & {*process.cmdline()}:
                found.append(process)
    return found


def _start_server(port: int, log_file: Path | None = None) -> Program:
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


def _crash_detection(silence: timedelta) -> AutomationCore:
    heartbeat = "prefect.flow-run.heartbeat"
    ends = ("Completed", "Failed", "Cancelled", "Crashed", "TimedOut")
    return AutomationCore(
        name=AUTOMATION,
        description="Made by `zeroflow prefect-setup`.",
        trigger=EventTrigger(
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related={"prefect.resource.role": "flow", "prefect.resource.name": FLOW},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            after={heartbeat},
            expect={heartbeat, *(f"prefect.flow-run.{end}" for end in ends)},
            within=silence,
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message="Its process sent no heartbeat any more: killed, or its machine stopped.",
            )
        ],
    )


def _in_use(port: int = USUAL_PORT) -> str | None:
    """API of the server at PREFECT_API_URL, else of one on this machine.

    Raises:
        RuntimeError: the server named does not answer.
    """
    if url := PREFECT_API_URL.value():
        if not answers(url):
            raise RuntimeError(
                f"nothing answers at PREFECT_API_URL {url}: start that server, or unset the "
                "variable, and a run starts one of its own"
            )
        return url
    url = _local(port)
    return url if answers(url) else None


def _local(port: int) -> str:
    return f"http://127.0.0.1:{port}/api"


def _ui(api_url: str) -> str:
    return api_url.removesuffix("/").removesuffix("/api")


def answers(api_url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{api_url.rstrip('/')}/health", timeout=5):
            return True
    except urllib.error.HTTPError as error:
        return error.code != HTTPStatus.NOT_FOUND  # it may want to know who asks
    except (OSError, ValueError):
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _started(port: int, url: str) -> Iterator[None]:
    log.info("starting a Prefect server for this run on port %d", port)
    server = _start_server(port)
    try:
        _wait_for(server, url)
        yield
    finally:
        # What is still on its way would be tried for a minute against a server that is gone
        EventsWorker.drain_all()
        APILogWorker.drain_all()
        if not server.stop(_STOP_SECONDS):
            log.warning("the Prefect server did not stop in %d s", _STOP_SECONDS)


def _wait_for(server: Program, url: str) -> None:
    try:
        server.wait_until(partial(answers, url), _START_SECONDS)
    except RuntimeError as error:
        error.add_note("with a server elsewhere, set PREFECT_API_URL")
        raise
