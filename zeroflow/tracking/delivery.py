"""Delivery of a run's points to a tracker in a separate thread, so that training never waits."""

import contextvars
import logging
import threading
from collections.abc import Callable
from typing import Protocol

from zeroflow.text.redaction import redacted
from zeroflow.tracking.points import Look, NewPoints

log = logging.getLogger(__name__)

FLUSH_SECONDS = 5.0
"""Time between deliveries."""

RETRY_SECONDS = 10.0
"""Time between deliveries while the tracker fails."""

CLOSE_SECONDS = 30.0
"""Maximum time to wait for the last delivery at the end of training."""


class Destination(Protocol):
    """The run in a tracker, open for one thread; it must not be used after an error."""

    def send(self, new: NewPoints) -> None:
        """Add points that the tracker lacks, so that it has each step once."""

    def end(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED. A later destination may resume it."""


class Delivery:
    """Delivers the points of a run in a separate thread.

    If the tracker fails, training continues, and waits at most `CLOSE_SECONDS` at its end.
    """

    def __init__(
        self, name: str, open_destination: Callable[[], Destination], follow: Callable[[], Look]
    ) -> None:
        """
        Args:
            name: name of the tracker, for messages.
            open_destination: may be slow or fail, and is called again after an error.
            follow: returns a `Look` at the run that begins with all of its points.
        """
        self._name, self._open, self._follow = name, open_destination, follow
        self._closing = threading.Event()
        self._status = "KILLED"
        self._delivered = self._failing = False
        # In a copy of this context, from which Prefect knows which flow run a log line belongs to
        context = contextvars.copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(self._deliver,), name=f"delivery to {name}", daemon=True
        )
        self._thread.start()

    def close(self, status: str) -> None:
        """Send the remaining points and end the run in the tracker.

        Args:
            status: FINISHED, FAILED or KILLED.
        """
        self._status = status
        self._closing.set()
        self._thread.join(CLOSE_SECONDS)
        if not self._delivered:
            log.log(
                # Not a second warning: the failure itself has been logged as one
                logging.INFO if self._failing else logging.WARNING,
                "%s did not accept the last metrics; they are in the folder of the run, and are "
                "delivered with the report or when the same command runs again",
                self._name,
            )

    def _deliver(self) -> None:
        opened: tuple[Destination, Look] | None = None
        seconds = 0.0  # a tracker may take seconds to import, better now than at the end
        while True:
            closing = self._closing.wait(seconds)
            try:
                opened = opened or (self._open(), self._follow())
                destination, look = opened
                destination.send(look())
                if closing:
                    destination.end(self._status)
                    self._delivered = True
                if self._failing:
                    log.info("%s is back and has all metrics", self._name)
                self._failing = False
            except Exception as error:  # any failure of the tracker, its store or its server
                opened = None  # opening it again finds out which points have arrived
                if not self._failing:
                    log.warning(
                        "%s failed; training continues, and the missing data is sent when it "
                        "works again: %s",
                        self._name,
                        reason(error),
                    )
                self._failing = True
            if closing:
                return
            seconds = RETRY_SECONDS if self._failing else FLUSH_SECONDS


def reason(error: Exception) -> str:
    """Return the line with the cause, without passwords; others may be a query or an HTML page."""
    lines = (str(error) or type(error).__name__).splitlines()
    # SQLAlchemy puts advice to programmers before the message of the database
    caused = (line for line in lines if not line.startswith("(raised as a result of"))
    return redacted(next(caused, lines[0]))
