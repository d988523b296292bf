"""A thread that writes files beside other work."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from zeroflow import artifacts
from zeroflow.artifacts import FileRecord


class FileWriter:
    """Writes files in a thread, and computes their entries in the manifest while it writes.

    The thread ends with the program: Ctrl-C does not wait for a disk.
    """

    def __init__(self) -> None:
        self._written: dict[str, Future[FileRecord]] = {}
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="file-writer", daemon=True)

    def add(self, file: Path, content: memoryview) -> "Future[FileRecord]":
        """Write `content`, which must not change until the future is done.

        The future's error is an OSError.
        """
        future = self._written[file.name] = Future()

        def write() -> None:
            try:
                future.set_result(artifacts.write_recorded(file, content))
            except BaseException as error:
                future.set_exception(error)

        self._work.put(write)
        return future

    def records(self) -> dict[str, FileRecord]:
        """Entries in the manifest by the names of the files, once all are written.

        Raises:
            OSError: the disk did not take one of them.
        """
        return {name: future.result() for name, future in self._written.items()}

    def _run(self) -> None:
        while (write := self._work.get()) is not None:
            write()

    def __enter__(self) -> "FileWriter":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._work.put(None)
        self._thread.join()
