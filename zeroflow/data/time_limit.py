"""Calls that return late, such as those of a resolver, or cannot be interrupted by a signal."""

import contextvars
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


def interruptible(call: Callable[[], T]) -> T:
    """Return the result of `call`; a signal ends the wait for it, also within compiled code.

    After a signal, `call` goes on in its thread until it returns or the process ends.
    """
    return within(None, call)


def within(
    seconds: float | None,
    call: Callable[[], T],
    *,
    late: Callable[[T], object] = lambda result: None,
) -> T:
    """Return the result of `call` if it returns in time.

    Args:
        seconds: None for no limit.
        late: called with a result that comes after the time limit.

    Raises:
        TimeoutError: `call` did not return in time.
    """
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    # In a copy of this context, from which Prefect knows which flow run a log line belongs to
    context = contextvars.copy_context()
    Thread(target=context.run, args=(work,), daemon=True).start()
    try:
        return future.result(seconds)
    except TimeoutError as error:
        future.add_done_callback(lambda done: None if done.exception() else late(done.result()))
        raise TimeoutError(str(error) or f"no answer within {seconds:g} s") from error
