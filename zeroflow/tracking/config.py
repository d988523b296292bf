"""TODO docstring."""

import os
from pathlib import Path

from zeroflow.config import Config
from zeroflow.run_folder import Cache

EXPERIMENT = "zeroflow"


DESCRIPTION, PARENT = "mlflow.note.content", "mlflow.parentRunId"
"""Tags that MLflow's pages read."""


PORT = 5000
"""Where MLflow's server listens, unless another was asked for."""


class TrackingConfig(Config):
    """The MLflow run of a zeroflow run."""

    uri: str
    folder: Path | None
    """Folder of the SQLite file and the artifacts; None when a server keeps them."""

    run_name: str
    tags: dict[str, str]
    params: dict[str, str]
    dataset: dict[str, str] | None
    """`name`, `digest` and `source` of the rows trained on; of a sweep's own run, none."""


def location(cache: Path) -> tuple[str, Path | None]:
    """Tracking URI and its local folder: MLFLOW_TRACKING_URI, or SQLite in the cache."""
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri, None
    folder = Cache(cache.resolve()).mlflow
    return f"sqlite:///{folder / 'mlflow.db'}", folder


def is_server(uri: str) -> bool:
    """Whether runs are kept by an MLflow server, and not in a store that one has to show."""
    return uri.startswith(("http://", "https://"))
