"""Builders of the parts of a shard set: the interface, and threads of this process."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from queue import Empty, SimpleQueue
from typing import NamedTuple, TypeVar

from zeroflow.data import allocator
from zeroflow.data.part_job import BuiltPart, PartJob
from zeroflow.data.parts import build_part

THREAD_PARTS = 8
"""Number of parts that a thread builds before a new thread replaces it. The tokenizer library keeps
a cache of words for each thread. During eight parts the cache saves time, and does not reach its
full size of 150 MB."""

_WAIT_SECONDS = 0.5
"""Timeout of a wait for a part, which is then repeated. If a signal arrives just before a wait,
Python handles it only when the wait ends. Without a timeout, such a Ctrl-C would have no effect."""

T = TypeVar("T")

Ending = Callable[[], BuiltPart | Exception]
"""Waits for a part that is being built; returns the part, or the exception that prevented it."""


class Builders(NamedTuple):
    start: Callable[[PartJob], Ending]
    """Starts or queues the build of a part."""

    at_once: int
    """Number of parts to start before waiting for the first."""

    give_up: Callable[[], None] = lambda: None
    """Cancels the parts that are queued."""


BuildPart = Callable[[PartJob], BuiltPart]


@contextmanager
def in_threads(count: int, build: BuildPart = build_part) -> Iterator[Builders]:
    """Yield builders with `count` threads, and one more part in the queue, so that none is idle.

    The threads are daemons: after Ctrl-C the program ends without waiting for a part, or for a hub
    that does not answer. After a part has failed, queued parts are cancelled.
    """
    work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
    failures: list[BaseException] = []  # if there is one, no further part is started

    def start(job: PartJob) -> Ending:
        end: SimpleQueue[BuiltPart | BaseException] = SimpleQueue()
        context = copy_context()  # from which Prefect knows the flow run

        def run() -> None:
            try:
                end.put(failures[0] if failures else context.run(build, job))
            except BaseException as error:
                failures.append(error)
                end.put(error)

        work.put(run)
        return partial(outcome, partial(_take, end))

    allocator.share_arenas(max(2, count))
    try:
        for _ in range(count):
            _start_thread(work)
        yield Builders(start, count + 1, lambda: failures.append(CancelledError()))
    finally:
        for _ in range(count):
            work.put(None)


def _start_thread(work: SimpleQueue[Callable[[], None] | None]) -> None:
    threading.Thread(target=_work_off, args=(work,), name="parts", daemon=True).start()


def _work_off(work: SimpleQueue[Callable[[], None] | None]) -> None:
    for _ in range(THREAD_PARTS):
        if (run := work.get()) is None:
            return
        run()
    _start_thread(work)


def _take(queue: SimpleQueue[T]) -> T:
    while True:
        try:
            return queue.get(timeout=_WAIT_SECONDS)
        except Empty:
            continue


def outcome(wait: Callable[[], BuiltPart | BaseException]) -> BuiltPart | Exception:
    """Return the part that `wait` returns, or the exception that it returns or raises.

    An exception is returned instead of raised, because the caller may not need this part.
    """
    try:
        end = wait()
    except Exception as error:
        return error
    if isinstance(end, BuiltPart | Exception):
        return end
    raise end  # an interrupt
