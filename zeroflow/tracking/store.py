"""MLflow's store: the experiment, and the MLflow run of each zeroflow run."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zeroflow import artifacts
from zeroflow.records import Record
from zeroflow.run_folder import TrackedFolder
from zeroflow.tracking.config import EXPERIMENT, TrackingConfig

log = logging.getLogger(__name__)

_COLOUR = "mlflow.runColor"

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's, which colour-blind readers can tell apart."""


class RunIds(Record):
    """Ids of a run or a sweep in MLflow: mlflow.json."""

    run_id: str
    experiment_id: str
    uri: str


def run_ids(folder: TrackedFolder) -> RunIds | None:
    """The ids of the MLflow run, if one was opened."""
    try:
        return RunIds.read_if_exists(folder.mlflow)
    except ValueError as error:
        log.warning("a new MLflow run is opened: %s", error)
        return None


def forget(folder: TrackedFolder) -> None:
    """Make the next tracker open a new MLflow run."""
    folder.mlflow.unlink(missing_ok=True)


def open_store(uri: str, folder: Path | None) -> tuple[Any, str]:
    """Return a client and the id of the experiment, which is created if it does not exist."""
    os.environ.setdefault("DO_NOT_TRACK", "true")
    # By default MLflow retries an unreachable server for minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    with _store_lock(folder):
        client = MlflowClient(uri)
        return client, _experiment(client, folder)


def open_run(config: TrackingConfig, folder: TrackedFolder) -> tuple[Any, str]:
    """Return a client and the id of the MLflow run, which is created if it does not exist."""
    from mlflow.entities import RunTag

    client, experiment_id = open_store(config.uri, config.folder)
    ids = run_ids(folder)
    run = _existing(client, ids.run_id) if ids else None
    if run is None:
        colour = {_COLOUR: _next_colour(client, experiment_id)} if config.dataset else {}
        run = client.create_run(experiment_id, run_name=config.run_name, tags=colour)
        ids = RunIds(run_id=run.info.run_id, experiment_id=experiment_id, uri=config.uri)
        ids.write(folder.mlflow)
    run_id = run.info.run_id
    # A run that was extended has other tags
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in config.tags.items()])
    if not run.data.params:
        _describe(client, run_id, config)
    return client, run_id


def _experiment(client: Any, folder: Path | None) -> str:
    """Id of the experiment, which is created if it does not exist."""
    from mlflow.exceptions import MlflowException

    if found := client.get_experiment_by_name(EXPERIMENT):
        return found.experiment_id
    try:
        return client.create_experiment(
            EXPERIMENT, (folder / "artifacts").as_uri() if folder else None
        )
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return client.get_experiment_by_name(EXPERIMENT).experiment_id  # another process was faster


def _next_colour(client: Any, experiment_id: str) -> str:
    """Colour after that of the newest run. MLflow's own, a hash of the id, repeats too soon."""
    newest = client.search_runs([experiment_id], f"tags.`{_COLOUR}` LIKE '#%'", max_results=1)
    colour = newest[0].data.tags.get(_COLOUR) if newest else None
    if colour not in _COLOURS:
        return _COLOURS[0]
    return _COLOURS[(_COLOURS.index(colour) + 1) % len(_COLOURS)]


@contextmanager
def _store_lock(folder: Path | None) -> Iterator[None]:
    """Lock the store: processes creating its SQLite tables at the same time would corrupt them."""
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with artifacts.exclusive(
        folder / "store", waiting_for="another process is opening MLflow's store"
    ):
        yield


def _existing(client: Any, run_id: str) -> Any | None:
    """Return the MLflow run; None if the store has no run of this id, or a deleted one."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise  # a server that does not answer has not lost the run
        return None
    return run if run.info.lifecycle_stage == "active" else None


def _describe(client: Any, run_id: str, config: TrackingConfig) -> None:
    """Add dataset and params. Params come last, so a run with params has both."""
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
