"""Flow runs that this process executes itself: creation, cancellation, retry and children."""

import logging
import signal
from http import HTTPStatus
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.context import FlowRunContext
from prefect.exceptions import (
    CancelledRun,
    FailedRun,
    ObjectNotFound,
    Pause,
    PrefectHTTPStatusError,
    TerminationSignal,
)
from prefect.flows import Flow
from prefect.states import Cancelled, Pending, State
from prefect.tasks import Task

from zeroflow.orchestration import server
from zeroflow.orchestration.buttons import watched
from zeroflow.orchestration.conclusion import STOPS, observed
from zeroflow.orchestration.deployments import DEPLOY
from zeroflow.orchestration.flow_context import Asked, first_name, given_settings
from zeroflow.orchestration.names import FROM_A_COMMAND
from zeroflow.pipeline import RunCancelled, may_succeed
from zeroflow.settings.existing import size_of
from zeroflow.settings.run_config import RunConfig

log = logging.getLogger(__name__)

RunFlow = Flow[[Any], Path | State[Any]]

_ENDED_EARLY = {StateType.FAILED, StateType.CRASHED, StateType.CANCELLED}


def run_here(flow: RunFlow, asked: Asked, *, deployment: str | None) -> Path:
    """Run `flow` in this process, with the same buttons in Prefect as for the runs of a worker.

    When the run is cancelled or suspended in Prefect, this process gets SIGTERM, and a second one
    when the flow has ended.

    Args:
        deployment: deployment that the run belongs to, if it exists: Prefect can retry only runs of
            a deployment.

    Returns:
        The result of the flow. If the server is unreachable by then, a warning is logged.
    """
    with get_client(sync_client=True) as client:
        flow_run = new_flow_run(client, flow, asked, deployment)
        try:
            return _run_here(client, flow, asked, flow_run)
        except (_CancelledHere, TerminationSignal):
            signal.raise_signal(signal.SIGTERM)
            raise


def run_child(flow: RunFlow, run: RunConfig, *, finished: bool) -> None:
    """Run `flow` as `run_here` does, as a child of the current flow run.

    A retry of the parent has the same children: a completed child is skipped if its result exists,
    and the others resume in their own flow runs. Cancelling a child in Prefect ends only that
    child, and raises an exception here.

    Args:
        finished: True if the result of `run` exists.
    """
    parent = FlowRunContext.get()
    assert parent is not None and parent.flow_run is not None, "called within a flow"
    with get_client(sync_client=True) as client:
        stand_in = Task(flow.fn, name=flow.name)
        stand_in.task_key = flow.name  # not a hash of its code, which may change between retries
        name = str(run.run_name)
        shown = client.create_task_run(stand_in, parent.flow_run.id, dynamic_key=name, name=name)
        flow_run = _child_of(client, shown.id)
        state = flow_run.state if flow_run else None
        if state and state.is_completed() and finished:
            log.info("run %s: already completed", name)
            return
        if flow_run and state and state.type in _ENDED_EARLY:
            client.set_flow_run_state(flow_run.id, Pending(), force=True)
            flow_run = client.read_flow_run(flow_run.id)
        else:
            flow_run = new_flow_run(client, flow, run, size_of(run), parent_task_run_id=shown.id)
        _run_here(client, flow, run, flow_run)


def _child_of(client: SyncPrefectClient, task_run: UUID) -> FlowRun | None:
    """Return the newest flow run that Prefect shows as `task_run`."""
    of_parent = FlowRunFilter(parent_task_run_id={"any_": [task_run]})
    newest = FlowRunSort.EXPECTED_START_TIME_DESC
    found = client.read_flow_runs(flow_run_filter=of_parent, sort=newest, limit=1)
    return found[0] if found else None


class _CancelledHere(RunCancelled):
    """The flow run was cancelled in Prefect while this process executed it."""

    def __str__(self) -> str:
        return "it was cancelled in Prefect"


def _run_here(client: SyncPrefectClient, flow: RunFlow, asked: Asked, flow_run: FlowRun) -> Path:
    from prefect.flow_engine import run_flow  # its import sets up logging

    with (
        observed() as ended,
        watched(flow_run.id, by_worker=False, stopped=lambda: ended.error is not None) as cancelled,
    ):
        try:
            run_flow(flow, flow_run=flow_run, parameters={_parameter(flow): asked})
        except Pause:  # the run was suspended, and remains so
            assert ended.error is not None
        except STOPS as stop:  # raised outside the flow's own code
            ended.error = ended.error or stop
            _mark_cancelled(client, flow_run.id)
        except Exception as error:
            if ended.result is None and ended.error is None:
                raise
            if not isinstance(error, FailedRun | CancelledRun):
                log.warning("cannot report to Prefect how the run ended: %s", error)
    if ended.result is not None:
        return ended.result
    if cancelled.is_set():
        raise _CancelledHere
    assert ended.error is not None
    has_button = flow_run.deployment_id and server.outlives_the_run()
    if has_button and isinstance(ended.error, Exception) and may_succeed(ended.error):
        ended.error.add_note("retry: the button on the flow run's page in Prefect")
    raise ended.error


def new_flow_run(
    client: SyncPrefectClient,
    flow: RunFlow,
    asked: Asked,
    deployment: str | None,
    **shown: Any,
) -> FlowRun:
    """Create a flow run, of `deployment` if it exists. In state Pending, no worker picks it up."""
    name = f"{flow.name}/{deployment}"
    given: dict[str, Any] = {
        "parameters": {_parameter(flow): given_settings(asked)},
        "state": Pending(),
        "name": first_name(asked),
        "tags": [FROM_A_COMMAND],
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
            "deployment %s was created by another version and does not accept these settings: this "
            "run has no Retry button until `%s` updates the deployment",
            name,
            DEPLOY,
        )
    return client.create_flow_run(flow, **given)


def _parameter(flow: RunFlow) -> str:
    """Return the name of the flow's only parameter."""
    [name] = flow.parameters.properties
    return name


def _mark_cancelled(client: SyncPrefectClient, flow_run_id: UUID) -> None:
    """Mark a run as cancelled if a signal ended it outside the flow's own code.

    By default, Prefect would mark it as crashed.
    """
    try:
        state = client.read_flow_run(flow_run_id).state
        if state is None or not (state.is_cancelled() or state.is_completed()):
            client.set_flow_run_state(flow_run_id, Cancelled(message="Stopped."), force=True)
    except Exception as error:
        log.warning("cannot report to Prefect that the run was cancelled: %s", error)
