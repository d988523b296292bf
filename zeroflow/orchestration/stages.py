"""Stages of the pipeline as Prefect tasks: names, states and retries."""

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

from prefect import runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Cancelled, Completed, Failed, State

from zeroflow import pipeline
from zeroflow.data.builders import BuildPart
from zeroflow.data.hub import HubError
from zeroflow.orchestration.conclusion import STOPS, paragraph
from zeroflow.pipeline import Stages
from zeroflow.training import recovery
from zeroflow.training.failures import TrainingFailed

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


def is_transient(error: BaseException) -> bool:
    """True if the hub was unreachable or busy."""
    return isinstance(error, HubError) and error.transient


def was_remedied(error: BaseException) -> bool:
    """Return True if training failed, and another attempt may succeed."""
    return isinstance(error, TrainingFailed) and error.will_retry


def was_killed(error: BaseException) -> bool:
    """True if the process of a check was killed, so the check has no result."""
    return isinstance(error, TrainingFailed) and error.reason == "killed"


# A stage finds its own finished work on disk. Prefect's cache would miss a change inside zeroflow,
# and could return the path of a folder that has been deleted since
_UNCACHED: dict[str, Any] = {"cache_policy": NO_CACHE, "persist_result": False}


class Retries(NamedTuple):
    """Retries of a stage."""

    most: int = 0
    may_succeed: Callable[[BaseException], bool] = lambda error: False
    """True if another attempt may succeed after the error."""

    delays: tuple[int, ...] = ()
    """Seconds before each retry; empty for immediate retries."""

    @property
    def options(self) -> dict[str, Any]:
        """Options of a Prefect task."""

        def is_retried(task: Any, task_run: Any, state: State) -> bool:
            error = _outcome(state)
            if not isinstance(error, BaseException) or not self.may_succeed(error):
                return False
            if task_run.run_count > self.most:
                return False
            log.warning("retrying the stage %s: %s", task.name, str(error).splitlines()[0])
            return True

        # Prefect logs a traceback when its own limit is reached, so its limit is one higher
        options = {"retries": self.most + 1, "retry_condition_fn": is_retried}
        return options | ({"retry_delay_seconds": list(self.delays)} if self.delays else {})


_FROM_THE_HUB = Retries(3, is_transient, (5, 30, 120))
"""Retries of stages that read from the Hub, in addition to the retries of single requests."""

_CHECK = Retries(2, was_killed)
"""Retries of checks. A check that has failed is not retried, because it would fail again."""


def _outcome(state: State) -> Any:
    """Return the result or the exception of a task."""
    return state.result(raise_on_failure=False)


def _task_name() -> str:
    """Return the name of the task as the name of its run; Prefect would append random letters."""
    return str(runtime.task_run.task_name)


def as_task(
    name: str,
    stage: Callable[P, R],
    retries: Retries = Retries(),  # noqa: B008, it is frozen
) -> Callable[P, R]:
    """Wrap a stage as a Prefect task; its state is Reused if nothing had to be done.

    Errors and stops become states of the task, and are raised again for the caller.
    """

    @wraps(stage)
    def run(*args: P.args, **kwargs: P.kwargs) -> State:
        try:
            result = stage(*args, **kwargs)
        except STOPS as stop:  # otherwise Prefect would show a crash
            return Cancelled(message="Stopped.", data=stop)
        except Exception as error:
            return Failed(message=paragraph(error), data=error)
        reused = getattr(result, "reused", False)
        return Completed(name="Reused" if reused else None, data=result)

    options = _UNCACHED | retries.options
    decorated = task(name=name, task_run_name=_task_name, **options)(run)

    @wraps(stage)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        outcome = _outcome(decorated(*args, **kwargs))
        if isinstance(outcome, BaseException):
            raise outcome
        result: R = outcome
        return result

    return call


def part_task(build: BuildPart) -> BuildPart:
    """Wrap the function that builds a part as a Prefect task, which is named after the part."""
    options = _UNCACHED | _FROM_THE_HUB.options
    decorated = task(name="build part", task_run_name="build {job.path.name}", **options)
    return decorated(build)


STAGES = Stages(
    plan=as_task("plan", pipeline.plan),
    fetch_tokenizer=as_task("fetch tokenizer", pipeline.fetch_tokenizer, _FROM_THE_HUB),
    build_shards=as_task("build shards", pipeline.build_shards),  # each part has its own retries
    build_model=as_task("build model", pipeline.build_model),
    check_before=as_task("pre-flight", pipeline.check_before, _CHECK),
    train=as_task(
        "train",
        pipeline.train,
        Retries(recovery.MOST_RETRIES, was_remedied),
    ),
    check_overfit=as_task("overfit check", pipeline.check_overfit, _CHECK),
    write_report=as_task("report", pipeline.write_report),
    evaluate=as_task("evaluate", pipeline.evaluate),
    register=as_task("register", pipeline.register),
    prove=as_task("prove resume", pipeline.prove),
    measure_stages=as_task("measure stages", pipeline.measure_stages),
    compare=as_task("compare", pipeline.compare),
)
