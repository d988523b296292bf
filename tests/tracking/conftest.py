"""An MLflow store of a cache, and a run for it."""

import shutil
from pathlib import Path

import pytest
from mlflow_runs import begun

from zeroflow.tracking import delivery
from zeroflow.tracking.config import TrackingConfig, database, location


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """Wait for as long as a busy machine needs, and no longer than it must."""
    monkeypatch.setattr(delivery, "CLOSE_SECONDS", 300.0)
    monkeypatch.setattr(delivery, "FLUSH_SECONDS", 0.05)
    monkeypatch.setattr(delivery, "RETRY_SECONDS", 0.05)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture(scope="session")
def tables(tmp_path_factory) -> Path:
    """A database with MLflow's tables, which take it seconds to create."""
    from mlflow.tracking import MlflowClient

    path = database(tmp_path_factory.mktemp("store"))
    MlflowClient(f"sqlite:///{path}")
    return path


@pytest.fixture
def config(tmp_path, monkeypatch, tables) -> TrackingConfig:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri, folder = location(tmp_path)
    assert folder is not None
    folder.mkdir()
    shutil.copy(tables, database(folder))
    return TrackingConfig(
        uri=uri,
        folder=folder,
        run_name="mine",
        tags={"size": "tiny"},
        params={"seed": "7", "long": "x" * 9000},
        dataset={"name": "sample", "digest": "abc", "source": "sample@1"},
    )


@pytest.fixture
def mine(tmp_path):
    return begun(tmp_path, "mine")
