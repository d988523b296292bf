"""What flows need of Prefect: flow runs and their children, log delivery, retry reasons, pages."""

import contextvars
import copy
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import wraps
from http import HTTPStatus
from pathlib import Path
from typing import Any, NoReturn, Protocol
from uuid import UUID

from prefect import runtime
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.context import FlowRunContext
from prefect.exceptions import (
    ObjectNotFound,
    PrefectHTTPStatusError,
    TerminationSignal,
)
from prefect.flows import Flow
from prefect.logging.handlers import APILogHandler, PrefectConsoleHandler
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Cancelled, Pending, State
from prefect.tasks import Task

from zeroflow.config import Config
from zeroflow.orchestration import server
from zeroflow.settings.run_config import RunConfig
from zeroflow.settings.settle import size_of

log = logging.getLogger(__name__)


class Asked(Protocol):
    """The settings that a flow takes, as its only parameter."""

    @property
    def anywhere(self) -> Config:
        """Meaning the same from every working directory, and in a retry."""


RunFlow = Flow[[Any], Path]


_ENDED_EARLY = {StateType.FAILED, StateType.CRASHED, StateType.CANCELLED}


_POLL_SECONDS = 3.0


_lost = threading.Event()
"""Whether the server had gone when a flow ended."""


_to_the_end = ExitStack()
"""Settings of Prefect for what is left of this process."""


def run_here(flow: RunFlow, asked: Asked, *, deployment: str | None) -> Path:
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
            flow_run = _new_flow_run(client, flow, run, size_of(run), **place)
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
        if not reachable():
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


def tags() -> dict[str, str]:
    """Tags that lead from another tool's record to this flow run."""
    flow_run_id = runtime.flow_run.id
    return {"prefect.flow_run_id": str(flow_run_id)} if flow_run_id else {}


def _new_flow_run(
    client: SyncPrefectClient,
    flow: RunFlow,
    asked: Asked,
    deployment: str | None,
    **shown: Any,
) -> FlowRun:
    """A flow run in state Pending, which no worker takes; of `deployment` if that exists."""
    name = f"{flow.name}/{deployment}"
    given: dict[str, Any] = {
        "parameters": {_parameter(flow): _given(asked)},
        "state": Pending(),
        **shown,
    }
    if deployment is None:
        return client.create_flow_run(flow, **given)
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


def reachable() -> bool:
    url = PREFECT_API_URL.value()
    return url is None or server.answers(url)
