"""Builders of the parts of a shard set: threads of this process, or any other `Builders`."""

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
"""Parts that a thread builds before a new thread replaces it. The tokenizer's library keeps a cache
of words for each thread. Over eight parts that cache saves time, and does not yet reach its full
size of 150 MB."""

_WAIT_SECONDS = 0.5
"""Timeout of a wait for a part, which is then repeated. Python handles a signal that arrives just
before a wait only when that wait ends: without a timeout, such a Ctrl-C would have no effect."""

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
    """Builders with `count` threads and one part in the queue, so that no thread waits for work.

    The threads end with the program: Ctrl-C waits neither for a part nor for a hub that does not
    answer. After a part has failed, those in the queue are cancelled.
    """
    work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
    failures: list[BaseException] = []  # after the first, no part is started

    def start(job: PartJob) -> Ending:
        end: SimpleQueue[BuiltPart | BaseException] = SimpleQueue()
        context = copy_context()  # Prefect finds the flow run of a task in it

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
    """The part that `wait` returns, or the exception that it returns or raises.

    The exception is returned, not raised, because the caller may not need this part.
    """
    try:
        end = wait()
    except Exception as error:
        return error
    if isinstance(end, BuiltPart | Exception):
        return end
    raise end  # an interrupt
