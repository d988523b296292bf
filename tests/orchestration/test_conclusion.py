"""The end of a flow run: a stop is Cancelled, a failure is one paragraph, on a real server."""

import logging
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from patience import HANG_SECONDS
from pipeline import api
from prefect import flow, runtime
from prefect.client.orchestration import get_client
from prefect.exceptions import CancelledRun, FailedRun, Pause, TerminationSignal
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled, Completed, Crashed, Paused, Pending, Running
from pydantic import BaseModel, model_serializer

from zeroflow.orchestration import buttons, conclusion, worker
from zeroflow.orchestration.conclusion import conclude, is_foreseen
from zeroflow.orchestration.flow_context import name_at_start
from zeroflow.orchestration.stages import as_task
from zeroflow.orchestration.view import PrefectView
from zeroflow.run_folder import RunFolder
from zeroflow.settings.run_config import RunConfig
from zeroflow.text.markup import is_for_now
from zeroflow.training.failures import TrainingStopped

WRONG = {"data": {"data_mode": "synthetic"}, "tokenizer": {"tokenizer_name": "gpt2"}}


@pytest.fixture
def server(prefect_api: str) -> Iterator[str]:
    with temporary_settings({PREFECT_API_URL: prefect_api}):
        yield prefect_api


def ended(server: str, given: Any, stage: Callable[[], Path], folder: Path) -> dict[str, Any]:
    """The flow run of a flow whose only stage is `stage`, with its log."""
    view = PrefectView()
    view.folder = RunFolder(folder)

    @flow(
        name="concluded",
        flow_run_name=name_at_start("concluded", RunConfig),
        persist_result=False,
        validate_parameters=False,
    )
    def concluded(run: Any) -> Any:
        return conclude(RunConfig, run, lambda asked: as_task("only stage", stage)(), view)

    with conclusion.observed() as outcome, suppress(FailedRun, CancelledRun, Pause):
        concluded(given)
    APILogWorker.drain_all()
    newest = {"flows": {"name": {"any_": ["concluded"]}}, "sort": "START_TIME_DESC", "limit": 1}
    [run] = api(server, "/flow_runs/filter", **newest)
    lines = api(server, "/logs/filter", logs={"flow_run_id": {"any_": [run["id"]]}})
    return run | {"lines": lines, "outcome": outcome}


def errors(run: dict[str, Any]) -> list[str]:
    return [line["message"] for line in run["lines"] if line["level"] >= logging.ERROR]


@pytest.mark.parametrize(
    ("stop", "cause"),
    [
        (KeyboardInterrupt(), "Ctrl-C"),
        (TerminationSignal(15), "a signal"),
        (SystemExit(143), "a signal"),
        (TrainingStopped("the ranks were asked to stop"), "a signal"),
    ],
)
def test_stop_is_shown_as_cancelled_with_the_saved_step_and_not_as_a_crash(
    server, tmp_path, stop, cause
):
    (tmp_path / "checkpoints" / "step-00000120").mkdir(parents=True)

    def stopped() -> Path:
        raise stop

    run = ended(server, {"run_name": "mine"}, stopped, tmp_path)
    message = f"Stopped by {cause}: saved at step 120; the same command resumes from there."
    assert (run["state_type"], run["state"]["message"]) == ("CANCELLED", message)
    assert run["outcome"].error is stop and run["outcome"].result is None
    assert errors(run) == []
    assert not any("Crash" in line["message"] for line in run["lines"])


def test_stop_before_the_first_checkpoint_names_no_checkpoint(server, tmp_path):
    def stopped() -> Path:
        raise KeyboardInterrupt

    run = ended(server, {}, stopped, tmp_path)
    assert "Ctrl-C: finished work is kept; the same command" in run["state"]["message"]


def test_stop_whose_exception_a_library_has_replaced_is_cancelled(server, tmp_path):
    class Settings(BaseModel):
        @model_serializer
        def shown(self) -> dict[str, int]:
            signal.raise_signal(signal.SIGINT)
            return {}

    run = ended(server, {}, lambda: tmp_path / str(Settings().model_dump()), tmp_path)
    message = "Stopped by Ctrl-C: finished work is kept; the same command resumes from there."
    assert (run["state_type"], run["state"]["message"]) == ("CANCELLED", message)
    assert isinstance(run["outcome"].error, KeyboardInterrupt)


def test_stop_of_a_suspended_run_leaves_it_suspended(server, tmp_path):
    def suspended() -> Path:
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(UUID(runtime.flow_run.id), Paused(timeout_seconds=60))
        raise TerminationSignal(15)

    run = ended(server, {}, suspended, tmp_path)
    assert run["state_type"] == "PAUSED"
    assert isinstance(run["outcome"].error, TerminationSignal)
    assert any("Resume resumes from there" in line["message"] for line in run["lines"])


@pytest.mark.parametrize("by_worker", [False, True])
def test_process_of_a_suspended_run_is_signalled(server, monkeypatch, by_worker):
    @flow(name="watched")
    def empty() -> None: ...

    monkeypatch.setattr(buttons, "_POLL_SECONDS", 0.01)
    arrived = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *received: arrived.set())
    try:
        with get_client(sync_client=True) as client:
            id = client.create_flow_run(empty, state=Running()).id
            with buttons.watched(id, by_worker=by_worker, stopped=lambda: False) as cancelled:
                client.set_flow_run_state(id, Paused(timeout_seconds=60))
                assert arrived.wait(HANG_SECONDS)
        assert not cancelled.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_failure_of_a_setting_is_one_paragraph_without_a_traceback(server, tmp_path, caplog):
    def refuses() -> Path:
        error = ValueError("2 parts hold 3 rows, fewer than a batch: lower --batch-size")
        error.add_note("retry: the same command")
        raise_as_ours(error)

    run = ended(server, {"run_name": "mine", "model": {"size": "small"}}, refuses, tmp_path)
    paragraph = (
        "2 parts hold 3 rows, fewer than a batch: lower --batch-size\nretry: the same command"
    )
    assert run["name"] == "small · auto · mine"
    assert (run["state_type"], run["state"]["message"]) == ("FAILED", paragraph)
    assert errors(run) == [paragraph]
    shown = [record for record in caplog.records if record.getMessage() == paragraph]
    assert shown and not any(map(is_for_now, shown)), "the terminal has it once, at the end"


def raise_as_ours(error: Exception) -> None:
    """Raise `error` in a function that counts as one of the package."""
    exec("def fail(error):\n    raise error", module := {"__name__": "zeroflow.somewhere"})
    module["fail"](error)


def test_wrong_settings_are_one_paragraph_and_the_run_is_named(server, tmp_path):
    def never() -> Path:
        pytest.fail("the settings are wrong")

    run = ended(server, WRONG, never, tmp_path)
    [error] = errors(run)
    assert error.startswith("synthetic data is token ids and needs no tokenizer: drop ")
    assert (run["name"], run["state"]["message"]) == ("concluded · refused", error)


def test_error_of_the_code_has_its_traceback_once(server, tmp_path):
    def broken() -> Path:
        return {}["no such key"]

    run = ended(server, {}, broken, tmp_path)
    [error] = errors(run)
    assert error.startswith("'no such key'\nTraceback") and "in broken" in error
    assert run["state"]["message"] == "'no such key'"


def test_message_is_for_the_user_if_our_code_or_the_system_raised_it(tmp_path):
    def raised_by(work: Callable[[], object]) -> Exception:
        try:
            work()
        except Exception as error:
            return error
        raise AssertionError(traceback.format_exc())

    assert is_foreseen(raised_by(lambda: RunConfig(seed=-1)))
    assert is_foreseen(raised_by((tmp_path / "gone").read_text))
    assert is_foreseen(raised_by(lambda: raise_as_ours(RuntimeError("1 run failed"))))
    assert not is_foreseen(raised_by(lambda: int("x")))
    assert not is_foreseen(raised_by(lambda: {}[1]))


def test_result_is_passed_on(server, tmp_path):
    run = ended(server, {}, lambda: tmp_path, tmp_path)
    assert run["state_type"] == "COMPLETED"
    assert (run["outcome"].result, run["outcome"].error) == (tmp_path, None)


def test_end_of_the_ui_marks_what_it_stopped_and_nothing_else(server):
    @flow(name="stopped early")
    def early() -> None: ...

    before = [Crashed(), Running(), Pending(), Completed(), Cancelled(message="saved at step 5")]
    with get_client(sync_client=True) as client:
        ids = [client.create_flow_run(early, state=state).id for state in before]
        worker.mark_stopped(ids)
        states = [client.read_flow_run(id).state for id in ids]
    assert [state.type.value for state in states] == [*["CANCELLED"] * 3, "COMPLETED", "CANCELLED"]
    assert all("Retry resumes it" in state.message for state in states[:3])
    assert states[-1].message == "saved at step 5"
