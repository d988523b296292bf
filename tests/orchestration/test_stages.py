"""Stages as Prefect tasks: which failures are retried, on a real server."""

from collections.abc import Callable, Iterator

import pytest
from pipeline import api
from prefect import flow
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_LOGGING_TO_API_ENABLED,
    temporary_settings,
)
from prefect.states import Failed

from zeroflow.data.hub import HubError
from zeroflow.orchestration.stages import as_task, is_transient, was_killed, was_remedied
from zeroflow.reuse import StageResult
from zeroflow.training.failures import RunIsBusy, TrainingFailed


def training_failed(reason: str = "error", *, will_retry: bool = False) -> TrainingFailed:
    failure = TrainingFailed("it failed", reason)
    failure.will_retry = will_retry
    return failure


HUB_IS_BUSY = HubError("a dataset", "the hub answers 503", transient=True)
HUB_REFUSES = HubError("a dataset", "gated", transient=False)
KILLED, REMEDIED = training_failed("killed"), training_failed("out of memory", will_retry=True)
FOR_GOOD = [
    HUB_REFUSES,
    training_failed("hang"),
    training_failed("diverged"),
    RunIsBusy("another process is at work"),
    ValueError("a wrong setting"),
    OSError("the disk is full"),
]


@pytest.mark.parametrize(
    ("condition", "retried"),
    [(is_transient, HUB_IS_BUSY), (was_killed, KILLED), (was_remedied, REMEDIED)],
)
def test_each_stage_retries_what_may_succeed_next_time_and_nothing_else(condition, retried):
    class Named:
        name = "a stage"

    errors = [HUB_IS_BUSY, KILLED, REMEDIED, *FOR_GOOD]
    assert [e for e in errors if condition(Named(), None, Failed(data=e))] == [retried]


@pytest.fixture
def server(prefect_api: str) -> Iterator[str]:
    settings = {PREFECT_API_URL: prefect_api, PREFECT_LOGGING_TO_API_ENABLED: False}
    with temporary_settings(settings):
        yield prefect_api


def attempts(stage: Callable[[list[int]], object], **retries: object) -> tuple[int, object]:
    """How often a stage is run as a task within a flow, and what comes of it."""
    calls: list[int] = []
    run = as_task("a stage", stage, **retries)

    @flow(name="test of stages", persist_result=False)
    def whole() -> object:
        try:
            return [run(calls)]
        except Exception as error:
            return [error]

    [found] = whole()
    return len(calls), found


def test_check_whose_process_is_killed_is_tried_again_and_one_that_fails_is_not(server):
    def killed_once(calls: list[int]) -> str:
        calls.append(1)
        if len(calls) == 1:
            raise KILLED
        return "passed"

    def fails(calls: list[int]) -> str:
        calls.append(1)
        raise ValueError("a wrong setting")

    retries = {"retries": 2, "retry_condition_fn": was_killed}
    assert attempts(killed_once, **retries) == (2, "passed")
    count, error = attempts(fails, **retries)
    assert count == 1 and isinstance(error, ValueError) and str(error) == "a wrong setting"


@pytest.mark.parametrize("reused", [True, False])
def test_stage_with_nothing_to_do_is_shown_as_reused(server, reused):
    result = StageResult(reused=reused, why="it is there")
    name = f"stage reused {reused}"

    @flow(name="test of stages", persist_result=False)
    def whole() -> StageResult:
        return as_task(name, lambda: result)()

    assert whole() == result
    [run] = api(server, "/task_runs/filter", task_runs={"name": {"any_": [name]}})
    assert run["state_name"] == ("Reused" if reused else "Completed")
    assert run["state_type"] == "COMPLETED"
