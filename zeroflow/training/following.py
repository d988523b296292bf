"""Watches the ranks of a launch: their events, their pulses, and the time since the last sign of
life.
"""

import time
from collections.abc import Callable
from pathlib import Path

from zeroflow.run_folder import RunFolder
from zeroflow.training.events import EVENTS, Event, Failed, Started
from zeroflow.training.pulse import Pulse, PulseReader


class Progress:
    """Events of a launch, and the time since the last sign of life of its ranks."""

    def __init__(self, folder: RunFolder, on_event: Callable[[Event | Pulse], None]) -> None:
        self._events = EVENTS.follow(folder.events, from_end=True)
        self._pulses, self._heartbeat = PulseReader(folder.alive), Heartbeat(folder.alive)
        self._on_event = on_event
        self.last: Event | None = None
        """The first failure since the ranks were started, otherwise the last event."""

    def follow(self) -> None:
        for event in self._events.new_records():
            # After the first failure, the other ranks report its consequences
            if not isinstance(self.last, Failed) or isinstance(event, Started):
                self.last = event
            self._on_event(event)
        if pulse := self._pulses.new():
            self._on_event(pulse)

    def seconds_since_last(self) -> float:
        return self._heartbeat.seconds_since_last()


class Heartbeat:
    """Measures the time since the file of the pulse changed, with this process's monotonic clock.

    File times are compared only with each other, so changes of the system clock have no effect.
    """

    def __init__(self, alive: Path) -> None:
        self._file, self._seen, self._since = alive, 0, time.monotonic()

    def seconds_since_last(self) -> float:
        touched = self._file.stat().st_mtime_ns if self._file.exists() else 0
        if touched != self._seen:
            self._seen, self._since = touched, time.monotonic()
        return time.monotonic() - self._since
