"""`zeroflow ui` with real servers and a real worker."""

import json
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from pipeline import Ui, api

from zeroflow import orchestration, ui
from zeroflow.ui import UiConfig

SIZES = {"tiny", "small", "medium", "custom"}


@pytest.fixture
def both(tmp_path: Path, base_environment: dict[str, str]) -> Iterator[Ui]:
    both = Ui(tmp_path / "cache", base_environment)
    yield both
    if both.process.poll() is None:
        both.process.kill()
        both.process.communicate()


@pytest.mark.slow
def test_everything_is_there_and_ends_together(both: Ui) -> None:
    said = both.start()
    assert f"Prefect UI        {both.prefect}" in said
    charts = f"{both.mlflow}/#/experiments/1/runs?compareRunsMode=CHART"
    assert f"loss of all runs  {charts}" in said
    deployments = api(f"{both.prefect}/api", "/deployments/filter")
    assert {deployment["name"] for deployment in deployments} >= SIZES
    [schedule] = [schedule for deployment in deployments for schedule in deployment["schedules"]]
    assert not schedule["active"]
    assert all(deployment["concurrency_limit"] is None for deployment in deployments)
    [limit] = api(f"{both.prefect}/api", "/v2/concurrency_limits/filter")
    assert (limit["name"], limit["limit"]) == (orchestration.GPU_LIMIT, 1)
    experiment = f"{both.mlflow}/ajax-api/2.0/mlflow/experiments/get?experiment_id=1"
    with urllib.request.urlopen(experiment) as answer:
        assert json.load(answer)["experiment"]["name"] == "zeroflow"

    # a second one uses Prefect's server, and finds MLflow's port taken
    second = subprocess.run(
        both.command, env=both.environment, text=True, capture_output=True, timeout=120
    )
    assert second.returncode == 1
    assert f"port {both.ports['mlflow']} is taken" in second.stderr
    assert "--mlflow-port" in second.stderr and "--prefect-port" not in second.stderr

    both.process.send_signal(signal.SIGINT)
    both.end(expect=0)


@pytest.mark.slow
def test_end_of_one_ends_the_others_and_is_told(both: Ui) -> None:
    both.start()
    [mlflow] = [
        child
        for child in psutil.Process(both.process.pid).children()
        if "mlflow" in child.cmdline()
    ]
    mlflow.kill()
    said = both.end(expect=1)
    assert "error: MLflow's server has ended with exit code -9; the end of " in said


def test_port_that_something_else_holds_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = UiConfig(prefect_port=port, cache_dir=tmp_path)
        with pytest.raises(ValueError, match=f"port {port} is taken .* another --prefect-port"):
            ui.serve(config)
