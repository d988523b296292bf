"""`zeroflow ui` with real servers and a real worker."""

import json
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from patience import HANG_SECONDS, wait_until
from pipeline import Ui, api, free_port
from prefect.settings import PREFECT_HOME
from tiny import SHAPE
from wheel import build_wheel, install

from zeroflow import artifacts
from zeroflow.orchestration import ui
from zeroflow.orchestration.names import GPU_LIMIT
from zeroflow.orchestration.ui import UiConfig

SIZES = {"tiny", "small", "medium", "custom"}


@pytest.fixture
def both(tmp_path: Path, base_environment: dict[str, str]) -> Iterator[Ui]:
    both = Ui(tmp_path / "cache", base_environment)
    yield both
    if both.process.poll() is None:
        both.process.kill()
        both.process.communicate()


@pytest.mark.slow
def test_all_programs_start_and_end_together(both: Ui) -> None:
    said = both.start()
    assert f"Prefect UI        {both.prefect}" in said
    [file] = (both.cache / "prefect" / "zeroflow").glob("login-*")
    assert f"  its login       in {file}" in said and both.login not in said
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{both.prefect}/api/admin/version")
    assert not any(both.login in word for one in both.programs() for word in one.cmdline())
    logs = list((both.cache / "ui").glob("*.log"))
    assert len(logs) == 4 and {log.stat().st_mode & 0o077 for log in [file, *logs]} == {0}
    runs = f"{both.mlflow}/#/experiments/1/runs?workflowType=machine_learning"
    assert f"MLflow UI         {runs}&order" in said
    assert f"loss of all runs  {runs}&compareRunsMode=CHART" in said
    deployments = api(f"{both.prefect}/api", "/deployments/filter")
    assert {deployment["name"] for deployment in deployments} >= SIZES
    [schedule] = [schedule for deployment in deployments for schedule in deployment["schedules"]]
    assert not schedule["active"]
    assert all(deployment["concurrency_limit"] is None for deployment in deployments)
    [limit] = api(f"{both.prefect}/api", "/v2/concurrency_limits/filter")
    assert (limit["name"], limit["limit"]) == (GPU_LIMIT, 1)
    experiment = f"{both.mlflow}/ajax-api/2.0/mlflow/experiments/get?experiment_id=1"
    with urllib.request.urlopen(experiment) as answer:
        assert json.load(answer)["experiment"]["name"] == "zeroflow"

    # a second one uses Prefect's server, and finds MLflow's port taken
    second = subprocess.run(
        both.command, env=both.environment, text=True, capture_output=True, timeout=HANG_SECONDS
    )
    assert second.returncode == 1
    assert f"port {both.ports['mlflow']} is taken" in second.stderr
    assert "--mlflow-port" in second.stderr and "--prefect-port" not in second.stderr

    both.process.send_signal(signal.SIGINT)
    both.end(expect=0)
    assert not file.exists()


def deployments_of(both: Ui) -> dict[str, Any]:
    found = api(f"{both.prefect}/api", "/deployments/filter")
    return {deployment["name"]: deployment for deployment in found}


def schedules_of(both: Ui, name: str) -> set[tuple[str, bool]]:
    found = deployments_of(both)[name]["schedules"]
    return {(one["schedule"]["cron"], one["active"]) for one in found}


@pytest.mark.slow
def test_forms_write_to_its_folder_and_schedules_set_in_prefect_outlive_a_restart(both: Ui) -> None:
    both.start()
    there = deployments_of(both)
    runs = [there[name]["parameters"]["run"] for name in SIZES]
    runs += [there["sizes"]["parameters"]["sweep"]]
    assert {run["cache_dir"] for run in runs} == {str(both.cache)}
    assert there["small"]["parameters"]["run"]["size"] == "small"
    small, tiny = (f"/deployments/{there[name]['id']}" for name in ("small", "tiny"))
    [example] = there["small"]["schedules"]
    prefect = f"{both.prefect}/api"
    api(prefect, f"{small}/schedules/{example['id']}", method="PATCH", active=True)
    for deployment in (small, tiny):
        schedule = {"schedule": {"cron": "0 4 * * *"}, "active": True}
        api(prefect, f"{deployment}/schedules", [schedule])
    mine = ("0 4 * * *", True)
    scheduled = {there[name]["id"] for name in ("small", "tiny")}
    runs = "/flow_runs/filter"
    wait_until(
        lambda: {run["deployment_id"] for run in api(f"{both.prefect}/api", runs)} == scheduled
    )
    both.process.send_signal(signal.SIGINT)
    both.end(expect=0)

    both.start()
    assert schedules_of(both, "small") == {("0 2 * * *", True), mine}
    assert schedules_of(both, "tiny") == {mine}
    both.process.send_signal(signal.SIGINT)
    both.end(expect=0)


@pytest.mark.slow
def test_worker_that_fails_after_a_hasty_retry_is_restarted(both: Ui) -> None:
    """The run is retried while its process is there for certain: it has not ended at all."""
    both.environment |= {"PREFECT_WORKER_QUERY_SECONDS": "1"}
    both.start()
    training = {"seq_len": 32, "batch_size": 4, "grad_accum_steps": 1, "max_steps": 100_000}
    run = {"run_name": "hasty", "cache_dir": str(both.cache), "skip_preflight": True}
    run |= {"model": SHAPE.model_dump(), "training": training}
    run |= {"data": {"data_mode": "synthetic"}, "tokenizer": {"vocab_size": 512}}
    path = f"/deployments/{deployments_of(both)['custom']['id']}/create_flow_run"
    flow_run = api(f"{both.prefect}/api", path, parameters={"run": run})["id"]

    def state(*wanted: str) -> None:
        def there() -> bool:
            [found] = api(f"{both.prefect}/api", "/flow_runs/filter")
            return found["state_name"] in wanted

        wait_until(there, " or ".join(wanted))

    state("Running")
    retry = {"type": "SCHEDULED", "name": "AwaitingRetry"}
    api(f"{both.prefect}/api", f"/flow_runs/{flow_run}/set_state", state=retry, force=True)
    state("Retrying", "Rerunning", "Running")
    both.process.send_signal(signal.SIGINT)
    assert "restarting Prefect's worker" in both.end(expect=0)


@pytest.mark.slow
def test_installed_wheel_serves_deploys_and_trains_in_any_folder(
    tmp_path: Path, base_environment: dict[str, str]
) -> None:
    programs = install(build_wheel(tmp_path / "wheel"), tmp_path / "environment")
    (tmp_path / "empty").mkdir()
    environment = {k: v for k, v in base_environment.items() if k != "PYTHONPATH"}
    environment |= {"PREFECT_WORKER_QUERY_SECONDS": "1"}
    program = (str(programs / "zeroflow"),)
    both = Ui(tmp_path / "cache", environment, program, tmp_path / "empty")
    both.start()
    try:
        training = {"seq_len": 32, "batch_size": 4, "grad_accum_steps": 1, "max_steps": 12}
        run = {"run_name": "anywhere", "skip_preflight": True, "overfit": {"overfit_loss": 20}}
        run |= {"model": SHAPE.model_dump(), "training": training, "cache_dir": str(both.cache)}
        run |= {"data": {"data_mode": "synthetic"}, "tokenizer": {"vocab_size": 512}}
        path = f"/deployments/{deployments_of(both)['custom']['id']}/create_flow_run"
        api(f"{both.prefect}/api", path, parameters={"run": run})

        def ended() -> str | None:
            [found] = api(f"{both.prefect}/api", "/flow_runs/filter")
            state: str = found["state_type"]
            return state if state in ("COMPLETED", "FAILED", "CRASHED") else None

        assert wait_until(ended) == "COMPLETED"
        assert (both.cache / "runs" / "anywhere" / "report.json").exists()
    finally:
        both.process.send_signal(signal.SIGINT)
        both.end(expect=0)
    assert not list((tmp_path / "empty").iterdir())


@pytest.mark.slow
def test_end_of_one_program_ends_the_others_and_is_reported(both: Ui) -> None:
    both.start()
    [mlflow] = [
        child
        for child in psutil.Process(both.process.pid).children()
        if "mlflow" in child.cmdline()
    ]
    mlflow.kill()
    said = both.end(expect=1)
    assert "error: MLflow's server has ended with exit code -9. Last lines of " in said


def test_port_that_is_in_use_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = UiConfig(prefect_port=port, cache_dir=tmp_path)
        with pytest.raises(ValueError, match=f"port {port} is taken .* another --prefect-port"):
            ui.serve(config)


def test_second_worker_for_the_same_database_of_prefect_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    config = UiConfig(prefect_port=free_port(), mlflow_port=free_port(), cache_dir=tmp_path)
    home = Path(PREFECT_HOME.value())
    with (
        artifacts.exclusive(home / "zeroflow" / "ui", waiting_for=None),
        pytest.raises(ValueError, match=r"another `zeroflow ui` with PREFECT_HOME .* is running"),
    ):
        ui.serve(config)
    assert not list((tmp_path / "ui").iterdir()), "no program has a log"


def test_both_servers_need_different_ports():
    with pytest.raises(ValueError, match="both servers cannot listen on port 4200"):
        UiConfig(prefect_port=4200, mlflow_port=4200)


def test_mlflow_server_that_does_not_answer_is_named_before_prefect_starts(tmp_path, monkeypatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:s3cret@127.0.0.1:{free_port()}")
    config = UiConfig(prefect_port=free_port(), cache_dir=tmp_path)
    with pytest.raises(
        RuntimeError, match=r"MLFLOW_TRACKING_URI http://\*\*\*@.*unset the"
    ) as error:
        ui.serve(config)
    assert "s3cret" not in str(error.value)
    assert not list((tmp_path / "ui").iterdir()), "no program has a log"
