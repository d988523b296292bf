"""TODO docstring."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from queue import SimpleQueue
from typing import NamedTuple

from zeroflow.data import allocator, parts
from zeroflow.data.part_facts import BuiltPart, PartJob

_THREAD_PARTS = 8
"""A thread ends after so many. The tokenizer's library remembers words for each: enough of them
to be fast, and not the 150 MB that it takes in the end."""


Ending = Callable[[], BuiltPart | Exception]
"""Waits for a part that is being built, and gives it or why there is none."""


class Builders(NamedTuple):
    """Who builds the parts of a set."""

    start: Callable[[PartJob], Ending]
    at_once: int
    """Parts that are worth to be started before the first of them has ended."""

    give_up: Callable[[], None] = lambda: None
    """Parts that have been started and not begun are not needed."""


@contextmanager
def in_threads(
    count: int, build_part: Callable[[PartJob], BuiltPart] = parts.build_part
) -> Iterator[Builders]:
    """So many threads, and a part that waits, so that none of them does.

    They end with the program: Ctrl-C does not wait for a part, or for a hub that does not answer.
    When a part has failed, those that wait are given up.
    """
    work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
    reasons: list[BaseException] = []  # not to begin another part

    def start(job: PartJob) -> Ending:
        end: SimpleQueue[BuiltPart | BaseException] = SimpleQueue()
        context = copy_context()  # by which a task knows its flow run

        def run() -> None:
            try:
                end.put(reasons[0] if reasons else context.run(build_part, job))
            except BaseException as error:
                reasons.append(error)
                end.put(error)

        work.put(run)
        return partial(outcome, end.get)

    allocator.share_arenas(max(2, count))
    try:
        for _ in range(count):
            _start_thread(work)
        yield Builders(start, count + 1, lambda: reasons.append(CancelledError()))
    finally:
        for _ in range(count):
            work.put(None)


def _start_thread(work: SimpleQueue[Callable[[], None] | None]) -> None:
    threading.Thread(target=_work_off, args=(work,), name="parts", daemon=True).start()


def _work_off(work: SimpleQueue[Callable[[], None] | None]) -> None:
    for _ in range(_THREAD_PARTS):
        if (run := work.get()) is None:
            return
        run()
    _start_thread(work)


def outcome(build_part: Callable[[], BuiltPart | BaseException]) -> BuiltPart | Exception:
    """The part, or why there is none: whether it was needed is known only later."""
    try:
        end = build_part()
    except Exception as error:
        return error
    if isinstance(end, BuiltPart | Exception):
        return end
    raise end
