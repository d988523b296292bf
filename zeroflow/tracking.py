"""MLflow: one experiment, one run for each zeroflow run, written without the training waiting.

The only importer of mlflow. By default runs are written straight to SQLite under
`<cache>/mlflow/`; an MLflow server is only the viewer.
"""

import logging
import os
import queue
import shlex
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from zeroflow import artifacts
from zeroflow.config import Config

log = logging.getLogger(__name__)

EXPERIMENT = "zeroflow"

_RUN_FILE = "mlflow.json"
_FLUSH_SECONDS = 2.0
_CLOSE_SECONDS = 30.0
_BATCH_METRICS = 1000  # the most that MLflow takes at once
_CHARTS = "runs?compareRunsMode=CHART&workflowType=machine_learning"


class TrackingConfig(Config):
    """The MLflow run of a zeroflow run."""

    uri: str
    folder: Path | None
    """Folder of the SQLite file and the artifacts; None when a server keeps them."""

    run_name: str
    tags: dict[str, str]
    params: dict[str, str]
    dataset: dict[str, str]
    """`name`, `digest` and `source` of the rows trained on."""


class Point(NamedTuple):
    key: str
    value: float
    step: int


def location(cache: Path) -> tuple[str, Path | None]:
    """Tracking URI and its local folder: MLFLOW_TRACKING_URI, or SQLite in the cache."""
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri, None
    folder = cache.resolve() / "mlflow"
    return f"sqlite:///{folder / 'mlflow.db'}", folder


def ui_command(cache: Path, *, program: str = "mlflow") -> str | None:
    """The shell command that shows the runs; None when a server does.

    Args:
        program: how mlflow is called.
    """
    uri, folder = location(cache)
    if folder is None:
        return None
    return (
        f"MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false {program} server --workers 1 --port 5000 "
        f"--backend-store-uri {shlex.quote(uri)}"
    )


def charts_path(experiment_id: str) -> str:
    """Path, below the server's address, of the page that draws all runs over each other."""
    return f"/#/experiments/{experiment_id}/{_CHARTS}"


def run_facts(run_dir: Path) -> dict[str, str] | None:
    """`run_id` and `experiment_id` of the MLflow run, if one was opened."""
    path = run_dir / _RUN_FILE
    return artifacts.read_json(path) if path.exists() else None


def forget(run_dir: Path) -> None:
    """Have the next tracker begin another MLflow run."""
    (run_dir / _RUN_FILE).unlink(missing_ok=True)


class Tracker:
    """Delivers metrics to MLflow from a thread of its own.

    Whatever happens to MLflow, training goes on: points are kept and sent again, and those that
    cannot be delivered by the end are still in metrics.jsonl. Points a run has already are left
    out, so that a resumed run has none twice.
    """

    def __init__(self, config: TrackingConfig, run_dir: Path) -> None:
        self._config, self._run_dir = config, run_dir
        self._points: queue.SimpleQueue[Point] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._status = "KILLED"
        self._warned = False
        self._thread = threading.Thread(target=self._deliver, name="mlflow", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: dict[str, float | None]) -> None:
        """Queue `metrics` at `step`; None values are left out."""
        for key, value in metrics.items():
            if value is not None:
                self._points.put(Point(key, value, step))

    def close(self, status: str) -> None:
        """Send what is left and end the run as FINISHED, FAILED or KILLED."""
        self._status = status
        self._closing.set()
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            log.warning("MLflow did not take the last metrics; they are in %s", self._run_dir)

    def _deliver(self) -> None:
        waiting: list[Point] = []
        session: _Session | None = None
        while True:
            closing = self._closing.wait(_FLUSH_SECONDS)
            while not self._points.empty():
                waiting.append(self._points.get())
            try:
                session = session or _Session(self._config, self._run_dir)
                while waiting:
                    session.send(waiting[:_BATCH_METRICS])
                    del waiting[:_BATCH_METRICS]
                if closing:
                    session.end(self._status)
            except Exception as error:  # any failure of MLflow, its store or its server
                if not self._warned:
                    log.warning("MLflow at %s failed, will try again: %s", self._config.uri, error)
                self._warned = True
            if closing:
                return


class _Session:
    """An open MLflow run, in the thread that made it."""

    def __init__(self, config: TrackingConfig, run_dir: Path) -> None:
        import mlflow  # takes seconds, which the training does not wait for

        self._client, self._run_id = _open(config, run_dir)
        known = self._client.get_run(self._run_id).data.metrics
        logged = {key for key in known if not key.startswith("system/")}
        self._last_step = _last_steps(self._client, self._run_id, logged)
        mlflow.set_tracking_uri(config.uri)
        mlflow.set_system_metrics_sampling_interval(5)
        mlflow.start_run(run_id=self._run_id, log_system_metrics=True)

    def send(self, points: list[Point]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        new = [p for p in points if p.step > self._last_step.get(p.key, -1)]
        metrics = [Metric(p.key, p.value, now, p.step) for p in new]
        self._client.log_batch(self._run_id, metrics=metrics)
        self._last_step |= {p.key: p.step for p in new}

    def end(self, status: str) -> None:
        import mlflow

        mlflow.end_run(status)


def finish(
    config: TrackingConfig,
    run_dir: Path,
    *,
    files: list[Path],
    step: int,
    metrics: dict[str, float],
    series: dict[str, list[float]],
    succeeded: bool,
) -> str | None:
    """Attach the end of a run: files, figures at its last `step`, series over steps 1, 2, ...

    Returns:
        the run id; None, with a warning, if MLflow cannot be written.
    """
    from mlflow.entities import Metric

    try:
        client, run_id = _open(config, run_dir)
        now = int(time.time() * 1000)
        points = [Metric(key, value, now, step) for key, value in metrics.items()]
        for key, values in series.items():
            points += [Metric(key, value, now, number) for number, value in enumerate(values, 1)]
        last = _last_steps(client, run_id, {point.key for point in points})
        points = [point for point in points if point.step > last.get(point.key, -1)]
        for start in range(0, len(points), _BATCH_METRICS):
            client.log_batch(run_id, metrics=points[start : start + _BATCH_METRICS])
        for file in files:
            client.log_artifact(run_id, str(file))
        client.set_terminated(run_id, "FINISHED" if succeeded else "FAILED")
        return run_id
    except Exception as error:  # the run itself is done and on disk
        log.warning("the report could not be added to MLflow at %s: %s", config.uri, error)
        return None


def _last_steps(client: Any, run_id: str, keys: set[str]) -> dict[str, int]:
    """The last step at which each of `keys` was logged, where it was."""
    histories = {key: client.get_metric_history(run_id, key) for key in keys}
    return {key: max(p.step for p in points) for key, points in histories.items() if points}


def _open(config: TrackingConfig, run_dir: Path) -> tuple[Any, str]:
    """A client and the id of the run, which is created if there is none."""
    os.environ.setdefault("DO_NOT_TRACK", "true")
    # By default a server that is gone is asked for minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    with _store_lock(config.folder):
        client = MlflowClient(config.uri)
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            artifact_root = (config.folder / "artifacts").as_uri() if config.folder else None
            experiment_id = client.create_experiment(EXPERIMENT, artifact_root)
        else:
            experiment_id = experiment.experiment_id
    facts = run_facts(run_dir)
    if facts and _exists(client, facts["run_id"]):
        for key, value in config.tags.items():  # a run that was extended has other ones
            client.set_tag(facts["run_id"], key, value)
        return client, facts["run_id"]
    run = client.create_run(experiment_id, tags=config.tags, run_name=config.run_name)
    run_id = run.info.run_id
    _describe(client, run_id, config)
    artifacts.write_json(
        run_dir / _RUN_FILE, {"run_id": run_id, "experiment_id": experiment_id, "uri": config.uri}
    )
    return client, run_id


@contextmanager
def _store_lock(folder: Path | None) -> Iterator[None]:
    """Processes that create MLflow's SQLite tables at once leave it broken for good."""
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with artifacts.exclusive(folder / "store", waiting_for="another process opens MLflow's store"):
        yield


def _exists(client: Any, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException:
        return False


def _describe(client: Any, run_id: str, config: TrackingConfig) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag, Param

    params = [Param(key, value[:6000]) for key, value in config.params.items()]
    client.log_batch(run_id, params=params)
    dataset = Dataset(
        name=config.dataset["name"],
        digest=config.dataset["digest"],
        source_type="local",
        source=config.dataset["source"],
    )
    tags = [InputTag("mlflow.data.context", "training")]
    client.log_inputs(run_id, [DatasetInput(dataset, tags)])
