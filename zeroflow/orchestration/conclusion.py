"""The end of a flow's own code as Prefect shows it: a result, a stop, or a failure."""

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING, TypeVar
from uuid import UUID

from prefect import runtime
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import Pause, TerminationSignal
from prefect.states import Cancelled, Failed, State

from zeroflow.config import Config
from zeroflow.orchestration import form
from zeroflow.orchestration.buttons import is_suspended, watched
from zeroflow.orchestration.flow_context import logs_delivered
from zeroflow.run_folder import RunFolder
from zeroflow.settings.flags import error_message
from zeroflow.text.markup import SHOWN_AT_THE_END
from zeroflow.training import checkpoint
from zeroflow.training.failures import TrainingStopped
from zeroflow.training.interruption import StopSignals, insistent

if TYPE_CHECKING:
    from zeroflow.orchestration.view import PrefectView

log = logging.getLogger(__name__)

Asked = TypeVar("Asked", bound=Config)

STOPS = (KeyboardInterrupt, SystemExit, TerminationSignal)
"""Raised in the main thread by Ctrl-C and by signals."""


@dataclass
class Conclusion:
    """The end of a flow's own code. It is known even if the server is unreachable."""

    result: Path | None = None
    error: BaseException | None = None
    in_worker: bool = False
    """True if a worker executes the flow run, or its parent."""


_current: ContextVar[Conclusion | None] = ContextVar("conclusion", default=None)


@contextmanager
def observed() -> Iterator[Conclusion]:
    """Yield the conclusion of the flow that runs in the block."""
    outer, within_a_flow = _current.get(), FlowRunContext.get() is not None
    in_worker = outer.in_worker if outer else within_a_flow
    token = _current.set(conclusion := Conclusion(in_worker=in_worker))
    try:
        yield conclusion
    finally:
        _current.reset(token)


def conclude(
    config: type[Asked], given: object, work: Callable[[Asked], Path], view: "PrefectView"
) -> Path | State:
    """Run the code of a flow; return its result, or the final state of its flow run.

    A stop ends in state Cancelled and a failure in state Failed, each with one paragraph. By
    default, Prefect would show a stop as a crash, and a failure as three tracebacks.

    Args:
        config: class of the flow's parameter.
        given: the parameter, which may be invalid.
        view: view of the run, which has its folder when `work` has settled the run.
    """
    conclusion = _current.get() or Conclusion(in_worker=runtime.deployment.id is not None)
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_TOLD_ONCE)
    with (
        logs_delivered(),
        insistent(signal.SIGINT, signal.SIGTERM) as stops,
        _stopped_by_buttons(stops),
    ):
        try:
            asked = form.read(config, given)
            conclusion.result = work(asked)
            return conclusion.result
        except (*STOPS, TrainingStopped, Pause) as stop:  # a task of a suspended run raises Pause
            return _concluded(conclusion, stop, view.folder)
        except Exception as error:
            if stops.received:
                return _concluded(conclusion, _exception_of(stops.received), view.folder)
            conclusion.error = error
            message = paragraph(error)
            if not is_foreseen(error):
                log.error("%s", message, exc_info=error)
            else:  # a command prints the error itself
                log.error("%s", message, extra=SHOWN_AT_THE_END if _current.get() else None)
            return Failed(message=message)


def paragraph(error: BaseException) -> str:
    """Return the message of an error, followed by its notes."""
    message = error_message(error) if isinstance(error, Exception) else repr(error)
    return "\n".join([message, *getattr(error, "__notes__", ())])


def is_foreseen(error: BaseException) -> bool:
    """Return True if the message of `error` is written for users, so no traceback is needed."""
    if isinstance(error, OSError) or type(error).__module__.startswith("zeroflow"):
        return True
    raised_in = ""
    for frame, _ in walk_tb(error.__traceback__):
        raised_in = frame.f_globals.get("__name__", "")
    by_us = raised_in.startswith(("zeroflow", "pydantic"))
    return by_us and isinstance(error, ValueError | RuntimeError)


def _exception_of(number: int) -> BaseException:
    """Return the exception of a signal that a library has replaced with an error of its own."""
    return KeyboardInterrupt() if number == signal.SIGINT else TerminationSignal(number)


def _stopped_by_buttons(stops: StopSignals) -> AbstractContextManager[object]:
    """Let a worker's flow run be suspended; `run_here` watches the runs of a shell."""
    if _current.get() is not None or not runtime.flow_run.id:
        return nullcontext()
    run = UUID(runtime.flow_run.id)
    return watched(run, by_worker=True, stopped=lambda: stops.received is not None)


def _concluded(conclusion: Conclusion, stop: BaseException, folder: RunFolder | None) -> State:
    """Return the final state of a flow run that was stopped.

    Raises:
        Pause: it was suspended, and remains so.
    """
    conclusion.error = stop
    step = checkpoint.newest_step(folder.checkpoints) if folder else 0
    kept = f"saved at step {step:,}" if step else "finished work is kept"
    if is_suspended(state := _own_state()):
        log.info("Suspended in Prefect: %s; Resume resumes from there.", kept)
        raise Pause(state=state)
    again = "Retry" if conclusion.in_worker else "the same command"
    message = f"Stopped by {_cause(stop)}: {kept}; {again} resumes from there."
    log.info("%s", message)
    return Cancelled(message=message)


def _own_state() -> State | None:
    with suppress(Exception), get_client(sync_client=True) as client:  # it may be unreachable
        return client.read_flow_run(UUID(runtime.flow_run.id)).state
    return None


def _cause(stop: BaseException) -> str:
    run = runtime.flow_run
    with suppress(Exception), get_client(sync_client=True) as client:  # it may be unreachable
        for id in (run.id, run.root_flow_run_id):
            state = client.read_flow_run(UUID(id)).state
            if state and (state.is_cancelling() or state.is_cancelled()):
                return "Cancel in Prefect"
    return "Ctrl-C" if isinstance(stop, KeyboardInterrupt) else "a signal"


class _ToldOnce(logging.Filter):
    """Drops Prefect's own log lines about the end of a stage or run, which repeat ours."""

    _BEGINNINGS = (
        "Task run failed with ",
        "Encountered exception during execution",
        "Engine execution exited with unexpected exception",
        "Finished in state Failed(",
        "Finished in state Cancelled(",
    )

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self._BEGINNINGS)


_TOLD_ONCE = _ToldOnce()
