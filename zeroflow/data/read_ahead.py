"""Read-ahead: a thread that produces the items of an iterator in advance."""

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")

_ITEMS = 3
"""Number of items in advance: enough to bridge a slow read, and few enough to take little
memory."""


def read_ahead(source: Iterator[T]) -> Iterator[T]:
    """Yield the items of `source`, which a thread produces.

    The thread waits for disk or network while the caller computes. It ends with this iterator, or
    with the program.
    """
    ready: queue.Queue[T | BaseException | None] = queue.Queue(maxsize=_ITEMS)
    closed = threading.Event()

    def put(item: T | BaseException | None) -> None:
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.1)  # a timeout, to check whether the caller still reads
                return
            except queue.Full:
                continue

    def run() -> None:
        try:
            for item in source:
                put(item)
                if closed.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)

    threading.Thread(target=run, name="read-ahead", daemon=True).start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
