"""TensorBoard's event file of a run, next to its metrics.jsonl.

The bytes of the file depend on metrics.jsonl only. An existing file is continued if its content is
a prefix of the expected content. If steps were dropped because the run was resumed, a new file
begins: a running TensorBoard would continue to read a file of the same name at its old position.
"""

import io
import os
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zeroflow.tracking.points import NewPoints, Point

if TYPE_CHECKING:
    from tensorboard.summary.writer.record_writer import RecordWriter

_NAME = "events.out.tfevents"


class EventFile:
    """The event file of a run: the destination of its points."""

    def __init__(self, folder: Path) -> None:
        # Not TensorBoard's EventFileWriter or that of PyTorch: they import TensorFlow if it is
        # installed, and put time and host into name and content
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._folder, self._record_writer = folder, RecordWriter
        self._writer: RecordWriter | None = None
        self._last: dict[str, int] = {}
        """Last position of each curve."""

    def send(self, new: NewPoints) -> None:
        if new.from_start:
            self.end("")
            self._writer = self._continued(new.points)
        elif self._writer is not None:
            _write(_events(self._once(new.points)), self._writer)

    def end(self, status: str) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _continued(self, points: Iterable[Point]) -> "RecordWriter":
        """Return the writer of a file that has exactly `points`; all other files are discarded."""
        self._last = {}
        due = self._record_writer(buffer := io.BytesIO())
        _write(_beginning(), due)
        _write(_events(self._once(points)), due)
        content, files = buffer.getvalue(), event_files(self._folder)
        known = files[-1].read_bytes() if files else b""
        if files and content.startswith(known):
            file = files.pop()
        else:
            number = int(files[-1].suffix[1:]) + 1 if files else 1
            file, known = self._folder / f"{_NAME}.{number:06}", b""
        output = file.open("ab")
        output.write(content[len(known) :])
        output.flush()
        for other in files:
            _discard(other)
        return self._record_writer(output)

    def _once(self, points: Iterable[Point]) -> Iterator[Point]:
        """Yield one point for each position: several steps may be less than a GFLOP apart."""
        for point in points:
            if point.step > self._last.get(point.key, -1):
                self._last[point.key] = point.step
                yield point


def event_files(folder: Path) -> list[Path]:
    """Return the event files of a run, the oldest first. All but the newest are empty."""
    return sorted(folder.glob(f"{_NAME}.[0-9]*"))


def _discard(file: Path) -> None:
    """Empty a file, or delete it if it is empty.

    A running TensorBoard without its data server continues with the next file after an empty one,
    but not after a deleted one.
    """
    if file.stat().st_size:
        os.truncate(file, 0)
    else:
        file.unlink()


def _write(events: Iterable[Any], writer: "RecordWriter") -> None:
    for event in events:
        writer.write(event.SerializeToString())
    writer.flush()


def _beginning() -> Iterator[Any]:
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    yield Event(file_version="brain.Event:2")
    # At the start of a session, a TensorBoard that is running drops the points of earlier files
    yield Event(step=0, session_log=SessionLog(status=SessionLog.START))


def _events(points: Iterable[Point]) -> Iterator[Any]:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.plugins.scalar.summary_v2 import scalar_pb

    for (step, time), group in groupby(points, lambda point: (point.step, point.time)):
        event = Event(step=step, wall_time=time)
        for point in group:
            event.summary.MergeFrom(scalar_pb(point.key, point.value, point.label))
        yield event
