"""The slot of a run that uses GPUs: a concurrency limit in Prefect, so that runs take turns."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from prefect.concurrency.sync import concurrency

from zeroflow.orchestration import waiting
from zeroflow.orchestration.flow_context import reachable
from zeroflow.orchestration.names import GPU_LIMIT

log = logging.getLogger(__name__)

_SLOT_SECONDS = 5.0
"""Time to wait for the slot before a log line says that the run is waiting."""

_MESSAGE = f"waiting: another run uses the GPU (limit {GPU_LIMIT} in Prefect)"


@contextmanager
def gpu_slot() -> Iterator[None]:
    """Hold the only slot for GPU jobs until the block ends; wait while another run holds it.

    If the server is unreachable or has no such limit, the run proceeds without the slot.
    """
    with ExitStack() as held:
        try:
            if not reachable():
                raise ConnectionError("its server does not answer")
            _take_slot(held)
        except Exception as error:
            log.warning("Prefect cannot reserve the GPU for this run: %s", error)
        yield


def _take_slot(held: ExitStack) -> None:
    # Not strict: if the server is lost, so is the lease, and that must not end the training
    try:
        held.enter_context(concurrency(GPU_LIMIT, timeout_seconds=_SLOT_SECONDS, strict=False))
    except TimeoutError:
        log.info("%s", _MESSAGE)
        with waiting.shown(_MESSAGE):
            held.enter_context(concurrency(GPU_LIMIT, strict=False))
