"""The trackers of `--log-to`, which a run uses beside MLflow."""

import importlib.util
import logging
import shlex
from collections.abc import Callable, Iterable
from typing import NamedTuple

from zeroflow.run_folder import RunFolder
from zeroflow.tracking.config import TrackerName, TrackingConfig
from zeroflow.tracking.delivery import Delivery, Destination, reason
from zeroflow.tracking.points import Look, NewPoints, Point
from zeroflow.tracking.tensorboard_files import EventFile

log = logging.getLogger(__name__)


class _Tracker(NamedTuple):
    title: str
    open: Callable[[RunFolder], Destination]
    advice: Callable[[RunFolder], str]
    """Returns the command that shows the curves."""


_TRACKERS: dict[TrackerName, _Tracker] = {
    "tensorboard": _Tracker(
        "TensorBoard",
        lambda folder: EventFile(folder.path),
        lambda folder: shlex.join(["tensorboard", "--logdir", str(folder.path.parent)]),
    ),
}


def require_installed(names: Iterable[TrackerName]) -> None:
    """
    Raises:
        ValueError: the library of a tracker is not installed.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"--log-to {name} needs {_TRACKERS[name].title}: pip install 'zeroflow[{name}]'"
            )


def follow(config: TrackingConfig, folder: RunFolder, look: Callable[[], Look]) -> list[Delivery]:
    """Start to deliver the points of a run in training to the trackers of `--log-to`."""
    deliveries = []
    for tracker in (_TRACKERS[name] for name in config.log_to):
        log.info("curves in %s: %s", tracker.title, tracker.advice(folder))

        def opened(tracker: _Tracker = tracker) -> Destination:
            return tracker.open(folder)

        deliveries.append(Delivery(tracker.title, opened, look))
    return deliveries


def finish(config: TrackingConfig, folder: RunFolder, points: Iterable[Point]) -> None:
    """Give the trackers of `--log-to` those of all `points` of a finished run that they lack."""
    for tracker in (_TRACKERS[name] for name in config.log_to):
        try:
            destination = tracker.open(folder)
            destination.send(NewPoints(points, from_start=True))
            destination.end("FINISHED")
        except Exception as error:  # the run itself is complete and on disk
            log.warning(
                "the metrics could not be added to %s; the same command tries again: %s",
                tracker.title,
                reason(error),
            )
