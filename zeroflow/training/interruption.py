"""Signals that ask a flow's process to stop, and do so even if a library drops their exception.

A handler raises its exception wherever the main thread is. In a serializer in Python, as Prefect
has for its settings, pydantic replaces the exception with an ordinary error, and code that expects
errors continues.
"""

import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], object]

_LOOK_SECONDS = 0.5
"""Time between two checks that an exception still exists."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C. Unlike the built-in exception, it can have a weak reference."""


class StopSignals:
    """The signals that arrive during a block of `insistent`."""

    def __init__(self) -> None:
        self.received: int | None = None
        """Number of the first signal."""

        self.over = threading.Event()
        """Set at the end of the block."""

    def insist(self, handler: Handler) -> Handler:
        """Return `handler`, which repeats its signal if the exception that it raises is lost."""

        def on_signal(number: int, frame: FrameType | None) -> None:
            self.received = self.received or number
            try:
                if handler is signal.default_int_handler:
                    raise Interrupted
                handler(number, frame)
            except BaseException as stop:
                raised = weakref.ref(stop)
                threading.Thread(target=self._repeat, args=(number, raised), daemon=True).start()
                raise

        return on_signal

    def _repeat(self, number: int, raised: "weakref.ref[BaseException]") -> None:
        while raised() is not None:  # on its way up, or kept by the code that handles it
            if self.over.wait(_LOOK_SECONDS):
                return
        if not self.over.is_set():
            signal_main_thread(number)


def signal_main_thread(number: int) -> None:
    """Send a signal to this process so that it ends a wait of the main thread.

    The system may give a signal of `os.kill` to any thread, and then Python's handler runs only
    when the main thread executes Python code again.
    """
    main = threading.main_thread().ident
    assert main is not None, "the main thread runs"
    signal.pthread_kill(main, number)


@contextmanager
def insistent(*numbers: int) -> Iterator[StopSignals]:
    """Repeat a signal that arrives in the block until its exception ends the block.

    Signals that are ignored, or whose default action ends the process, are left as they are. In a
    thread other than the main one, this does nothing.
    """
    signals, before = StopSignals(), {}
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            if callable(handler := signal.getsignal(number)):
                before[number] = handler, signals.insist(handler)
                signal.signal(number, before[number][1])
    try:
        yield signals
    finally:
        signals.over.set()
        for number, (handler, ours) in before.items():
            if signal.getsignal(number) is ours:
                signal.signal(number, handler)
