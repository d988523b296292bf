"""Prefect's server with our deployments, and a worker that executes their runs."""

import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolUpdate
from prefect.exceptions import ObjectNotFound
from prefect.settings import temporary_settings
from prefect.states import Cancelled, State

from zeroflow.model.sizes import SIZES
from zeroflow.orchestration import waiting
from zeroflow.orchestration.deployments import DEPLOYMENTS, WAITS, set_up
from zeroflow.orchestration.names import WORK_POOL
from zeroflow.orchestration.programs import Program
from zeroflow.orchestration.server import (
    START_SECONDS,
    STOP_SECONDS,
    answers,
    api_in_use,
    own_api,
    start_server,
    stop_server,
)

log = logging.getLogger(__name__)

_ENGINE = {"prefect.engine", "prefect.flow_engine"}
"""Modules in the command line of a process that executes a flow run."""

_WORKER = ("worker", "start", "--pool", WORK_POOL, "--limit", "1")

# Prefect 3.8.8: a worker with a limit fails with this error if a run is retried while the process
# of its last attempt is still exiting
_RETRIED_TOO_SOON = "this borrower is already holding one of this CapacityLimiter's tokens"

_LOOK_SECONDS = 5.0

_SAVE_SECONDS = 150.0
"""Time for a run to write a checkpoint and end, with a margin."""


class Prefect:
    """Prefect's server with our deployments, and a worker that executes one run at a time.

    Args:
        cache: default folder that runs write to; the form of a run can set another.
        port: port of the server, which is started if it does not run; PREFECT_API_URL takes
            precedence.
        logs: folder for the output of the programs.

    Raises:
        RuntimeError: the server at PREFECT_API_URL does not answer.
    """

    def __init__(self, port: int, cache: Path, logs: Path) -> None:
        found = api_in_use(port)
        self.api, self.to_be_started = found or own_api(port), found is None
        self.programs: list[Program] = []
        self._server: Program | None = None
        self._cache, self._logs = cache.absolute(), logs
        self._told: dict[UUID, str] = {}
        self._next_look = 0.0

    def start_server(self) -> None:
        if self.to_be_started:
            self._server = start_server(self.api, self._logs / "prefect.log")

    def start_worker(self) -> None:
        """Wait for the server, set it up, deploy, and start the worker.

        Raises:
            RuntimeError: one of these failed; the message contains its last lines.
        """
        if self._server:
            self._server.wait_until(partial(answers, self.api.url), START_SECONDS)
        with temporary_settings(self.api.settings):
            set_up()
            deployments = self._write_deployments()
        deploy = ("deploy", "--all", "--prefect-file", str(deployments))
        self._run(*deploy, wait=START_SECONDS)
        self._run(*_WORKER)

    def require_running(self) -> None:
        """
        Raises:
            RuntimeError: a program ended; the message contains its last lines.
        """
        if self._server:
            self._server.require_running()
        for program in list(self.programs):
            try:
                program.require_running()
            except RuntimeError as error:
                if _RETRIED_TOO_SOON not in str(error):
                    raise
                log.info("restarting Prefect's worker, which failed when a run was retried early")
                self.programs.remove(program)
                self._run(*_WORKER)

    def explain_states(self) -> None:
        """Write into the states of flow runs why they wait or were stopped, every few seconds."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _LOOK_SECONDS
        try:
            with temporary_settings(self.api.settings):
                waiting.explain(self._told)
        except Exception as error:  # the server is busy or gone; the runs do not need it
            log.debug("cannot explain the states of flow runs: %s", error)

    def _write_deployments(self) -> Path:
        """Write the deployments of prefect.yaml for this cache, without overwriting schedules."""
        plan = yaml.safe_load(DEPLOYMENTS.read_text(encoding="utf-8"))
        plan["deployments"] = _with_every_size(plan["deployments"])
        with get_client(sync_client=True) as client:
            for deployment in plan["deployments"]:
                flow = deployment["entrypoint"].rpartition(".")[2]
                with suppress(ObjectNotFound):
                    client.read_deployment_by_name(f"{flow}/{deployment['name']}")
                    deployment.pop("schedules", None)  # an existing deployment keeps its schedules
                [form] = deployment["parameters"].values()
                form["cache_dir"] = str(self._cache)
        path = (self._logs / DEPLOYMENTS.name).absolute()
        path.write_text(yaml.safe_dump(plan, sort_keys=False), encoding="utf-8")
        return path

    def stop(self) -> None:
        """Stop the worker after its runs have saved checkpoints, then the server if it is ours."""
        with temporary_settings(self.api.settings):
            for program in reversed(self.programs):
                # Otherwise the worker would start the next queued run when a run ends
                with paused_pool():
                    stopped = _stop_runs(program)
                    if not program.stop(STOP_SECONDS):
                        log.warning("%s did not stop in %d s: killed", program.name, STOP_SECONDS)
                mark_stopped(stopped)
        if self._server:
            stop_server(self._server, self.api)

    def _run(self, *arguments: str, wait: float | None = None) -> None:
        program = Program(
            f"prefect {arguments[0]}",
            [sys.executable, "-m", "prefect", "--no-prompt", *arguments],
            environment=os.environ | self.api.environment | {"DO_NOT_TRACK": "1"},
            log=self._logs / f"{arguments[0]}.log",
        )
        if wait:
            program.wait_for_end(wait)
        else:
            self.programs.append(program)


@contextmanager
def paused_pool() -> Iterator[None]:
    """Pause the work pool in the block, so that workers take no runs; it may be paused already."""
    was_paused = True
    with get_client(sync_client=True) as client:
        try:
            was_paused = client.read_work_pool(WORK_POOL).is_paused
            client.update_work_pool(WORK_POOL, WorkPoolUpdate(is_paused=True))
        except Exception as error:  # a server that is gone gives no runs to a worker
            log.debug("cannot pause the work pool: %s", error)
        try:
            yield
        finally:
            if not was_paused:
                with suppress(Exception):
                    client.update_work_pool(WORK_POOL, WorkPoolUpdate(is_paused=False))


def _stop_runs(program: Program) -> list[UUID]:
    """Stop the flow runs of a worker after they have saved; return their ids.

    The worker must not be stopped before, because it would kill them.
    """
    stopped: list[UUID] = []
    deadline = time.monotonic() + _SAVE_SECONDS
    # Repeated for a run that the worker took just before its pool was paused
    while (runs := _flow_runs(program.pid)) and (left := deadline - time.monotonic()) > 0:
        for run in runs:
            if id := _flow_run_id(run):
                stopped.append(id)
            log.info("asking the flow run in process %d to save and stop", run.pid)
            with suppress(psutil.NoSuchProcess):
                run.terminate()
        psutil.wait_procs(runs, timeout=left)
    return stopped


def mark_stopped(flow_runs: Sequence[UUID]) -> None:
    """Mark flow runs as cancelled if they were stopped before their own code could report it.

    Their worker has reported them as crashed.
    """
    stopped: State[Any] = Cancelled(
        message="Stopped by the end of `zeroflow ui`: Retry resumes it."
    )
    with get_client(sync_client=True) as client:
        for flow_run in flow_runs:
            try:
                state = client.read_flow_run(flow_run).state
                if state is None or not state.is_final() or state.is_crashed():
                    client.set_flow_run_state(flow_run, stopped, force=True)
            except Exception as error:
                log.warning("cannot report to Prefect that a flow run was stopped: %s", error)


def _with_every_size(deployments: list[dict[str, object]]) -> list[dict[str, object]]:
    """Return `deployments`, plus one like `custom` for each size that has none."""
    named = {deployment["name"]: deployment for deployment in deployments}
    sizes = {
        size: named["custom"]
        | {
            "name": size,
            "description": f"Train and check the {size} model. {WAITS}",
            "tags": ["pretrain", size],
            "parameters": {"run": {"size": size}},
        }
        for size in SIZES
    }
    return list((sizes | named).values())


def _flow_runs(pid: int) -> list[psutil.Process]:
    """Return the processes of flow runs among the descendants of process `pid`."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if _ENGINE & {*process.cmdline()}:
                found.append(process)
    return found


def _flow_run_id(process: psutil.Process) -> UUID | None:
    with suppress(psutil.Error, KeyError, ValueError):
        return UUID(process.environ()["PREFECT__FLOW_RUN_ID"])
    return None
