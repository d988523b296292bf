"""A thread that writes files in the background."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from zeroflow import artifacts
from zeroflow.artifacts import FileRecord


class FileWriter:
    """Writes files in a thread, and computes their manifest entries at the same time.

    The thread is a daemon, so the program does not wait for the disk after Ctrl-C.
    """

    def __init__(self) -> None:
        self._written: dict[str, Future[FileRecord]] = {}
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="file-writer", daemon=True)

    def add(self, file: Path, content: memoryview) -> "Future[FileRecord]":
        """Queue `content` for writing; it must not change until the future is done.

        If writing fails, the future raises OSError.
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
        """Wait until all files are written, and return their manifest entries by name.

        Raises:
            OSError: a file could not be written.
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
