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
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from zeroflow import artifacts
from zeroflow.run_folder import RunFolder, SweepFolder, TrackedFolder
from zeroflow.tracking.config import TrackingConfig
from zeroflow.tracking.metrics import Line, Point, points
from zeroflow.tracking.store import open_run

log = logging.getLogger(__name__)


_FLUSH_SECONDS = 5.0


_RETRY_SECONDS = 10.0


_CLOSE_SECONDS = 30.0


_BATCH_METRICS = 1000  # the most that MLflow takes at once


class Tracker:
    """Follows a run's metrics.jsonl and delivers to MLflow, in a thread of its own.

    Whatever happens to MLflow, training goes on and waits only at its end, for a moment.

    Args:
        new_lines: returns the lines that were added since it was called last.
    """

    def __init__(
        self, config: TrackingConfig, folder: RunFolder, new_lines: Callable[[], list[Line]]
    ) -> None:
        self._config, self._folder, self._new_lines = config, folder, new_lines
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
                self._folder.path,
            )

    def _deliver(self) -> None:
        waiting: list[Line] = []
        run: _MlflowRun | None = None
        failing = False
        while True:
            closing = self._closing.wait(_RETRY_SECONDS if failing else _FLUSH_SECONDS)
            try:
                waiting += self._new_lines()
                if run is None:
                    run = _MlflowRun(self._config, self._folder)
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
    folder: RunFolder,
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
        run = _MlflowRun(config, folder)
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


def open_group(config: TrackingConfig, folder: SweepFolder) -> None:
    """Open the MLflow run that others name as their `PARENT`; its ids are in `folder`."""
    try:
        artifacts.write_json(folder.tracking, config.model_dump(mode="json"))
        open_run(config, folder)
    except Exception as error:  # its runs are compared without it as well
        log.warning("MLflow at %s does not show the runs as one sweep: %s", config.uri, error)


def close_group(
    folder: SweepFolder, files: list[Path], metrics: dict[str, float], *, failed: bool
) -> None:
    """Attach `files` and figures to the run that `open_group` opened, and end it."""
    config = TrackingConfig.model_validate(artifacts.read_json(folder.tracking))
    try:
        run = _MlflowRun(config, folder)
        now = time.time()
        # A sweep has no steps: what is sent when it was added to has to come after what was before
        run.send(Point(key, value, int(now), now) for key, value in metrics.items())
        for file in files:
            run.attach(file)
        run.end("FAILED" if failed else "FINISHED")
    except Exception as error:  # the comparison is on disk
        log.warning("the comparison could not be added to MLflow at %s: %s", config.uri, error)


class _MlflowRun:
    """The MLflow run of a zeroflow run, open for one thread; of no use after its first error."""

    def __init__(self, config: TrackingConfig, folder: TrackedFolder) -> None:
        self._uri, self._folder = config.uri, folder
        self._client, self.run_id = open_run(config, folder)
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
        if isinstance(self._folder, RunFolder) and self._folder.ledger.exists():
            self.attach(self._folder.ledger)
            recoveries = self._folder.ledger.read_bytes().count(b"\n")
            self._client.set_tag(self.run_id, "recoveries", str(recoveries))
