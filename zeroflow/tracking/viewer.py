"""TODO docstring."""

import sys
from pathlib import Path
from typing import NamedTuple

from zeroflow import artifacts
from zeroflow.run_folder import RunFolder
from zeroflow.tracking.config import PORT, is_server, location
from zeroflow.tracking.store import open_store, run_facts

_ADDRESS_FILE = "address.json"


# In any order but that of time, or the runs of a sweep are hidden within it, and out of the charts
_CHARTS = (
    "runs?compareRunsMode=CHART&workflowType=machine_learning"
    "&orderByKey=metrics.%60loss%2Fval%60&orderByAsc=true"
)


class Viewer(NamedTuple):
    """MLflow's server, which shows the runs."""

    address: str
    experiment_id: str
    command: list[str] | None
    """That starts it; None for one that MLFLOW_TRACKING_URI names."""

    @property
    def charts(self) -> str:
        return charts_page(self.address, self.experiment_id)


def viewer(cache: Path, port: int) -> Viewer:
    """How to see the runs of `cache`, whose store is made if it is not there.

    Pages that runs link to are expected at `port` from then on.
    """
    uri, folder = location(cache)
    _, experiment_id = open_store(uri, folder)
    if is_server(uri):
        return Viewer(uri, experiment_id, None)
    if folder is not None:
        artifacts.write_json(folder / _ADDRESS_FILE, {"address": local_address(port)})
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1", "--backend-store-uri", uri]
    return Viewer(local_address(port), experiment_id, command)


VIEWER_ENVIRONMENT = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "DO_NOT_TRACK": "true"}
"""A sixth of the memory that the server takes otherwise."""


def links(folder: RunFolder) -> dict[str, str]:
    """Pages of MLflow's server, by what they show; none while the run is not known there."""
    if (facts := run_facts(folder)) is None:
        return {}
    uri, store = location(folder.cache.path)
    address = uri if is_server(uri) else local_address(PORT)
    if store is not None and (noted := store / _ADDRESS_FILE).exists():
        address = artifacts.read_json(noted)["address"]
    experiment = facts["experiment_id"]
    return {
        "this run": f"{address}/#/experiments/{experiment}/runs/{facts['run_id']}",
        "loss of all runs": charts_page(address, experiment),
    }


def local_address(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def charts_page(address: str, experiment_id: str) -> str:
    """The page that draws all runs over each other."""
    return f"{address}/#/experiments/{experiment_id}/{_CHARTS}"
