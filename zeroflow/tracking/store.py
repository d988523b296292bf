"""MLflow's store: the experiment, and the MLflow run of each zeroflow run."""

import logging
import os
import shlex
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from zeroflow import artifacts
from zeroflow.data.time_limit import within
from zeroflow.records import Record
from zeroflow.run_folder import TrackedFolder
from zeroflow.tracking import loopback
from zeroflow.tracking.colours import DISTINCT
from zeroflow.tracking.config import EXPERIMENT, TrackingConfig, address, database

log = logging.getLogger(__name__)

OPEN_SECONDS = 20.0
"""Time in which a server or database must answer."""

_COLOUR = "mlflow.runColor"
"""Tag that MLflow's pages read."""

_COLOURS = tuple(colour.lower() for colour in DISTINCT)


class RunIds(Record):
    """Ids of a run or a sweep in MLflow: mlflow.json."""

    run_id: str
    experiment_id: str
    uri: str
    """Tracking URI without its password."""


def run_ids(folder: TrackedFolder) -> RunIds | None:
    """Return the ids of the MLflow run; None if none has been created yet."""
    try:
        return RunIds.read_if_exists(folder.mlflow)
    except ValueError as error:
        log.warning("a new MLflow run is opened: %s", error)
        return None


def forget(folder: TrackedFolder) -> None:
    """Delete the ids, so that the next tracker opens a new MLflow run."""
    folder.mlflow.unlink(missing_ok=True)


def open_store(folder: Path | None) -> tuple[Any, str]:
    """Return a client and the id of the experiment, which is created if it does not exist.

    Args:
        folder: folder of the store; None for the one at MLFLOW_TRACKING_URI.

    Raises:
        Exception: the store cannot be opened. For a server or database that does not answer, this
            takes `OPEN_SECONDS`.
    """
    if folder is not None:
        with _store_lock(folder):
            return _opened(folder)
    return within(OPEN_SECONDS, partial(_opened, None))


def _opened(folder: Path | None) -> tuple[Any, str]:
    loopback.bypass_proxies()
    os.environ.setdefault("DO_NOT_TRACK", "true")
    # Otherwise MLflow prints the address of each ended run, which contains the server's password
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    # Standard error has the log
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # By default MLflow retries an unreachable server for minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    from mlflow.store.db import utils
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    # The default, ten retries, takes two minutes and logs a traceback for each
    utils.MAX_RETRY_COUNT = 2
    logging.getLogger(utils.__name__).setLevel(logging.CRITICAL)
    if folder is not None:
        database(folder).touch(mode=0o600)  # it contains the settings of runs
    client = MlflowClient(address(folder))
    return client, _experiment(client, folder)


def open_run(config: TrackingConfig, folder: TrackedFolder) -> tuple[Any, str]:
    """Return a client and the id of the MLflow run, which is created if it does not exist."""
    from mlflow.entities import RunTag

    client, experiment_id = open_store(config.folder)
    ids = run_ids(folder)
    run = existing(client, ids.run_id) if ids else None
    if run is None:
        colour = {_COLOUR: _next_colour(client, experiment_id)} if config.dataset else {}
        run = client.create_run(experiment_id, run_name=config.run_name, tags=colour)
        ids = RunIds(run_id=run.info.run_id, experiment_id=experiment_id, uri=config.uri)
        ids.write(folder.mlflow)
    run_id = run.info.run_id
    # The tags of an extended run have changed
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in config.tags.items()])
    if not run.data.params:
        _describe(client, run_id, config)
    return client, run_id


def _experiment(client: Any, folder: Path | None) -> str:
    """Return the id of the experiment, which is created if it does not exist."""
    from mlflow.exceptions import MlflowException

    if found := client.get_experiment_by_name(EXPERIMENT):
        if found.lifecycle_stage == "deleted":
            raise ValueError(_deleted(found.experiment_id, folder))
        if folder:
            _follow_move(folder, found)
        return found.experiment_id
    try:
        return client.create_experiment(EXPERIMENT, _artifacts_address(folder) if folder else None)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return client.get_experiment_by_name(EXPERIMENT).experiment_id  # created by another process


def _deleted(experiment_id: str, folder: Path | None) -> str:
    """Return the error message, with the command that restores the experiment."""
    store = f"MLFLOW_TRACKING_URI={shlex.quote(address(folder))} " if folder else ""
    return (
        f"its experiment {EXPERIMENT} is deleted; this command restores it: {store}"
        f"mlflow experiments restore --experiment-id {experiment_id}"
    )


def _artifacts_address(folder: Path) -> str:
    return (folder / "artifacts").as_uri()


_ADDRESSES = (
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Tables of the store and their columns with absolute addresses of artifacts."""


def _follow_move(folder: Path, experiment: Any) -> None:
    """Correct the absolute addresses of artifacts in the store if `folder` has moved."""
    before, now, id = (
        experiment.artifact_location,
        _artifacts_address(folder),
        experiment.experiment_id,
    )
    if before == now:
        return
    with closing(sqlite3.connect(database(folder))) as store, store:
        store.execute(
            "UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?", (now, id)
        )
        for table, column in _ADDRESSES:
            store.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?)"
                f" WHERE substr({column}, 1, ?) = ?",
                (now, len(before) + 1, len(before) + 1, f"{before}/"),
            )
    log.info("MLflow's artifacts have moved with the cache, from %s to %s", before, now)


def _next_colour(client: Any, experiment_id: str) -> str:
    """Return the colour after that of the newest run.

    MLflow derives colours from a hash of the run id, so neighbouring runs may get the same colour.
    """
    newest = client.search_runs([experiment_id], f"tags.`{_COLOUR}` LIKE '#%'", max_results=1)
    colour = newest[0].data.tags.get(_COLOUR) if newest else None
    if colour not in _COLOURS:
        return _COLOURS[0]
    return _COLOURS[(_COLOURS.index(colour) + 1) % len(_COLOURS)]


@contextmanager
def _store_lock(folder: Path) -> Iterator[None]:
    """Lock the store: two processes that create its tables at the same time would corrupt it."""
    folder.mkdir(parents=True, exist_ok=True)
    with artifacts.exclusive(
        folder / "store", waiting_for="another process is opening MLflow's store"
    ):
        yield


def existing(client: Any, run_id: str) -> Any | None:
    """Return the MLflow run; None if the store has no run of this id, or it was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise  # a server that does not answer may still have the run
        return None
    return run if run.info.lifecycle_stage == "active" else None


def _describe(client: Any, run_id: str, config: TrackingConfig) -> None:
    """Add dataset and params. Params come last, so that a run with params also has its dataset."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Param

    if config.dataset is not None:
        dataset = Dataset(
            name=config.dataset.name,
            digest=config.dataset.digest,
            source_type="local",
            source=config.dataset.source,
        )
        tags = [InputTag("mlflow.data.context", "training")]
        client.log_inputs(run_id, [DatasetInput(dataset, tags)])
    params = [Param(key, value[:6000]) for key, value in config.params.items()]
    client.log_batch(run_id, params=params)
