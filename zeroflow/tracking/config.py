"""Name, tags and location of a run in MLflow."""

import os
from pathlib import Path

from zeroflow.config import Config
from zeroflow.records import Record
from zeroflow.run_folder import Cache

EXPERIMENT = "zeroflow"

DESCRIPTION, PARENT = "mlflow.note.content", "mlflow.parentRunId"
"""Tags that MLflow's pages show."""

PORT = 5000
"""Default port of MLflow's server."""


class Dataset(Config):
    """Rows as an MLflow dataset."""

    name: str
    digest: str
    source: str


class TrackingConfig(Record):
    """The MLflow run of a run or a sweep."""

    uri: str
    folder: Path | None
    """Folder of the SQLite file and the artifacts; None if a server keeps them."""

    run_name: str
    tags: dict[str, str]
    params: dict[str, str]
    dataset: Dataset | None
    """Rows that the run trains on; None for a sweep."""


def location(cache: Path) -> tuple[str, Path | None]:
    """Tracking URI and its local folder: MLFLOW_TRACKING_URI, or SQLite in the cache."""
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri, None
    folder = Cache(cache.resolve()).mlflow
    return f"sqlite:///{folder / 'mlflow.db'}", folder


def is_server(uri: str) -> bool:
    """True if an MLflow server keeps the runs, False if it only shows a store."""
    return uri.startswith(("http://", "https://"))
