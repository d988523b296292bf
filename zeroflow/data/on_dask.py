"""Dask workers that build the parts of a shard set."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from zeroflow.data.part_job import BuiltPart, PartJob
from zeroflow.data.parts import build_part, log_part

if TYPE_CHECKING:
    from distributed import Client


@contextmanager
def on_dask(workers: int, address: str | None) -> Iterator[Callable[[PartJob], BuiltPart]]:
    """A function that builds a part on a Dask worker, for calls from many threads.

    Only the job and its result travel: a worker needs the package and the cache folder, and knows
    nothing of the run or of Prefect. No worker is started before there is a part to build.

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
            # Each attempt has its own key: Dask would return the failure of the one before
            key = f"{job.path.name}-{uuid4().hex}"
            built: BuiltPart = clients[0].submit(build_part, job, key=key).result()
            log_part(job, built)
            return built

        yield build_on_dask


@contextmanager
def _client(workers: int, address: Any) -> Iterator["Client"]:
    """
    Raises:
        ValueError: Dask is not installed, or no scheduler answers at `address`.
    """
    # By default it logs a dozen lines for each worker
    os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "warning")
    try:
        from distributed import Client, LocalCluster  # an extra of the package
    except ImportError as error:
        raise ValueError(
            f"--data-runner dask needs a package ({error}): pip install 'zeroflow[dask]'"
        ) from error
    # Closed, not left: the thread that leaves a client has to be the one that entered it
    with ExitStack() as stack:
        if address is None:
            address = stack.enter_context(
                LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None)
            )
        try:
            client = Client(address, set_as_default=False)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"--dask-address {address}: no Dask scheduler answers there ({error})"
            ) from error
        yield stack.enter_context(closing(client))
