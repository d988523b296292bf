"""The trackers of `--log-to`, which a run uses in addition to MLflow."""

import importlib.util
import logging
import shlex
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

from zeroflow.run_folder import RunFolder
from zeroflow.tracking import wandb_run
from zeroflow.tracking.config import TrackerName, TrackingConfig
from zeroflow.tracking.delivery import Delivery, Destination, reason
from zeroflow.tracking.points import Look, NewPoints, Point
from zeroflow.tracking.tensorboard_files import EventFile
from zeroflow.tracking.wandb_run import WandbRun

log = logging.getLogger(__name__)


class _Tracker(NamedTuple):
    title: str
    open: Callable[[TrackingConfig, RunFolder], Destination]
    is_complete: Callable[[RunFolder, int], bool]
    """True if all points up to a step were delivered, so that nothing has to be opened."""


_TRACKERS: dict[TrackerName, _Tracker] = {
    "tensorboard": _Tracker(
        "TensorBoard",
        lambda config, folder: EventFile(folder.path),
        lambda folder, last_step: False,  # `EventFile` compares the existing file itself
    ),
    "wandb": _Tracker("Weights & Biases", WandbRun, wandb_run.is_complete),
}


def require_installed(names: Iterable[TrackerName]) -> None:
    """Check that the libraries of the trackers are installed.

    Raises:
        ValueError: one is not.
    """
    for name in names:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of this name, not a package
            raise ValueError(
                f"--log-to {name} needs {_TRACKERS[name].title}: pip install 'zeroflow[{name}]'"
            )


def follow(config: TrackingConfig, folder: RunFolder, look: Callable[[], Look]) -> list[Delivery]:
    """Start to deliver the points of a run in training to the trackers of `--log-to`."""
    if "tensorboard" in config.log_to:
        logs = shlex.quote(str(folder.path.parent))
        log.info("curves in TensorBoard: tensorboard --logdir %s", logs)
    return [
        Delivery(tracker.title, partial(tracker.open, config, folder), look)
        for tracker in _trackers(config)
    ]


def _trackers(config: TrackingConfig) -> list[_Tracker]:
    """Return each tracker of `--log-to` once: two deliveries would write everything twice."""
    return [_TRACKERS[name] for name in dict.fromkeys(config.log_to)]


def finish(config: TrackingConfig, folder: RunFolder, points: Sequence[Point]) -> None:
    """Send the trackers of `--log-to` the `points` of a finished run that they do not have yet."""
    last_step = max((point.step for point in points if point.axis == "steps"), default=-1)
    for tracker in _trackers(config):
        try:
            if tracker.is_complete(folder, last_step):
                continue
            destination = tracker.open(config, folder)
            destination.send(NewPoints(points, from_start=True))
            destination.end("FINISHED")
        except Exception as error:  # the run itself is complete and on disk
            log.warning(
                "the metrics could not be added to %s; the same command tries again: %s",
                tracker.title,
                reason(error),
            )
