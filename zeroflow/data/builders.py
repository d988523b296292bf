"""Who builds the parts of a shard set: threads of this process, or whatever fits `Builders`."""

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
"""Parts that a thread builds before another one takes its place. The tokenizer's library keeps a
cache of words for each thread: eight parts are enough for it to pay, and too few for the 150 MB to
which it grows."""

_WAIT_SECONDS = 0.5
"""How long a wait for a part lasts before it is begun again. Python handles a signal that arrives
just before a wait only after it: without an end, that Ctrl-C would be lost."""

T = TypeVar("T")

Ending = Callable[[], BuiltPart | Exception]
"""Waits for a part that is being built, and returns it, or why it could not be built."""


class Builders(NamedTuple):
    start: Callable[[PartJob], Ending]
    """Starts building a part, or queues it."""

    at_once: int
    """Parts that are worth starting before the first of them has ended."""

    give_up: Callable[[], None] = lambda: None
    """Cancels the parts that are queued."""


@contextmanager
def in_threads(
    count: int, build: Callable[[PartJob], BuiltPart] = build_part
) -> Iterator[Builders]:
    """`count` threads, and room for one part in the queue, so that no thread waits for work.

    The threads end with the program: Ctrl-C waits neither for a part nor for a hub that does not
    answer. When a part has failed, those in the queue are given up.
    """
    work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
    failures: list[BaseException] = []  # once there is one, no further part is begun

    def start(job: PartJob) -> Ending:
        end: SimpleQueue[BuiltPart | BaseException] = SimpleQueue()
        context = copy_context()  # it tells a Prefect task which flow run it belongs to

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

    An exception is returned, not raised, as it is known only later whether the part was needed.
    """
    try:
        end = wait()
    except Exception as error:
        return error
    if isinstance(end, BuiltPart | Exception):
        return end
    raise end  # an interrupt
