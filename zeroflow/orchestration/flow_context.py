"""The current flow run: its name, tags and log, while its server may be unreachable."""

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn, Protocol
from uuid import UUID

from prefect import runtime
from prefect.client.orchestration import get_client
from prefect.logging.handlers import APILogHandler, PrefectConsoleHandler
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from pydantic import ValidationError

from zeroflow.config import Config
from zeroflow.orchestration import form, server
from zeroflow.settings.proof import ProofRun
from zeroflow.settings.run_config import RunConfig
from zeroflow.settings.settled import Settled
from zeroflow.settings.sweep import SweepConfig
from zeroflow.settings.zero_lab import ZeroLabRun
from zeroflow.text.markup import LineFormatter

log = logging.getLogger(__name__)


class Asked(Protocol):
    """Settings that a flow takes as its only parameter."""

    @property
    def anywhere(self) -> Config:
        """Return the same settings with absolute paths, which are also valid in a retry."""


_lost = threading.Event()
"""Set if the server was unreachable at the end of a flow."""

_to_the_end = ExitStack()
"""Prefect settings for the rest of this process."""


@contextmanager
def logs_delivered() -> Iterator[None]:
    """Also send the log lines of the block to the log of the current flow run.

    If the server is unreachable at the end, Prefect tries to report the end of the flow only once,
    instead of for minutes.
    """
    logger, handler = logging.getLogger("zeroflow"), APILogHandler()
    if any(isinstance(other, APILogHandler) for other in logger.handlers):
        yield  # the handler of the parent run sends each line to the innermost run
        return
    handler.setLevel(logging.INFO)
    handler.setFormatter(LineFormatter())
    if logger.level == logging.NOTSET:  # in a worker; a command has set the level
        logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        if not reachable():
            _lost.set()
            _to_the_end.enter_context(temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}))


def silence_console() -> None:
    """Hide Prefect's own log lines in the terminal; they are in the log of the flow run."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, PrefectConsoleHandler):
            root.removeHandler(handler)
    # These loggers print pages of errors while the server is unreachable
    for name in ("prefect", "prefect._internal", "asyncio"):
        logging.getLogger(name).handlers = [logging.NullHandler()]
    logging.raiseExceptions = False


def leave(code: int) -> NoReturn:
    """End this process, without the clean-up of libraries at the end of the interpreter.

    It takes seconds, and minutes if the server is lost, because Prefect retries.
    """
    if not _lost.is_set():
        server.deliver()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def tags() -> dict[str, str]:
    """Return the MLflow tags that identify the current flow run."""
    flow_run_id = runtime.flow_run.id
    return {"prefect.flow_run_id": str(flow_run_id)} if flow_run_id else {}


def given_settings(asked: Asked) -> dict[str, object]:
    """Return only the settings that were given explicitly: a retry settles the defaults itself."""
    return form.filled(asked.anywhere)


def first_name(asked: object) -> str:
    """Return the name of a flow run whose settings are not settled yet."""
    parts: tuple[str | None, ...]
    match asked:
        case RunConfig():
            parts = (asked.model.name, asked.data.name, asked.run_name)
        case SweepConfig():
            parts = ("sweep", asked.name)
        case ProofRun():
            parts = ("proof", asked.run.run_name)
        case ZeroLabRun():
            parts = ("ZeRO laboratory", asked.run.run_name)
        case _:
            raise TypeError(f"no flow takes {type(asked).__name__}")
    return " · ".join(part for part in parts if part)


def name_at_start(flow: str, config: type[Config]) -> Callable[[], str]:
    """Return the function that names a flow run of `flow`, whose parameter is a `config`."""

    def name() -> str:
        [given] = runtime.flow_run.parameters.values()
        return name_of(flow, config, given)

    return name


def name_of(flow: str, config: type[Config], given: object) -> str:
    """Return the name of a flow run from its parameter, which may be invalid."""
    try:
        return first_name(form.read(config, given))
    except ValidationError:
        return " · ".join((flow, *_given_names(given), "refused"))


def _given_names(given: object) -> Iterator[str]:
    """Yield the names of runs and sweeps in a form, also those within groups."""
    if isinstance(given, Mapping):
        for key, value in given.items():
            if key in ("run_name", "sweep_name") and isinstance(value, str):
                yield value
            else:
                yield from _given_names(value)


def name_flow_run(asked: RunConfig, run: Settled) -> None:
    """Name and tag the flow run after its settled `run`, so that a retry resumes that run.

    Args:
        asked: the parameter of the flow.
        run: its settled form.
    """
    _describe_flow_run(
        f"{run.model.name} · {run.data.name} · {run.run_name}",
        parameters={"run": given_settings(asked.model_copy(update={"run_name": run.run_name}))},
        tags=sorted({*runtime.flow_run.tags, run.model.name, run.data.data_mode, run.device}),
    )


def _describe_flow_run(name: str, **found: Any) -> None:
    if not (flow_run_id := runtime.flow_run.id):
        return
    try:
        with get_client(sync_client=True) as client:
            client.update_flow_run(UUID(flow_run_id), name=name, **found)
    except Exception as error:  # a missing name does no harm
        log.warning("cannot name the flow run in Prefect: %s", error)


def reachable() -> bool:
    """Return True if the server in use answers, or if no server is set."""
    url = PREFECT_API_URL.value()
    return url is None or server.answers(url)
