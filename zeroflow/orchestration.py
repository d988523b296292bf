"""What flows need of Prefect: flow runs and their children, log delivery, retry reasons, pages."""

import base64
import contextvars
import copy
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import wraps
from http import HTTPStatus
from pathlib import Path
from typing import Any, NoReturn, Protocol
from uuid import UUID

from prefect import runtime
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import (
    ArtifactUpdate,
)
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.concurrency.sync import concurrency
from prefect.context import FlowRunContext
from prefect.exceptions import (
    ObjectNotFound,
    PrefectHTTPStatusError,
    TerminationSignal,
)
from prefect.flows import Flow
from prefect.logging.handlers import APILogHandler, PrefectConsoleHandler
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Cancelled, Completed, Pending, State
from prefect.task_runners import TaskRunner
from prefect.tasks import Task

from zeroflow import prefect_server, settling
from zeroflow.config import Config
from zeroflow.data.hub import HubError
from zeroflow.data.parts import BuiltPart, PartJob
from zeroflow.data.shards import Builders, Ending, in_threads, outcome
from zeroflow.run import BuildChoice, RunConfig
from zeroflow.training.job import TrainingFailed

log = logging.getLogger(__name__)


class Asked(Protocol):
    """The settings that a flow takes, as its only parameter."""

    @property
    def anywhere(self) -> Config:
        """Meaning the same from every working directory, and in a retry."""


RunFlow = Flow[[Any], Path]

_ENDED_EARLY = {StateType.FAILED, StateType.CRASHED, StateType.CANCELLED}
_POLL_SECONDS = 3.0
_BAR_SECONDS = 5.0
_BAR_RETRY_SECONDS = 60.0
_SLOT_SECONDS = 5.0

_lost = threading.Event()
"""Whether the server had gone when a flow ended."""

_to_the_end = ExitStack()
"""Settings of Prefect for what is left of this process."""


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
            flow_run = _new_flow_run(client, flow, run, settling.size_of(run), **place)
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
def part_builders(build_part: Task[[PartJob], BuiltPart], build: BuildChoice) -> Iterator[Builders]:
    """Who builds parts, each as a task of the flow run.

    Raises:
        ValueError: Dask is asked for and not installed.
    """
    if build.data_runner == "threads":
        # Not Prefect's own threads: Ctrl-C would wait for them
        with in_threads(build.data_workers, build_part) as builders:
            yield builders
        return
    with _dask(build) as runner:

        def start(job: PartJob) -> Ending:
            future = runner.submit(build_part, parameters={"job": job})
            return lambda: outcome(future.result)

        yield Builders(start, build.data_workers)


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
        held.enter_context(
            concurrency(prefect_server.GPU_LIMIT, timeout_seconds=_SLOT_SECONDS, strict=False)
        )
    except TimeoutError:
        log.info(
            "waiting until another run is done with the GPU (limit %s in Prefect)",
            prefect_server.GPU_LIMIT,
        )
        held.enter_context(concurrency(prefect_server.GPU_LIMIT, strict=False))


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


def _reachable() -> bool:
    url = PREFECT_API_URL.value()
    return url is None or prefect_server.answers(url)
