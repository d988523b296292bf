"""The buttons that stop a flow run, Cancel and Suspend, where Prefect does not signal its process.

Prefect signals processes that its workers have started, if their run is being cancelled. It signals
no process of a shell, and none whose run was suspended: the run would continue, and a later Cancel
would only change the state.
"""

import contextvars
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.states import State

from zeroflow.training.interruption import signal_main_thread

log = logging.getLogger(__name__)

_POLL_SECONDS = 3.0
"""Time between two requests for the state of a flow run."""


def is_suspended(state: State | None) -> bool:
    """Return True if a flow run is to end now and to be resumed in another process."""
    return state is not None and state.is_paused()


@contextmanager
def watched(
    flow_run_id: UUID, *, by_worker: bool, stopped: Callable[[], bool]
) -> Iterator[threading.Event]:
    """Send this process SIGTERM if a button stops the flow run during the block.

    Args:
        by_worker: True if a worker executes the flow run, and signals the process of a run that is
            being cancelled.
        stopped: returns True if the flow run is stopping already, which its state shows too.

    Yields:
        An event that is set before the signal if the run was cancelled.
    """
    cancelled, ended = threading.Event(), threading.Event()

    def watch() -> None:
        while not ended.wait(_POLL_SECONDS):
            with suppress(Exception), get_client(sync_client=True) as client:  # unreachable
                state = client.read_flow_run(flow_run_id).state
                if state is None or stopped():
                    continue
                if state.is_cancelled() or (state.is_cancelling() and not by_worker):
                    cancelled.set()
                elif not is_suspended(state):
                    continue
                signal_main_thread(signal.SIGTERM)
                return

    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(watch,), daemon=True).start()
    try:
        yield cancelled
    finally:
        ended.set()
