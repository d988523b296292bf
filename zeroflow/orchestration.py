"""What knows Prefect besides flows/: the server, flow runs, log delivery, retry reasons, pages."""

import base64
import contextvars
import copy
import logging
import os
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from functools import partial, wraps
from http import HTTPStatus
from pathlib import Path
from typing import Any, NoReturn, Protocol
from uuid import UUID

import psutil
import yaml
from prefect import runtime
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import (
    ArtifactUpdate,
    GlobalConcurrencyLimitCreate,
    WorkPoolCreate,
)
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.concurrency.sync import concurrency
from prefect.context import FlowRunContext
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.worker import EventsWorker
from prefect.exceptions import (
    ObjectAlreadyExists,
    ObjectNotFound,
    PrefectHTTPStatusError,
    TerminationSignal,
)
from prefect.flows import Flow
from prefect.logging.handlers import APILogHandler, APILogWorker, PrefectConsoleHandler
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Cancelled, Completed, Pending, State
from prefect.task_runners import TaskRunner
from prefect.tasks import Task

from zeroflow import run as runs
from zeroflow.config import Config
from zeroflow.data.hub import HubError
from zeroflow.data.parts import BuiltPart, PartJob
from zeroflow.data.shards import RunParts, in_threads, outcome
from zeroflow.programs import Program
from zeroflow.run import BuildChoice, RunConfig
from zeroflow.training.job import TrainingFailed

log = logging.getLogger(__name__)


class Asked(Protocol):
    """The settings that a flow takes, as its only parameter."""

    @property
    def anywhere(self) -> Config:
        """Meaning the same from every working directory, and in a retry."""


RunFlow = Flow[[Any], Path]

FLOW = "pretrain"
SWEEP, SWEEP_DEPLOYMENT = "sweep", "sizes"
WORK_POOL = "zeroflow"
AUTOMATION = "zeroflow: a flow run whose process is gone has crashed"

GPU_LIMIT = "zeroflow-gpu"
"""Of jobs on GPUs that go on at once, over all runs that the server knows."""

_ROOT = Path(__file__).parents[1]
_DEPLOYMENTS = "prefect.yaml"
_ENGINE = {"prefect.engine", "prefect.flow_engine"}
_WORKER = ("worker", "start", "--pool", WORK_POOL, "--limit", "1")

# Of Prefect 3.8.8: a worker with a limit ends with this if a run is retried while its process,
# which has told of the run's end, is on its way out.
_RETRIED_TOO_SOON = "this borrower is already holding one of this CapacityLimiter's tokens"
_ENDED_EARLY = {StateType.FAILED, StateType.CRASHED, StateType.CANCELLED}
USUAL_PORT = 4200
_START_SECONDS = 120.0
_STOP_SECONDS = 20.0
_SAVE_SECONDS = 150.0
"""That a training has to write a checkpoint, and some."""

_POLL_SECONDS = 3.0
_BAR_SECONDS = 5.0
_BAR_RETRY_SECONDS = 60.0
_SLOT_SECONDS = 5.0

_lost = threading.Event()
"""Whether the server had gone when a flow ended."""

_to_the_end = ExitStack()
"""Settings of Prefect for what is left of this process."""

# Five of Prefect's heartbeats, one every 180 s. At 90 s a server that was away for 120 s marked
# live runs crashed.
SILENCE = timedelta(minutes=15)


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
            server.wait_until(partial(_answers, self.url), _START_SECONDS)
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


def run_here(flow: RunFlow, asked: Asked, *, deployment: str) -> Path:
    """Run `flow` in this process, such that Prefect's buttons work as for the run of a worker.

    Its run is one of `deployment`, if there is one of that name: then it can be retried.
    When it is cancelled, this process gets SIGTERM, and another when the flow has ended.

    Returns:
        what the flow returns, even if the server has gone meanwhile; then with a warning.
    """
    with get_client(sync_client=True) as client:
        flow_run = _new_flow_run(client, flow, asked, deployment)
        try:
            return _run_here(client, flow, asked, flow_run)
        except _CancelledHere:
            signal.raise_signal(signal.SIGTERM)
            raise


def run_child(flow: RunFlow, run: RunConfig, *, finished: bool) -> None:
    """Run `flow` as `run_here` does, within another flow and shown as a child of its run.

    A retry of the other flow's run has the same children: one that has completed stays as it is,
    if what it made is there, and others go on as the runs that they were. A child that is
    cancelled ends alone, with an exception.

    Args:
        finished: whether what it makes is there.
    """
    parent = FlowRunContext.get()
    assert parent is not None and parent.flow_run is not None, "it is called within a flow"
    with get_client(sync_client=True) as client:
        stand_in = Task(flow.fn, name=flow.name)
        stand_in.task_key = flow.name  # and not a hash of its code, which may have been mended
        name = str(run.run_name)
        shown = client.create_task_run(stand_in, parent.flow_run.id, dynamic_key=name, name=name)
        flow_run = _child_of(client, shown.id)
        state = flow_run.state if flow_run else None
        if state and state.is_completed() and finished:
            log.info("run %s has completed before", name)
            return
        if flow_run and state and state.type in _ENDED_EARLY:
            client.set_flow_run_state(flow_run.id, Pending(), force=True)
            flow_run = client.read_flow_run(flow_run.id)
        else:
            place = {"parent_task_run_id": shown.id, "name": name}
            flow_run = _new_flow_run(client, flow, run, runs.size_of(run), **place)
        _run_here(client, flow, run, flow_run)


def _child_of(client: SyncPrefectClient, task_run: UUID) -> FlowRun | None:
    """The newest flow run that `task_run` stands for."""
    of_parent = FlowRunFilter(parent_task_run_id={"any_": [task_run]})
    newest = FlowRunSort.EXPECTED_START_TIME_DESC
    found = client.read_flow_runs(flow_run_filter=of_parent, sort=newest, limit=1)
    return found[0] if found else None


class _CancelledHere(Exception):
    """The flow run was cancelled, in Prefect, while it went on in this process."""

    def __str__(self) -> str:
        return "it was cancelled in Prefect"


def _run_here(client: SyncPrefectClient, flow: RunFlow, asked: Asked, flow_run: FlowRun) -> Path:
    from prefect.flow_engine import run_flow  # its import sets up logging

    with _cancelled_by_button(client, flow_run.id) as cancelled:
        attempt = _Attempt(flow, cancelled)
        try:
            run_flow(attempt.flow, flow_run=flow_run, parameters={_parameter(flow): asked})
        except Exception as error:
            if cancelled.is_set():
                raise _CancelledHere from error
            if error is not attempt.error:
                if attempt.result is None and attempt.error is None:
                    raise
                log.warning("Prefect could not be told how the run ended: %s", error)
        finally:
            if cancelled.is_set():
                _mark_cancelled(client, flow_run.id)
    if attempt.error:
        if flow_run.deployment_id:
            attempt.error.add_note("retry: the button on the flow run's page in Prefect")
        raise attempt.error
    assert attempt.result is not None
    return attempt.result


def leave(code: int) -> NoReturn:
    """End this process, and do not try for minutes to deliver what is left to a lost server."""
    if _lost.is_set():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


def name_flow_run(asked: RunConfig, run: RunConfig) -> None:
    """Name and tag the flow run after `run`, and have its retry, wherever, go on with that.

    Args:
        asked: what the flow was given.
        run: what that was settled to.
    """
    _describe_flow_run(
        f"{run.model.name} · {run.data.name} · {run.run_name}",
        parameters={"run": _given(asked.model_copy(update={"run_name": run.run_name}))},
        tags=sorted({*runtime.flow_run.tags, run.model.name, run.data.data_mode, run.device}),
    )


def name_sweep(name: str) -> None:
    """Name the flow run that goes on, that of a sweep."""
    _describe_flow_run(f"sweep · {name}")


def _describe_flow_run(name: str, **found: Any) -> None:
    if not (flow_run_id := runtime.flow_run.id):
        return
    try:
        with get_client(sync_client=True) as client:
            client.update_flow_run(UUID(flow_run_id), name=name, **found)
    except Exception as error:  # the run is the same by any name
        log.warning("the flow run could not be named in Prefect: %s", error)


@contextmanager
def logs_delivered() -> Iterator[None]:
    """Send what zeroflow logs within the block, that of a flow, to the flow run's log as well.

    A server that has gone by its end is told once how the flow ended, not for minutes.
    """
    logger, handler = logging.getLogger("zeroflow"), APILogHandler()
    if any(isinstance(other, APILogHandler) for other in logger.handlers):
        yield  # that of the parent sends each line to the innermost run
        return
    handler.setLevel(logging.INFO)
    if logger.level == logging.NOTSET:  # no command line has set it
        logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        if not _reachable():
            _lost.set()
            _to_the_end.enter_context(temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}))


def silence_console() -> None:
    """Keep Prefect's own lines out of the terminal; they are in the flow run's log."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, PrefectConsoleHandler):
            root.removeHandler(handler)
    # What a server that is away gives rise to, pages of it, comes by these
    for name in ("prefect", "prefect._internal", "asyncio"):
        logging.getLogger(name).handlers = [logging.NullHandler()]
    logging.raiseExceptions = False


def task_name() -> str:
    """Of the task that goes on, for its run as well, to which Prefect would add random digits."""
    return str(runtime.task_run.task_name)


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


def was_killed(task: Any, task_run: Any, state: State) -> bool:
    """Whether the process of a failed check was killed, so that nothing speaks against a retry."""
    try:
        state.result()
    except TrainingFailed as failure:
        if failure.reason == "killed":
            log.warning("%s is tried again: %s", task.name, str(failure).splitlines()[0])
            return True
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
    try:
        if not _reachable():
            raise ConnectionError("its server does not answer")  # Prefect would try for a minute
        key = _key(subject, run_name)
        create_markdown_artifact(markdown, key=key, description=f"{subject} of {run_name}")
    except Exception as error:  # what it would show is on disk
        log.warning("the %s could not be shown in Prefect: %s", subject, error)


def publish_picture(picture: Path, subject: str, run_name: str) -> None:
    """Show a PNG file on the flow run's page."""
    publish(_page_of(picture, subject), subject, run_name)


def _page_of(picture: Path, subject: str) -> str:
    # in markdown, as Prefect prints the whole data URI of an image artifact over its page
    data = base64.b64encode(picture.read_bytes()).decode()
    return f"![{subject}](data:image/png;base64,{data})"


class _Live:
    """Something on the flow run's page that is brought up to date; a failure is told once."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._id: UUID | None = None
        self._failing = False

    def put(self, create: Callable[[], Any], update: Callable[[UUID], Any]) -> bool:
        """Have it created, or updated if it is there; whether that worked."""
        try:
            if not _reachable():
                raise ConnectionError("its server does not answer")
            if self._id is None:
                self._id = create()
            else:
                update(self._id)
            self._failing = False
        except Exception as error:  # it is in the log or on disk as well
            if not self._failing:
                log.warning("%s is not shown in Prefect: %s", self._what, error)
            self._failing = True
        return not self._failing


class LivePicture:
    """A picture on the flow run's page, in place of the one before it."""

    def __init__(self, subject: str, run_name: str) -> None:
        self._subject, self._run_name = subject, run_name
        self._live = _Live(f"the picture of {subject}")

    def __call__(self, picture: Path) -> None:
        page = _page_of(picture, self._subject)
        self._live.put(
            lambda: create_markdown_artifact(
                page,
                key=_key(f"{self._subject}-live", self._run_name),
                description=f"{self._subject} of {self._run_name} while it is trained",
            ),
            lambda shown: _update_artifact(shown, page),
        )


def _update_artifact(artifact: UUID, data: str) -> None:
    with get_client(sync_client=True) as client:
        client.update_artifact(artifact, ArtifactUpdate(data=data))


class Progress:
    """A bar on the flow run's page, brought up to date at a pace that a person can follow."""

    def __init__(self, subject: str, run_name: str) -> None:
        self._subject, self._key = subject, _key(f"{subject}-progress", run_name)
        self._live = _Live(f"progress of {subject}")
        self._next = 0.0

    def __call__(self, share: float, text: str) -> None:
        """Show the `share` that is done, from 0 to 1, and a line about it."""
        if time.monotonic() < self._next and share < 1:
            return
        percent, text = round(100 * share, 1), f"{self._subject}: {text}"
        shown = self._live.put(
            lambda: create_progress_artifact(percent, self._key, text),
            lambda bar: update_progress_artifact(bar, percent, text),
        )
        self._next = time.monotonic() + (_BAR_SECONDS if shown else _BAR_RETRY_SECONDS)


def _key(subject: str, run_name: str) -> str:
    """Of an artifact: lower-case letters, digits and dashes."""
    lower = f"{subject}-{run_name}".lower()
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in lower).strip("-")


@contextmanager
def gpu_slot(device: str) -> Iterator[None]:
    """Hold the one slot for jobs on GPUs within the block, as soon as no other run does.

    A server that is away, before or meanwhile, or knows no limit, costs the slot and not the run.
    """
    with ExitStack() as held:
        if device == "cuda":
            try:
                if not _reachable():
                    raise ConnectionError("its server does not answer")
                _take_slot(held)
            except Exception as error:
                log.warning("Prefect does not keep other runs off the GPU: %s", error)
        yield


def _take_slot(held: ExitStack) -> None:
    # Not strict, as a lease that is lost with the server would end the training
    try:
        held.enter_context(concurrency(GPU_LIMIT, timeout_seconds=_SLOT_SECONDS, strict=False))
    except TimeoutError:
        log.info("waiting until another run is done with the GPU (limit %s in Prefect)", GPU_LIMIT)
        held.enter_context(concurrency(GPU_LIMIT, strict=False))


def tags() -> dict[str, str]:
    """Tags that lead from another tool's record to this flow run."""
    flow_run_id = runtime.flow_run.id
    return {"prefect.flow_run_id": str(flow_run_id)} if flow_run_id else {}


def _new_flow_run(
    client: SyncPrefectClient,
    flow: RunFlow,
    asked: Asked,
    deployment: str,
    **shown: Any,
) -> FlowRun:
    """Pending, which no worker takes."""
    name = f"{flow.name}/{deployment}"
    given: dict[str, Any] = {
        "parameters": {_parameter(flow): _given(asked)},
        "state": Pending(),
        **shown,
    }
    try:
        known = client.read_deployment_by_name(name)
        return client.create_flow_run_from_deployment(known.id, **given)
    except ObjectNotFound:
        pass
    except PrefectHTTPStatusError as error:
        if error.response.status_code != HTTPStatus.CONFLICT:
            raise
        log.warning(
            "deployment %s does not know these settings, as it was made by another version: this "
            "run has no Retry button until `prefect deploy --all` has renewed it",
            name,
        )
    return client.create_flow_run(flow, **given)


def _parameter(flow: RunFlow) -> str:
    """Name of the one that the flow takes."""
    [name] = flow.parameters.properties
    return name


def _given(asked: Asked) -> dict[str, Any]:
    """What was given and nothing else: a default may be settled otherwise."""
    return asked.anywhere.model_dump(mode="json", exclude_unset=True)


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


class _Attempt:
    """A flow that remembers how its own code ended, whatever becomes of the server."""

    def __init__(self, flow: RunFlow, cancelled: threading.Event) -> None:
        self.result: Path | None = None
        self.error: Exception | None = None
        self._cancelled, self._function = cancelled, flow.fn
        body: Any = wraps(flow.fn)(lambda asked: self._run(asked))  # it may return a state, as well
        self.flow = copy.copy(flow)
        self.flow.fn = body

    def _run(self, asked: Asked) -> Path | State:
        try:
            self.result = self._function(asked)
        except TerminationSignal:
            if not self._cancelled.is_set():
                raise
            return Cancelled(message="Stopped, as was asked for in Prefect.")
        except Exception as error:
            self.error = error
            raise
        return self.result


@contextmanager
def _cancelled_by_button(client: SyncPrefectClient, flow_run_id: UUID) -> Iterator[threading.Event]:
    """Send this process SIGTERM once the flow run is being cancelled; that sets the event.

    Prefect signals the processes of its workers only.
    """
    cancelled, ended = threading.Event(), threading.Event()

    def watch() -> None:
        while not ended.wait(_POLL_SECONDS):
            with suppress(Exception):  # the server is away
                state = client.read_flow_run(flow_run_id).state
                if state and (state.is_cancelling() or state.is_cancelled()):
                    cancelled.set()
                    os.kill(os.getpid(), signal.SIGTERM)
                    return

    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(watch,), daemon=True).start()
    try:
        yield cancelled
    finally:
        ended.set()


def _mark_cancelled(client: SyncPrefectClient, flow_run_id: UUID) -> None:
    """Also where the signal came outside of the flow's own code, which Prefect calls a crash."""
    try:
        state = client.read_flow_run(flow_run_id).state
        if state is None or not (state.is_cancelled() or state.is_completed()):
            client.set_flow_run_state(flow_run_id, Cancelled(), force=True)
    except Exception as error:
        log.warning("Prefect could not be told that the run was cancelled: %s", error)


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
        if not _answers(url):
            raise RuntimeError(
                f"nothing answers at PREFECT_API_URL {url}: start that server, or unset the "
                "variable, and a run starts one of its own"
            )
        return url
    url = _local(port)
    return url if _answers(url) else None


def _local(port: int) -> str:
    return f"http://127.0.0.1:{port}/api"


def _ui(api_url: str) -> str:
    return api_url.removesuffix("/").removesuffix("/api")


def _reachable() -> bool:
    url = PREFECT_API_URL.value()
    return url is None or _answers(url)


def _answers(api_url: str) -> bool:
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
        server.wait_until(partial(_answers, url), _START_SECONDS)
    except RuntimeError as error:
        error.add_note("with a server elsewhere, set PREFECT_API_URL")
        raise
