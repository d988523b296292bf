"""Reasons in the states of flow runs, on a real server whose runs nobody executes."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from pipeline import LOGINS
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolUpdate
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.settings import temporary_settings
from prefect.states import Cancelled, Cancelling, Late, Pending, Running, Scheduled, State
from prefect.tasks import Task

from zeroflow.orchestration import waiting, worker
from zeroflow.orchestration.access import Api
from zeroflow.orchestration.deployments import set_up
from zeroflow.orchestration.names import FROM_A_COMMAND, WORK_POOL


@flow(name="queued")
def queued() -> None: ...


@pytest.fixture
def client(prefect_api: str) -> Iterator[SyncPrefectClient]:
    with (
        temporary_settings(Api(prefect_api, LOGINS[prefect_api]).settings),
        get_client(sync_client=True) as client,
    ):
        set_up()
        yield client
        client.update_work_pool(WORK_POOL, WorkPoolUpdate(is_paused=False))
        for run in client.read_flow_runs():
            client.delete_flow_run(run.id)


class Runs:
    """Flow runs of a deployment in our work pool."""

    def __init__(self, client: SyncPrefectClient) -> None:
        self.client = client
        self.deployment = client.create_deployment(
            flow_id=client.create_flow(queued), name="tiny", work_pool_name=WORK_POOL
        )

    def new(self, name: str, state: State[Any], **more: Any) -> UUID:
        create = self.client.create_flow_run_from_deployment
        return create(self.deployment, name=name, state=state, **more).id

    def logs(self, run: UUID) -> list[str]:
        chosen = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run]))
        return [line.message for line in self.client.read_logs(chosen)]

    def state(self, run: UUID) -> State[Any]:
        state = self.client.read_flow_run(run).state
        assert state is not None
        return state

    def message(self, run: UUID) -> str | None:
        return self.state(run).message


def test_queued_run_says_why_it_waits(client, caplog):
    runs, told = Runs(client), {}
    ago, ahead = (datetime.now(UTC) + timedelta(minutes=n) for n in (-1, 60))
    new = runs.new("new", Scheduled(scheduled_time=ago))
    late = runs.new("late", Late(scheduled_time=ago))
    later = runs.new("later", Scheduled(scheduled_time=ahead))
    taken = runs.new("taken", Pending())
    shown = client.create_task_run(Task(queued.fn), taken, dynamic_key="child")
    runs.new("child", Running(), parent_task_run_id=shown.id)
    runs.new("of a terminal", Running(), tags=[FROM_A_COMMAND])

    def said(*, of: UUID = late) -> str | None:
        waiting.explain(told)
        assert runs.state(later).name == "Scheduled" and runs.message(later) is None
        return runs.message(of)

    assert said() == "Waiting: the worker is busy with taken."
    assert said(of=new) == said() and runs.state(new).name == "Late"
    assert runs.state(late).state_details.scheduled_time == ago
    assert runs.state(taken).name == "Pending"

    assert runs.logs(late) == [said()]
    client.update_work_pool(WORK_POOL, WorkPoolUpdate(concurrency_limit=1))
    assert said() == (
        "Waiting: the concurrency limit of the work pool, 1, is reached, by of a terminal and "
        "taken."
    )
    client.update_work_pool(WORK_POOL, WorkPoolUpdate(concurrency_limit=9))
    client.set_flow_run_state(taken, Cancelled(), force=True)
    assert str(said()).startswith(f"Waiting: no worker of the work pool {WORK_POOL} is online; ")
    client.update_work_pool(WORK_POOL, WorkPoolUpdate(is_paused=True))
    assert said() == f"Waiting: the work pool {WORK_POOL} is paused; resume it on its page."

    before = len(client.read_flow_run_states(late))
    assert said() and len(client.read_flow_run_states(late)) == before, "written once"
    assert len(told) == 2


def test_contradictory_settings_of_a_queued_run_are_refused_while_the_worker_is_busy(client):
    runs = Runs(client)
    runs.new("taken", Pending())
    ago = datetime.now(UTC) - timedelta(minutes=1)
    mine = {"data_mode": "files", "run_name": "mine"}
    tiny = {"data_mode": None, "size": "tiny", "model": {"hidden_size": 8}}
    wrong: list[tuple[dict[str, Any], str, str]] = [
        ({"run": mine}, "--data-mode files needs --data-path", "pretrain · mine · refused"),
        ({"run": {"warmup_steps": 500, "max_steps": 9}}, "--warmup-steps 500 leaves none of 9", ""),
        ({"sweep": {"seeds": [0, 1], "data_mode": "hub"}}, "--data-mode hub needs --data", "sweep"),
        ({"run": mine | tiny}, "size tiny and a custom shape", "pretrain · mine · refused"),
        ({"lab": {"training": {"nodes": 2, "gpus": 2}}}, "drop --nodes", "ZeRO laboratory"),
    ]
    given = [parameters for parameters, _, _ in wrong]
    queued = [runs.new("wrong", Late(scheduled_time=ago), parameters=each) for each in given]
    waiting.explain({})
    for run, (_, message, name) in zip(queued, wrong, strict=True):
        assert runs.state(run).is_failed() and message in str(runs.message(run))
        assert runs.logs(run) == [runs.message(run)]
        assert name in client.read_flow_run(run).name != "wrong"


def test_worker_gets_no_run_from_a_pool_that_is_paused_for_its_end(client):
    runs = Runs(client)
    run = runs.new("next", Scheduled(scheduled_time=datetime.now(UTC)))

    def given() -> list[UUID]:
        return [one.flow_run.id for one in client.get_scheduled_flow_runs_for_work_pool(WORK_POOL)]

    assert given() == [run]
    with worker.paused_pool():
        assert given() == []
    assert given() == [run]
    client.update_work_pool(WORK_POOL, WorkPoolUpdate(is_paused=True))
    with worker.paused_pool():
        pass
    assert client.read_work_pool(WORK_POOL).is_paused, "by the user"


def test_run_that_a_worker_took_meanwhile_is_left_to_it(client):
    runs = Runs(client)
    run = client.read_flow_run(runs.new("mine", Scheduled(scheduled_time=datetime.now(UTC))))
    client.set_flow_run_state(run.id, Pending(), force=True)
    waiting._explain(client, run, "Waiting: no reason.", {})
    assert runs.state(run.id).name == "Pending"


def test_cancelled_run_of_a_worker_keeps_its_own_last_message(client):
    runs = Runs(client)
    own = "Stopped by Cancel in Prefect: saved at step 7; Retry resumes from there."
    stopped, never_begun = runs.new("stopped", Running()), runs.new("never begun", Pending())
    for run, messages in ((stopped, [own]), (never_begun, [])):
        client.set_flow_run_state(run, Cancelling(), force=True)
        for message in [*messages, "Flow run was cancelled successfully."]:
            client.set_flow_run_state(run, Cancelled(message=message))
    assert runs.message(stopped) == "Flow run was cancelled successfully.", "Prefect's worker"
    waiting.explain({})
    assert runs.message(stopped) == own
    assert runs.message(never_begun) == "Flow run was cancelled successfully."
