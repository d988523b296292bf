"""Delivery of a run's data to MLflow in a separate thread, so that training never waits.

One experiment has one MLflow run for each zeroflow run. By default, runs are written directly to
SQLite under `<cache>/mlflow/`, and an MLflow server only shows them.

Points are read from the run's metrics.jsonl. Only points after the last step of a curve in MLflow
are sent. So the next successful delivery sends everything that is missing: later during training,
at its end, with the report, or when the same command runs again. MLflow cannot delete points, so it
keeps the first values of steps that are trained again after a roll-back.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from zeroflow.run_folder import RunFolder, SweepFolder, TrackedFolder
from zeroflow.tracking.config import TrackingConfig, address
from zeroflow.tracking.delivery import Delivery, reason
from zeroflow.tracking.points import Look, NewPoints, Point
from zeroflow.tracking.store import open_run

log = logging.getLogger(__name__)

_BATCH_METRICS = 1000
"""Maximum number of points that MLflow accepts in one request."""


class Following:
    """The MLflow run of a run in training: the destination of its points."""

    def __init__(
        self, config: TrackingConfig, folder: RunFolder, files: Sequence[Path] = ()
    ) -> None:
        """
        Args:
            files: attached to the run once they exist, and again whenever they change.
        """
        self._run, self._files = MlflowRun(config, folder), files
        self._run.begin()

    def send(self, new: NewPoints) -> None:
        self._run.send(new.points)
        self._run.show(self._files)
        self._run.measure_machine()

    def end(self, status: str) -> None:
        self._run.end(status)


def follow(
    config: TrackingConfig, folder: RunFolder, look: Callable[[], Look], files: Sequence[Path] = ()
) -> Delivery:
    """Start to deliver the points of a run in training to MLflow, see `Following`."""
    return Delivery(f"MLflow at {config.uri}", lambda: Following(config, folder, files), look)


class RunEnd(NamedTuple):
    """Data to add to an MLflow run at its end."""

    files: Sequence[Path]
    pages: Mapping[str, str]
    """HTML by file name: MLflow shows no images in Markdown."""

    series: dict[str, list[float]]
    """Values over steps 1, 2, ..., by key."""

    succeeded: bool

    def points(self, time: float) -> Iterable[Point]:
        for key, values in self.series.items():
            for number, value in enumerate(values, 1):
                yield Point(key, value, number, time)


def finish(
    config: TrackingConfig, folder: RunFolder, points: Iterable[Point], ending: RunEnd
) -> str | None:
    """Add the `ending` of a run, and all `points` that MLflow lacks.

    Returns:
        The run id; None, after a warning, if MLflow cannot be written.
    """
    try:
        run = MlflowRun(config, folder)
        run.send(points)
        run.send(ending.points(time.time()))
        run.add(ending.files, ending.pages)
        run.end("FINISHED" if ending.succeeded else "FAILED")
        return run.run_id
    except Exception as error:  # the run itself is complete and on disk
        log.warning(
            "the report could not be added to MLflow at %s; the same command tries again: %s",
            config.uri,
            reason(error),
        )
        return None


def open_group(config: TrackingConfig, folder: SweepFolder) -> None:
    """Open the MLflow run of a sweep, the `PARENT` of its runs."""
    try:
        config.write(folder.tracking)
        client, run_id = open_run(config, folder)
        client.update_run(run_id, "RUNNING")  # it may have ended before
    except Exception as error:  # the comparison of its runs does not need it
        log.warning(
            "MLflow at %s does not show the runs as one sweep: %s", config.uri, reason(error)
        )


def close_group(
    folder: SweepFolder,
    files: Sequence[Path] = (),
    pages: Mapping[str, str] = MappingProxyType({}),
    figures: Mapping[str, float] = MappingProxyType({}),
    *,
    status: str,
) -> None:
    """Attach files, pages and figures to the run that `open_group` opened, and end it.

    Args:
        status: FINISHED, FAILED or KILLED.
    """
    try:
        run = MlflowRun(TrackingConfig.read(folder.tracking), folder)
        # A sweep has no steps, so the current time is used: it increases when runs are added
        now = time.time()
        run.send(Point(key, value, int(now), now) for key, value in figures.items())
        run.add(files, pages)
        run.end(status)
    except Exception as error:  # the comparison is on disk
        log.warning("the comparison could not be added to MLflow: %s", reason(error))


def add_evaluation(
    config: TrackingConfig,
    folder: RunFolder,
    points: Iterable[Point],
    file: Path,
    pages: Mapping[str, str],
) -> bool:
    """Add the figures of an evaluation, its file and pages to the MLflow run of a run.

    Returns:
        False, after a warning, if MLflow cannot be written.
    """
    try:
        run = MlflowRun(config, folder)
        run.send_again(points)
        run.add([file], pages)
        return True
    except Exception as error:  # the evaluation is on disk
        log.warning("the evaluation could not be added to MLflow: %s", reason(error))
        return False


class MlflowRun:
    """An MLflow run, open for one thread; it must not be used after an error."""

    def __init__(self, config: TrackingConfig, folder: TrackedFolder) -> None:
        self._uri, self._folder = address(config.folder), folder
        self._client, self.run_id = open_run(config, folder)
        latest = self._client.get_run(self.run_id).data.to_proto().metrics
        self._last_step = {metric.key: metric.step for metric in latest}
        self._shown: dict[Path, int] = {}

    def begin(self) -> None:
        """Show the run as RUNNING, and prepare `measure_machine`."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._client.update_run(self.run_id, "RUNNING")
        self._add_recoveries()
        self._monitor = SystemMetricsMonitor(
            self.run_id, resume_logging=True, tracking_uri=self._uri
        )

    def send(self, candidates: Iterable[Point]) -> None:
        """Send the points after the last step of their curve, so that no step appears twice.

        If the response to a delivered point was lost, the point is sent again with the same time,
        and MLflow treats both as one point.
        """
        new, last = [], dict(self._last_step)
        for point in candidates:
            if point.step > last.get(point.key, -1):
                new.append(point)
                last[point.key] = point.step
        self.send_again(new)
        self._last_step = last

    def send_again(self, points: Iterable[Point]) -> None:
        """Send `points`, also of steps that their curve has; MLflow shows the latest by time."""
        from mlflow.entities import Metric

        new = list(points)
        for start in range(0, len(new), _BATCH_METRICS):
            batch = new[start : start + _BATCH_METRICS]
            metrics = [Metric(p.key, p.value, int(p.time * 1000), p.step) for p in batch]
            self._client.log_batch(self.run_id, metrics=metrics)

    def measure_machine(self) -> None:
        """Send the load of this machine; the monitor's own thread would end with the server."""
        self._monitor.collect_metrics()
        self._monitor.publish_metrics(self._monitor.aggregate_metrics())

    def show(self, files: Iterable[Path]) -> None:
        """Attach the files that are new or have changed since the last call."""
        for file in files:
            changed = file.stat().st_mtime_ns if file.exists() else None
            if changed is not None and changed != self._shown.get(file):
                self.attach(file)
                self._shown[file] = changed

    def add(self, files: Iterable[Path], pages: Mapping[str, str]) -> None:
        """Attach files, and HTML pages by their names."""
        for file in files:
            self.attach(file)
        for name, html in pages.items():
            self._client.log_text(self.run_id, html, name)

    def attach(self, file: Path) -> None:
        """Attach a file if it exists: a plot that could not be drawn is left out."""
        if file.exists():
            self._client.log_artifact(self.run_id, str(file))

    def end(self, status: str) -> None:
        self._add_recoveries()
        self._client.set_terminated(self.run_id, status)

    def _add_recoveries(self) -> None:
        if isinstance(self._folder, RunFolder) and self._folder.ledger.exists():
            self.attach(self._folder.ledger)
            recoveries = self._folder.ledger.read_bytes().count(b"\n")
            self._client.set_tag(self.run_id, "recoveries", str(recoveries))
