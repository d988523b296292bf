"""Pulses: the progress of rank 0, in the run's file `alive`, which rank 0 rewrites.

An event for every step would make events.jsonl long. A pulse replaces the one before it, so it can
be written at every step. It contains nothing that has to be read from the device.
"""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_SECONDS = 0.1
"""Minimum time between two pulses: short enough for a smooth bar, and long enough for a network
file system."""


class Pulse(NamedTuple):
    """Progress of a phase."""

    phase: str
    """Name of the phase, such as training, validation or overfit check."""

    done: int
    total: int
    text: str = ""
    """Additional text, such as the loss."""


class PulseWriter:
    """Writes the pulses of rank 0."""

    def __init__(self, file: Path) -> None:
        self._file, self._next = file, 0.0

    def __call__(self, pulse: Pulse) -> None:
        """Write `pulse`, unless one was just written; the last of a phase is always written."""
        now = time.monotonic()
        if now >= self._next or pulse.done == pulse.total:
            self._file.write_text(json.dumps(pulse), encoding="utf-8")
            self._next = now + _SECONDS


class PulseReader:
    """Reads the pulses that are written from now on."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._last = self._text()

    def new(self) -> Pulse | None:
        """Return the newest pulse; None if it was returned before."""
        text = self._text()
        if text == self._last:
            return None
        self._last = text
        with suppress(ValueError, TypeError):  # the file is being written
            return Pulse(*json.loads(text))
        return None

    def _text(self) -> str:
        with suppress(OSError):
            return self._file.read_text(encoding="utf-8")
        return ""
