"""TODO docstring."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from prefect.concurrency.sync import concurrency

from zeroflow.orchestration import server
from zeroflow.orchestration.flow_runs import reachable

log = logging.getLogger(__name__)


_SLOT_SECONDS = 5.0


@contextmanager
def gpu_slot(device: str) -> Iterator[None]:
    """Hold the one slot for jobs on GPUs within the block, as soon as no other run does.

    A server that is away, before or meanwhile, or knows no limit, costs the slot and not the run.
    """
    with ExitStack() as held:
        if device == "cuda":
            try:
                if not reachable():
                    raise ConnectionError("its server does not answer")
                _take_slot(held)
            except Exception as error:
                log.warning("Prefect does not keep other runs off the GPU: %s", error)
        yield


def _take_slot(held: ExitStack) -> None:
    # Not strict, as a lease that is lost with the server would end the training
    try:
        held.enter_context(
            concurrency(server.GPU_LIMIT, timeout_seconds=_SLOT_SECONDS, strict=False)
        )
    except TimeoutError:
        log.info(
            "waiting until another run is done with the GPU (limit %s in Prefect)",
            server.GPU_LIMIT,
        )
        held.enter_context(concurrency(server.GPU_LIMIT, strict=False))
