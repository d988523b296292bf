"""MLflow: one experiment, one run for each zeroflow run, written without the training waiting.

The only importer of mlflow. By default runs are written straight to SQLite under
`<cache>/mlflow/`; an MLflow server is only the viewer.

What is delivered is read from the run's metrics.jsonl, and only what lies after the last step that
MLflow has of a curve is sent. So whatever MLflow missed, it has after the next delivery that
succeeds: later in the training, at its end, with the report, or when the same command runs again.
MLflow deletes no point: steps that a roll-back trains anew keep what was sent of them first.
"""

import contextvars
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from zeroflow import artifacts
from zeroflow.config import Config

log = logging.getLogger(__name__)

EXPERIMENT = "zeroflow"
LEDGER = "ledger.jsonl"
"""In the run directory: a line for each recovery from a failure, where there was one."""

Line = dict[str, Any]
"""Of metrics.jsonl."""

DESCRIPTION, PARENT = "mlflow.note.content", "mlflow.parentRunId"
"""Tags that MLflow's pages read."""

PORT = 5000
"""Where MLflow's server listens, unless another was asked for."""

_RUN_FILE = "mlflow.json"
_GROUP_FILE = "group.json"
_ADDRESS_FILE = "address.json"
_FLUSH_SECONDS = 5.0
_RETRY_SECONDS = 10.0
_CLOSE_SECONDS = 30.0
_BATCH_METRICS = 1000  # the most that MLflow takes at once
# In any order but that of time, or the runs of a sweep are hidden within it, and out of the charts
_CHARTS = (
    "runs?compareRunsMode=CHART&workflowType=machine_learning"
    "&orderByKey=metrics.%60loss%2Fval%60&orderByAsc=true"
)
_COLOUR = "mlflow.runColor"
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's, which colour-blind readers can tell apart."""


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


class Point(NamedTuple):
    key: str
    value: float
    step: int
    time: float


# Curves and the fields of metrics.jsonl that they draw
_BY_STEP = {
    "loss/train": "loss",
    "loss/val": "val_loss",
    "loss/val_bpb": "val_bpb",
    "optim/learning_rate": "lr",
    "optim/grad_norm": "grad_norm",
    "optim/update_ratio": "update_ratio",
    "optim/skipped_updates": "skipped_updates",
    "perf/tokens_per_second": "tokens_per_second",
    "perf/mfu": "mfu",
    "perf/peak_memory_mib": "peak_memory_mib",
}
_BY_TOKENS = {"loss/train_by_tokens": "loss", "loss/val_by_tokens": "val_loss"}
_BY_GFLOPS = {"loss/train_by_gflops": "loss", "loss/val_by_gflops": "val_loss"}


def points(lines: Iterable[Line]) -> Iterator[Point]:
    """What MLflow shows of `lines`, in their order; a figure that is None or absent is no point."""
    for line in lines:
        axes = [(line["step"], _BY_STEP), (line["tokens"], _BY_TOKENS)]
        if "flops" in line:  # in units of which MLflow's 64 bits hold enough
            axes.append((line["flops"] // 10**9, _BY_GFLOPS))
        for x, curves in axes:
            for key, field in curves.items():
                if (value := line.get(field)) is not None:
                    yield Point(key, value, x, line["time"])
        for phase, share in line.get("goodput", {}).items():
            yield Point(f"time/{phase}", share, line["step"], line["time"])


def location(cache: Path) -> tuple[str, Path | None]:
    """Tracking URI and its local folder: MLFLOW_TRACKING_URI, or SQLite in the cache."""
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri, None
    folder = cache.resolve() / "mlflow"
    return f"sqlite:///{folder / 'mlflow.db'}", folder


def is_server(uri: str) -> bool:
    """Whether runs are kept by an MLflow server, and not in a store that one has to show."""
    return uri.startswith(("http://", "https://"))


class Viewer(NamedTuple):
    """MLflow's server, which shows the runs."""

    address: str
    experiment_id: str
    command: list[str] | None
    """That starts it; None for one that MLFLOW_TRACKING_URI names."""

    @property
    def charts(self) -> str:
        return _charts(self.address, self.experiment_id)


def viewer(cache: Path, port: int) -> Viewer:
    """How to see the runs of `cache`, whose store is made if it is not there.

    Pages that runs link to are expected at `port` from then on.
    """
    uri, folder = location(cache)
    _, experiment_id = _open_store(uri, folder)
    if is_server(uri):
        return Viewer(uri, experiment_id, None)
    if folder is not None:
        artifacts.write_json(folder / _ADDRESS_FILE, {"address": _local(port)})
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1", "--backend-store-uri", uri]
    return Viewer(_local(port), experiment_id, command)


VIEWER_ENVIRONMENT = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "DO_NOT_TRACK": "true"}
"""A sixth of the memory that the server takes otherwise."""


def links(run_dir: Path, cache: Path) -> dict[str, str]:
    """Pages of MLflow's server, by what they show; none while the run is not known there."""
    if (facts := run_facts(run_dir)) is None:
        return {}
    uri, folder = location(cache)
    address = uri if is_server(uri) else _local(PORT)
    if folder is not None and (noted := folder / _ADDRESS_FILE).exists():
        address = artifacts.read_json(noted)["address"]
    experiment = facts["experiment_id"]
    return {
        "this run": f"{address}/#/experiments/{experiment}/runs/{facts['run_id']}",
        "loss of all runs": _charts(address, experiment),
    }


def _local(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def _charts(address: str, experiment_id: str) -> str:
    """The page that draws all runs over each other."""
    return f"{address}/#/experiments/{experiment_id}/{_CHARTS}"


def run_facts(run_dir: Path) -> dict[str, str] | None:
    """`run_id` and `experiment_id` of the MLflow run, if one was opened."""
    path = run_dir / _RUN_FILE
    try:
        return artifacts.read_json(path) if path.exists() else None
    except ValueError as error:
        log.warning("the run gets another run in MLflow: %s", error)
        return None


def forget(run_dir: Path) -> None:
    """Have the next tracker begin another MLflow run."""
    (run_dir / _RUN_FILE).unlink(missing_ok=True)


class Tracker:
    """Follows a run's metrics.jsonl and delivers to MLflow, in a thread of its own.

    Whatever happens to MLflow, training goes on and waits only at its end, for a moment.

    Args:
        new_lines: returns the lines that were added since it was called last.
    """

    def __init__(
        self, config: TrackingConfig, run_dir: Path, new_lines: Callable[[], list[Line]]
    ) -> None:
        self._config, self._run_dir, self._new_lines = config, run_dir, new_lines
        self._closing = threading.Event()
        self._status = "KILLED"
        self._delivered = False
        # in this context, as Prefect finds the flow run that a log line belongs to there
        context = contextvars.copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(self._deliver,), name="mlflow", daemon=True
        )
        self._thread.start()

    def close(self, status: str) -> None:
        """Send what is left and end the run as FINISHED, FAILED or KILLED."""
        self._status = status
        self._closing.set()
        self._thread.join(_CLOSE_SECONDS)
        if not self._delivered:
            log.warning(
                "MLflow at %s did not take the last metrics; they are kept in %s, and delivered "
                "with the report or when the same command runs again",
                self._config.uri,
                self._run_dir,
            )

    def _deliver(self) -> None:
        waiting: list[Line] = []
        run: _Run | None = None
        failing = False
        while True:
            closing = self._closing.wait(_RETRY_SECONDS if failing else _FLUSH_SECONDS)
            try:
                waiting += self._new_lines()
                if run is None:
                    run = _Run(self._config, self._run_dir)
                    run.begin()
                run.send(points(waiting))
                waiting.clear()
                if closing:
                    run.end(self._status)
                    self._delivered = True
                else:
                    run.measure_machine()
                if failing:
                    log.info("MLflow at %s is back and has all metrics", self._config.uri)
                failing = False
            except Exception as error:  # any failure of MLflow, its store or its server
                run = None  # only a run opened anew knows what has arrived
                if not failing:
                    log.warning("MLflow at %s failed, will try again: %s", self._config.uri, error)
                failing = True
            if closing:
                return


def finish(
    config: TrackingConfig,
    run_dir: Path,
    lines: list[Line],
    *,
    files: list[Path],
    step: int,
    metrics: dict[str, float],
    series: dict[str, list[float]],
    succeeded: bool,
) -> str | None:
    """Attach the end of a run: files, figures at its last `step`, series over steps 1, 2, ...

    Args:
        lines: of metrics.jsonl, of which those are sent that MLflow has not.

    Returns:
        the run id; None, with a warning, if MLflow cannot be written.
    """
    now = time.time()
    figures = [Point(key, value, step, now) for key, value in metrics.items()]
    for key, values in series.items():
        figures += [Point(key, value, number, now) for number, value in enumerate(values, 1)]
    try:
        run = _Run(config, run_dir)
        run.send(points(lines))
        run.send(figures)
        for file in files:
            run.attach(file)
        run.end("FINISHED" if succeeded else "FAILED")
        return run.run_id
    except Exception as error:  # the run itself is done and on disk
        log.warning(
            "the report could not be added to MLflow at %s, which the same command tries again: %s",
            config.uri,
            error,
        )
        return None


def open_group(config: TrackingConfig, folder: Path) -> None:
    """Open the MLflow run that others name as their `PARENT`; its ids are in `folder`."""
    try:
        artifacts.write_json(folder / _GROUP_FILE, config.model_dump(mode="json"))
        _open(config, folder)
    except Exception as error:  # its runs are compared without it as well
        log.warning("MLflow at %s does not show the runs as one sweep: %s", config.uri, error)


def close_group(
    folder: Path, files: list[Path], metrics: dict[str, float], *, failed: bool
) -> None:
    """Attach `files` and figures to the run that `open_group` opened, and end it."""
    config = TrackingConfig.model_validate(artifacts.read_json(folder / _GROUP_FILE))
    try:
        run = _Run(config, folder)
        now = time.time()
        # A sweep has no steps: what is sent when it was added to has to come after what was before
        run.send(Point(key, value, int(now), now) for key, value in metrics.items())
        for file in files:
            run.attach(file)
        run.end("FAILED" if failed else "FINISHED")
    except Exception as error:  # the comparison is on disk
        log.warning("the comparison could not be added to MLflow at %s: %s", config.uri, error)


class _Run:
    """The MLflow run of a zeroflow run, open for one thread; of no use after its first error."""

    def __init__(self, config: TrackingConfig, run_dir: Path) -> None:
        self._uri, self._run_dir = config.uri, run_dir
        self._client, self.run_id = _open(config, run_dir)
        latest = self._client.get_run(self.run_id).data.to_proto().metrics
        self._last_step = {metric.key: metric.step for metric in latest}

    def begin(self) -> None:
        """Show the run as RUNNING, and be ready to `measure_machine`."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._client.update_run(self.run_id, "RUNNING")
        self._tell_recoveries()
        self._monitor = SystemMetricsMonitor(
            self.run_id, resume_logging=True, tracking_uri=self._uri
        )

    def send(self, candidates: Iterable[Point]) -> None:
        """Send those after the last step of their key: a run has no step twice.

        What is sent again although it did arrive, as the answer was lost, has the same time, and
        that is one point to MLflow.
        """
        from mlflow.entities import Metric

        new, last = [], dict(self._last_step)
        for point in candidates:
            if point.step > last.get(point.key, -1):
                new.append(point)
                last[point.key] = point.step
        for start in range(0, len(new), _BATCH_METRICS):
            batch = new[start : start + _BATCH_METRICS]
            metrics = [Metric(p.key, p.value, int(p.time * 1000), p.step) for p in batch]
            self._client.log_batch(self.run_id, metrics=metrics)
        self._last_step = last

    def measure_machine(self) -> None:
        """Send the load of this machine; its monitor's own thread would end with the server."""
        self._monitor.collect_metrics()
        self._monitor.publish_metrics(self._monitor.aggregate_metrics())

    def attach(self, file: Path) -> None:
        self._client.log_artifact(self.run_id, str(file))

    def end(self, status: str) -> None:
        self._tell_recoveries()
        self._client.set_terminated(self.run_id, status)

    def _tell_recoveries(self) -> None:
        ledger = self._run_dir / LEDGER
        if ledger.exists():
            self.attach(ledger)
            recoveries = ledger.read_bytes().count(b"\n")
            self._client.set_tag(self.run_id, "recoveries", str(recoveries))


def _open_store(uri: str, folder: Path | None) -> tuple[Any, str]:
    """A client and the id of the experiment, which is created if there is none."""
    os.environ.setdefault("DO_NOT_TRACK", "true")
    # By default a server that is gone is asked for minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    with _store_lock(folder):
        client = MlflowClient(uri)
        return client, _experiment(client, folder)


def _open(config: TrackingConfig, run_dir: Path) -> tuple[Any, str]:
    """A client and the id of the run, which is created if there is none."""
    from mlflow.entities import RunTag

    client, experiment_id = _open_store(config.uri, config.folder)
    facts = run_facts(run_dir)
    run = _existing(client, facts["run_id"]) if facts else None
    if run is None:
        colour = {_COLOUR: _next_colour(client, experiment_id)} if config.dataset else {}
        run = client.create_run(experiment_id, run_name=config.run_name, tags=colour)
        artifacts.write_json(
            run_dir / _RUN_FILE,
            {"run_id": run.info.run_id, "experiment_id": experiment_id, "uri": config.uri},
        )
    run_id = run.info.run_id
    # A run that was extended has other tags
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in config.tags.items()])
    if not run.data.params:
        _describe(client, run_id, config)
    return client, run_id


def _experiment(client: Any, folder: Path | None) -> str:
    """Id of the experiment, which is created if there is none."""
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
        return client.get_experiment_by_name(EXPERIMENT).experiment_id  # another run was faster


def _next_colour(client: Any, experiment_id: str) -> str:
    """Another one than the newest runs have; MLflow would take one from a hash of the run's id."""
    newest = client.search_runs([experiment_id], f"tags.`{_COLOUR}` LIKE '#%'", max_results=1)
    colour = newest[0].data.tags.get(_COLOUR) if newest else None
    if colour not in _COLOURS:
        return _COLOURS[0]
    return _COLOURS[(_COLOURS.index(colour) + 1) % len(_COLOURS)]


@contextmanager
def _store_lock(folder: Path | None) -> Iterator[None]:
    """Processes that create MLflow's SQLite tables at once leave it broken for good."""
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with artifacts.exclusive(folder / "store", waiting_for="another process opens MLflow's store"):
        yield


def _existing(client: Any, run_id: str) -> Any | None:
    """The run; None where the store has none of this id, or one that was deleted there."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise  # a server that is away has not lost the run
        return None
    return run if run.info.lifecycle_stage == "active" else None


def _describe(client: Any, run_id: str, config: TrackingConfig) -> None:
    """Add dataset and params, the params last: a run that has them has both."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Param

    if config.dataset is not None:
        dataset = Dataset(
            name=config.dataset["name"],
            digest=config.dataset["digest"],
            source_type="local",
            source=config.dataset["source"],
        )
        tags = [InputTag("mlflow.data.context", "training")]
        client.log_inputs(run_id, [DatasetInput(dataset, tags)])
    params = [Param(key, value[:6000]) for key, value in config.params.items()]
    client.log_batch(run_id, params=params)
