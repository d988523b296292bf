"""Builders of shard parts in a flow: threads of this process, or Dask workers."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefect.task_runners import TaskRunner
from prefect.tasks import Task

from zeroflow.data.builders import Builders, Ending, in_threads, outcome
from zeroflow.data.part_job import BuiltPart, PartJob
from zeroflow.settings.run_config import BuildChoice


@contextmanager
def part_builders(build_part: Task[[PartJob], BuiltPart], build: BuildChoice) -> Iterator[Builders]:
    """Yield the builders of parts; each part is a task of the flow run.

    Raises:
        ValueError: Dask is requested but not installed.
    """
    if build.data_runner == "threads":
        # Not Prefect's own threads, because Ctrl-C would wait for them
        with in_threads(build.data_workers, build_part) as builders:
            yield builders
        return
    with _dask(build) as runner:

        def start(job: PartJob) -> Ending:
            future = runner.submit(build_part, parameters={"job": job})
            return lambda: outcome(future.result)

        yield Builders(start, build.data_workers)


def _dask(build: BuildChoice) -> TaskRunner[Any]:
    os.environ.setdefault(
        "DASK_LOGGING__DISTRIBUTED", "warning"
    )  # by default it logs a dozen lines per worker
    try:
        from prefect_dask import DaskTaskRunner  # an extra of the package
    except ImportError as error:
        raise ValueError(
            f"--data-runner dask needs a package ({error}): pip install 'zeroflow[dask]'"
        ) from error
    if build.dask_address:
        return DaskTaskRunner(address=build.dask_address)
    workers = {"n_workers": build.data_workers, "threads_per_worker": 1, "dashboard_address": None}
    return DaskTaskRunner(cluster_kwargs=workers)
