"""TODO docstring."""

import logging
from typing import Any

from prefect import runtime
from prefect.states import Completed, State

from zeroflow.data.hub import HubError
from zeroflow.training.job import TrainingFailed

log = logging.getLogger(__name__)


def task_name() -> str:
    """Of the task that goes on, for its run as well, to which Prefect would add random digits."""
    return str(runtime.task_run.task_name)


def is_transient(task: Any, task_run: Any, state: State) -> bool:
    """Whether a failed task is worth another try: the hub was out of reach or busy."""
    try:
        state.result()
    except HubError as error:
        return error.transient
    except BaseException:
        return False
    return False


def was_helped(task: Any, task_run: Any, state: State) -> bool:
    """Whether something was changed about a training that failed, so that a retry has a chance."""
    try:
        state.result()
    except TrainingFailed as failure:
        return failure.will_retry
    except BaseException:
        return False
    return False


def was_killed(task: Any, task_run: Any, state: State) -> bool:
    """Whether the process of a failed check was killed, so that nothing speaks against a retry."""
    try:
        state.result()
    except TrainingFailed as failure:
        if failure.reason == "killed":
            log.warning("%s is tried again: %s", task.name, str(failure).splitlines()[0])
            return True
    except BaseException:
        return False
    return False


def completed(result: Any, *, reused: bool) -> State:
    """The end of a task, that the UI shows as Reused where nothing had to be done."""
    return Completed(name="Reused" if reused else None, data=result)
