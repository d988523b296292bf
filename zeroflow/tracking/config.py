"""Name, tags and location of an MLflow run."""

import os
from pathlib import Path
from urllib.parse import quote

from zeroflow.config import Config
from zeroflow.records import Record
from zeroflow.run_folder import Cache
from zeroflow.text.redaction import redacted

EXPERIMENT = "zeroflow"

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


def location(cache: Path) -> tuple[str, Path | None]:
    """Tracking URI without its password, and its local folder: SQLite in the cache.

    MLFLOW_TRACKING_URI comes first; then there is no folder.
    """
    folder = None if os.environ.get(_VARIABLE) else Cache(cache.resolve()).mlflow
    return redacted(address(folder)), folder


def address(folder: Path | None) -> str:
    """Tracking URI of the store in `folder`, or MLFLOW_TRACKING_URI, which may hold a password.

    Raises:
        ValueError: neither is given.
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
    # SQLAlchemy takes what follows ? for options, and SQLite itself decodes a file: URI. With the
    # driver's name, as MLflow would create a folder named file: for sqlite:///file:
    return f"sqlite+pysqlite:///file:{quote(str(path))}?uri=true"


def is_server(uri: str) -> bool:
    """True if an MLflow server stores the runs; False if the URI is a store."""
    return uri.startswith(("http://", "https://"))
