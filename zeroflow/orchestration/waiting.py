"""Writes into the states of flow runs why they wait or were stopped, where Prefect does not.

Prefect shows the state and its message at the top of a flow run's page.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from prefect import runtime
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import LogCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterEndTime,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import (
    FlowRun,
    FlowRunPolicy,
    StateType,
    WorkerStatus,
    WorkPool,
)
from prefect.states import Cancelled, Failed, Late, Running, State

from zeroflow.config import Config
from zeroflow.orchestration import form
from zeroflow.orchestration.flow_context import name_of, reachable
from zeroflow.orchestration.names import FROM_A_COMMAND, PRETRAIN, SWEEP, WORK_POOL, ZERO_LAB
from zeroflow.settings.flags import error_message
from zeroflow.settings.run_config import RunConfig
from zeroflow.settings.settle import require_possible
from zeroflow.settings.sweep import SweepConfig, cells
from zeroflow.settings.zero_lab import ZeroLabRun, lab_run

log = logging.getLogger(__name__)

_BUSY = (StateType.PENDING, StateType.RUNNING, StateType.CANCELLING)
"""States of a flow run that occupies the worker."""

_DUE = timedelta(seconds=5)
"""Time after its scheduled start at which a flow run counts as waiting. A worker looks for runs
every 15 s."""

_RECENT = timedelta(hours=1)
"""Flow runs that ended earlier are not read again."""

_OF_A_WORKER = "Flow run was cancelled successfully."
"""Message of Prefect's worker, which overwrites the message that the flow itself ended with."""


@contextmanager
def shown(reason: str) -> Iterator[None]:
    """During the block, show in the state of the current flow run that it waits, and why."""
    _show_running(Running(name="Waiting", message=reason))
    try:
        yield
    finally:
        _show_running(Running())


def _show_running(state: State[Any]) -> None:
    """Set a state of type Running. Prefect rejects it for a run that is being cancelled."""
    if not (found := runtime.flow_run.id):
        return
    flow_run = UUID(found)
    try:
        if not reachable():
            raise ConnectionError("its server does not answer")
        with get_client(sync_client=True) as client:
            # Unless the run is marked as resuming, Prefect counts the state as another start
            client.update_flow_run(flow_run, empirical_policy=FlowRunPolicy(resuming=True))
            client.set_flow_run_state(flow_run, state)
            client.update_flow_run(flow_run, empirical_policy=FlowRunPolicy())
    except Exception as error:  # the reason is also in the log
        log.warning("cannot show in Prefect why the run waits: %s", error)


def explain(told: dict[UUID, str]) -> None:
    """Write the reasons into the states of the runs of our work pool, and log new reasons.

    A run whose settings are refused fails at once, although no worker has started it. Each run is
    named after its settings, as by its flow.

    Args:
        told: the last logged reason of each run; updated by this function.
    """
    with get_client(sync_client=True) as client:
        pool = client.read_work_pool(WORK_POOL)
        for run in _runs(client, [StateType.SCHEDULED], expected_start_time=_until(_DUE)):
            if run.id not in told and (name := _name(run)) and name != run.name:
                client.update_flow_run(run.id, name=name)
                run.name = name
            if run.id not in told and (refusal := _refusal(run)):
                told[run.id] = refusal
                client.set_flow_run_state(run.id, Failed(message=refusal))
                _log(client, run, logging.ERROR, refusal)
            elif reason := _reason(client, pool, run):
                _explain(client, run, f"Waiting: {reason}.", told)
        since = FlowRunFilterEndTime(after_=datetime.now(UTC) - _RECENT)
        for run in _runs(client, [StateType.CANCELLED], end_time=since):
            _restore(client, run)


def _until(age: timedelta) -> FlowRunFilterExpectedStartTime:
    return FlowRunFilterExpectedStartTime(before_=datetime.now(UTC) - age)


def _runs(client: SyncPrefectClient, types: Sequence[StateType], **more: Any) -> list[FlowRun]:
    state = FlowRunFilterState(type=FlowRunFilterStateType(any_=list(types)))
    return client.read_flow_runs(
        flow_run_filter=FlowRunFilter(state=state, **more),
        work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[WORK_POOL])),
    )


def _reason(client: SyncPrefectClient, pool: WorkPool, run: FlowRun) -> str | None:
    """Return why no worker has started a run that is due; None if a worker may start it now."""
    assert run.work_queue_id is not None, "runs of a work pool are in one of its queues"
    queue = client.read_work_queue(run.work_queue_id)
    if pool.is_paused:
        return f"the work pool {pool.name} is paused; resume it on its page"
    if queue.is_paused:
        return f"the work queue {queue.name} is paused; resume it on its page"
    running = _runs(client, _BUSY)
    busy = _names(running) or "another run"
    assert run.state is not None
    if run.state.name == "AwaitingConcurrencySlot":
        return f"the concurrency limit of its deployment is reached, by {busy}"
    limits = [(pool.concurrency_limit, "work pool"), (queue.concurrency_limit, "work queue")]
    for limit, what in limits:
        if limit is not None and len(running) >= limit:
            return f"the concurrency limit of the {what}, {limit}, is reached, by {busy}"
    if taken := [run for run in running if _is_of_the_worker(run)]:
        return f"the worker is busy with {_names(taken)}"
    workers = client.read_workers_for_work_pool(pool.name)
    if all(worker.status != WorkerStatus.ONLINE for worker in workers):
        return f"no worker of the work pool {pool.name} is online; `zeroflow ui` starts one"
    return None


def _names(runs: Sequence[FlowRun]) -> str:
    return " and ".join(sorted(run.name for run in runs if run.parent_task_run_id is None))


def _is_of_the_worker(run: FlowRun) -> bool:
    """Return False for a run that a command executes itself, and for a run of a sweep.

    A worker that takes such a run after a retry records its process.
    """
    own = FROM_A_COMMAND not in run.tags or run.infrastructure_pid is not None
    return own and run.parent_task_run_id is None


_FORMS: dict[str, tuple[str, type[Config], Callable[[Any], list[RunConfig]]]] = {
    "run": (PRETRAIN, RunConfig, lambda run: [run]),
    "sweep": (SWEEP, SweepConfig, cells),
    "lab": (ZERO_LAB, ZeroLabRun, lambda lab: [lab_run(lab)]),
}
"""The flow, its settings and the runs that they ask for, by the name of the flow's parameter."""


def _name(run: FlowRun) -> str | None:
    """Return the name of a run by its settings; None for a run of another flow."""
    for parameter, given in run.parameters.items():
        if parameter in _FORMS:
            flow, config, _ = _FORMS[parameter]
            return name_of(flow, config, given)
    return None


def _refusal(run: FlowRun) -> str | None:
    """Return why the settings of a run cannot work; None if quick checks find no reason."""
    try:
        for parameter, given in run.parameters.items():
            if parameter in _FORMS:
                _, config, runs_of = _FORMS[parameter]
                for each in runs_of(form.read(config, given)):
                    require_possible(each)
    except ValueError as error:
        return error_message(error)
    return None


def _log(client: SyncPrefectClient, run: FlowRun, level: int, message: str) -> None:
    """Add a line to the logs of a run, with which its page opens."""
    now = datetime.now(UTC)
    client.create_logs(
        [LogCreate(name=__name__, level=level, message=message, timestamp=now, flow_run_id=run.id)]
    )


def _explain(client: SyncPrefectClient, run: FlowRun, message: str, told: dict[UUID, str]) -> None:
    state = run.state
    assert state is not None
    if state.message != message:
        later: State[Any] = Late(scheduled_time=state.state_details.scheduled_time, message=message)
        if state.name == "Scheduled":
            client.set_flow_run_state(run.id, later)  # refused if a worker has taken the run
        else:
            kept = later.model_copy(update={"name": state.name})
            client.set_flow_run_state(run.id, kept, force=True)
        _log(client, run, logging.INFO, message)
    if told.get(run.id) != message:
        told[run.id] = message
        log.info("%s: %s", run.name, message)


def _restore(client: SyncPrefectClient, run: FlowRun) -> None:
    """Restore the message that a cancelled run ended with, if its worker has overwritten it."""
    if run.state is None or run.state.message != _OF_A_WORKER:
        return
    states = [state for state in client.read_flow_run_states(run.id) if state.is_cancelled()]
    own = [s.message for s in states if s.message and s.message != _OF_A_WORKER]
    if own:
        client.set_flow_run_state(run.id, Cancelled(message=own[-1]), force=True)
