"""Stages of the pipeline as Prefect tasks, with their names, states and retries."""

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from prefect import runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, State

from zeroflow import pipeline
from zeroflow.data import parts
from zeroflow.data.hub import HubError
from zeroflow.pipeline import Stages
from zeroflow.training import recovery
from zeroflow.training.failures import TrainingFailed

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


def is_transient(task: Any, task_run: Any, state: State) -> bool:
    """True if the hub was unreachable or busy, so that another attempt may succeed."""
    error = _error(state)
    return isinstance(error, HubError) and error.transient


def was_remedied(task: Any, task_run: Any, state: State) -> bool:
    """True if something changed after a failed training, so that a retry may succeed."""
    error = _error(state)
    return isinstance(error, TrainingFailed) and error.will_retry


def was_killed(task: Any, task_run: Any, state: State) -> bool:
    """True if the process of a check was killed, which says nothing about the run."""
    error = _error(state)
    if isinstance(error, TrainingFailed) and error.reason == "killed":
        log.warning("retrying %s: %s", task.name, str(error).splitlines()[0])
        return True
    return False


def _error(state: State) -> BaseException | None:
    try:
        state.result()
    except BaseException as error:
        return error
    return None


# A stage finds its own finished work on disk. Prefect's cache would miss a change inside zeroflow,
# and would return the path of a folder that has since been deleted.
_UNCACHED: dict[str, Any] = {"cache_policy": NO_CACHE, "persist_result": False}
_FROM_THE_HUB: dict[str, Any] = {
    "retries": 3,
    "retry_delay_seconds": [5, 30, 120],
    "retry_condition_fn": is_transient,
}
_CHECK: dict[str, Any] = {"retries": 2, "retry_condition_fn": was_killed}


def _task_name() -> str:
    """Name of the task, used for its run as well; Prefect would append random digits."""
    return str(runtime.task_run.task_name)


def as_task(name: str, stage: Callable[P, R], **retries: Any) -> Callable[P, R]:
    """Wrap a stage as a Prefect task, shown as Reused if nothing had to be done."""

    @wraps(stage)
    def run(*args: P.args, **kwargs: P.kwargs) -> State:
        result = stage(*args, **kwargs)
        reused = getattr(result, "reused", False)
        return Completed(name="Reused" if reused else None, data=result)

    decorated = task(name=name, task_run_name=_task_name, **_UNCACHED, **retries)(run)

    @wraps(stage)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        result: R = decorated(*args, **kwargs).result()
        return result

    return call


build_part = task(
    name="build part", task_run_name="build {job.path.name}", **_UNCACHED, **_FROM_THE_HUB
)(parts.build_part)

STAGES = Stages(
    plan=as_task("plan", pipeline.plan),
    fetch_tokenizer=as_task("fetch tokenizer", pipeline.fetch_tokenizer, **_FROM_THE_HUB),
    build_shards=as_task("build shards", pipeline.build_shards),  # its parts are retried
    build_model=as_task("build model", pipeline.build_model),
    check_before=as_task("pre-flight", pipeline.check_before, **_CHECK),
    train=as_task(
        "train",
        pipeline.train,
        retries=recovery.MOST_RETRIES,
        retry_condition_fn=was_remedied,
    ),
    check_overfit=as_task("overfit check", pipeline.check_overfit, **_CHECK),
    write_report=as_task("report", pipeline.write_report),
    prove=as_task("prove resume", pipeline.prove),
    compare=as_task("compare", pipeline.compare),
)
