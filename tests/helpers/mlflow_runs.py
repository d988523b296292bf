"""Runs in MLflow, and reading them back from its store."""

from pathlib import Path

from zeroflow.run_folder import Cache, RunFolder
from zeroflow.tracking.config import TrackingConfig
from zeroflow.tracking.store import run_ids

HARD = "a?b#c%20d [e]&f=ä"
"""A folder's name with all that has a meaning in an address."""


def begun(cache: Path, name: str) -> RunFolder:
    folder = Cache(cache).run(name)
    folder.path.mkdir(parents=True)
    return folder


def client(config: TrackingConfig):
    from mlflow.tracking import MlflowClient

    return MlflowClient(config.uri)


def the_run(config: TrackingConfig, folder: RunFolder):
    ids = run_ids(folder)
    assert ids is not None
    return client(config).get_run(ids.run_id)
