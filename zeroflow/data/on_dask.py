"""Dask workers that build the parts of a shard set."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from zeroflow.data.part_job import BuiltPart, PartJob
from zeroflow.data.parts import build_part, log_part

if TYPE_CHECKING:
    from distributed import Client


_START_SECONDS = 60.0
"""Maximum time for workers to start, on a busy machine."""


@contextmanager
def on_dask(workers: int, address: str | None) -> Iterator[Callable[[PartJob], BuiltPart]]:
    """Yield a function that builds a part on a Dask worker; many threads may call it.

    Only the job and its result are sent: a worker needs the package and the cache folder, but
    neither the run nor Prefect. Workers are started when the first part is built.

    Args:
        workers: processes on this machine, if no `address` is given.
        address: scheduler of a running cluster.
    """
    with ExitStack() as stack:
        clients: list[Client] = []
        starting = threading.Lock()

        def build_on_dask(job: PartJob) -> BuiltPart:
            with starting:
                if not clients:
                    clients.append(stack.enter_context(_client(workers, address)))
            # Each attempt has its own key. For a known key, Dask would return the earlier failure
            key = f"{job.path.name}-{uuid4().hex}"
            built: BuiltPart = clients[0].submit(build_part, job, key=key).result()
            log_part(job, built)
            return built

        try:
            yield build_on_dask
        finally:
            # After Ctrl-C a thread may still be starting the workers. If this process ended
            # meanwhile, they would print tracebacks, and Python would warn of leaked semaphores
            if starting.acquire(timeout=_START_SECONDS):
                starting.release()


@contextmanager
def _client(workers: int, address: Any) -> Iterator["Client"]:
    """
    Raises:
        ValueError: Dask is not installed, or no scheduler answers at `address`.
    """
    # By default Dask logs a dozen lines for each worker
    os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "warning")
    try:
        from distributed import Client, LocalCluster  # an extra of the package
    except ImportError as error:
        raise ValueError(
            f"--data-runner dask needs a package ({error}): pip install 'zeroflow[dask]'"
        ) from error
    # `closing` instead of the client's own context, which must be left by the thread that entered
    # it
    with ExitStack() as stack:
        if address is None:
            # If a part fails, an exception arrives here. Dask's own log lines and tracebacks about
            # workers that end while they build, as after Ctrl-C, would look like failures. There is
            # no memory limit, because at 80 % of it a worker would pause without a visible message
            cluster = LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                memory_limit=None,
                dashboard_address=None,
                silence_logs=logging.CRITICAL,
                preload=[__name__],  # calls dask_setup
            )
            address = stack.enter_context(cluster)
        try:
            client = Client(address, set_as_default=False)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"--dask-address {address}: no Dask scheduler answers there ({error})"
            ) from error
        yield stack.enter_context(closing(client))


def dask_setup(worker: object) -> None:
    """Ignore Ctrl-C in a worker on this machine, which Dask calls at its start.

    A terminal sends SIGINT to all processes of a command. Workers would print tracebacks, and the
    command stops them anyway.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
