"""Name, tags and location of an MLflow run."""

import os
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from zeroflow.config import Config
from zeroflow.records import Record
from zeroflow.run_folder import Cache
from zeroflow.text.redaction import redacted

TrackerName = Literal["tensorboard", "wandb"]
"""Trackers that a run may use in addition to MLflow, by their packages."""

EXPERIMENT = "zeroflow"
"""Name of the MLflow experiment of all runs."""

_VARIABLE = "MLFLOW_TRACKING_URI"

DESCRIPTION, PARENT = "mlflow.note.content", "mlflow.parentRunId"
SOURCE, COMMIT = "mlflow.source.name", "mlflow.source.git.commit"
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
    """Tracking URI without its password; `address` returns the one to open."""

    folder: Path | None
    """Folder of the SQLite file and the artifacts; None if a server stores them."""

    run_name: str
    tags: dict[str, str]
    params: dict[str, str]
    dataset: Dataset | None
    """The rows that the run trains on; None for a sweep."""

    log_to: tuple[TrackerName, ...] = ()
    """Trackers used in addition to MLflow."""


def location(cache: Path) -> tuple[str, Path | None]:
    """Return the tracking URI without its password, and the local folder of the store.

    If MLFLOW_TRACKING_URI is set, it is used and the folder is None. Otherwise the store is a
    SQLite file in the cache.
    """
    folder = None if os.environ.get(_VARIABLE) else Cache(cache.resolve()).mlflow
    return redacted(address(folder)), folder


def address(folder: Path | None) -> str:
    """Return the tracking URI to open, which may contain a password.

    Args:
        folder: folder of a local store; None for the one at MLFLOW_TRACKING_URI.

    Raises:
        ValueError: `folder` is None, and MLFLOW_TRACKING_URI is not set.
    """
    if folder is not None:
        return _sqlite_uri(database(folder))
    if uri := os.environ.get(_VARIABLE):
        return uri
    raise ValueError(f"the run is kept by an MLflow server: name it in {_VARIABLE}")


def database(folder: Path) -> Path:
    return folder / "mlflow.db"


def _sqlite_uri(path: Path) -> str:
    if "?" not in str(path):
        return f"sqlite:///{path}"
    # SQLAlchemy reads the text after ? as options, so the path is given as a file: URI, which
    # SQLite decodes. The driver is named because MLflow would create a folder `file:` for
    # sqlite:///file:
    return f"sqlite+pysqlite:///file:{quote(str(path))}?uri=true"


def is_server(uri: str) -> bool:
    """Return True if `uri` is the address of an MLflow server, False if it is that of a store."""
    return uri.startswith(("http://", "https://"))
