"""Stages as Prefect tasks: which failures are retried, on a real server."""

from collections.abc import Callable, Iterator

import pytest
from pipeline import api
from prefect import flow
from prefect.exceptions import TerminationSignal
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_LOGGING_TO_API_ENABLED,
    temporary_settings,
)

from zeroflow.data.hub import HubError
from zeroflow.orchestration.stages import (
    Retries,
    as_task,
    is_transient,
    was_killed,
    was_remedied,
)
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
def test_each_stage_retries_only_transient_failures(condition, retried):
    assert [e for e in [HUB_IS_BUSY, KILLED, REMEDIED, *FOR_GOOD] if condition(e)] == [retried]


@pytest.fixture
def server(prefect_api: str) -> Iterator[str]:
    settings = {PREFECT_API_URL: prefect_api, PREFECT_LOGGING_TO_API_ENABLED: False}
    with temporary_settings(settings):
        yield prefect_api


def attempts(
    stage: Callable[[list[int]], object], *retries: object, name: str = "a stage"
) -> tuple[int, object]:
    """How often a stage is run as a task within a flow, and what comes of it."""
    calls: list[int] = []
    run = as_task(name, stage, *retries)

    @flow(name="test of stages", persist_result=False)
    def whole() -> object:
        try:
            return [run(calls)]
        except BaseException as error:
            return [error]

    [found] = whole()
    return len(calls), found


def test_check_whose_process_is_killed_is_retried_and_a_failed_one_is_not(server):
    def killed_once(calls: list[int]) -> str:
        calls.append(1)
        if len(calls) == 1:
            raise KILLED
        return "passed"

    def fails(calls: list[int]) -> str:
        calls.append(1)
        raise ValueError("a wrong setting")

    retried = Retries(2, was_killed)
    assert attempts(killed_once, retried) == (2, "passed")
    count, error = attempts(fails, retried)
    assert count == 1 and isinstance(error, ValueError) and str(error) == "a wrong setting"


def test_stage_that_keeps_failing_ends_with_its_own_error_after_its_retries(server):
    def killed(calls: list[int]) -> str:
        calls.append(1)
        raise KILLED

    assert attempts(killed, Retries(2, was_killed)) == (3, KILLED)


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(143), TerminationSignal(15)])
def test_stage_that_is_stopped_is_cancelled_and_not_crashed(server, stop):
    def stopped(calls: list[int]) -> str:
        calls.append(1)
        raise stop

    name = f"stopped by {type(stop).__name__}"
    assert attempts(stopped, Retries(2, was_killed), name=name) == (1, stop)
    [run] = api(server, "/task_runs/filter", task_runs={"name": {"any_": [name]}})
    assert (run["state_type"], run["state_name"]) == ("CANCELLED", "Cancelled")


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
