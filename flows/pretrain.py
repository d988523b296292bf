"""Raw text to a trained and checked model: `python flows/pretrain.py --size tiny`."""

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("DO_NOT_TRACK", "true")  # read while Prefect is imported
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.states import State

from zeroflow import cli, orchestration, pictures, plan, prefect_server, report, settling
from zeroflow.checks import overfit, preflight
from zeroflow.checks.overfit import OverfitFailed, OverfitJob, OverfitResult
from zeroflow.checks.preflight import PreflightFailed, PreflightResult
from zeroflow.data import parts, shards, tokenizer
from zeroflow.data.shards import ShardSet
from zeroflow.data.tokenizer import TokenizerFiles
from zeroflow.model import build
from zeroflow.progress import LossWatch, TrainingProgress
from zeroflow.run import RunConfig
from zeroflow.training import checkpoint, events, recovery
from zeroflow.training import job as jobs
from zeroflow.training.job import TrainingJob, TrainResult

log = logging.getLogger("zeroflow")

TRAINED = "the run was trained to its last step before"

# A stage finds its own finished work on disk. Prefect's cache would miss a change inside zeroflow,
# and would return the path of a folder that has since been deleted.
UNCACHED: dict[str, Any] = {
    "cache_policy": NO_CACHE,
    "persist_result": False,
    "task_run_name": orchestration.task_name,
}
FROM_THE_HUB: dict[str, Any] = {
    **UNCACHED,
    "retries": 3,
    "retry_delay_seconds": [5, 30, 120],
    "retry_condition_fn": orchestration.may_succeed_later,
}
CHECKED_AGAIN: dict[str, Any] = {
    **UNCACHED,
    "retries": 2,
    "retry_condition_fn": orchestration.was_killed,
}

make_plan = task(name="plan", **UNCACHED)(plan.make)
build_model = task(name="build model", **UNCACHED)(build.build)
build_part = task(name="build part", **FROM_THE_HUB | {"task_run_name": "build {job.path.name}"})(
    parts.build
)


@task(name="fetch tokenizer", **FROM_THE_HUB)
def fetch_tokenizer(run: RunConfig) -> State:
    tokens = tokenizer.fetch(run.tokenizer, run.data, run.cache_dir)
    return orchestration.completed(tokens, reused=tokens.reused)


@task(name="build shards", **UNCACHED)
def build_shards(run: RunConfig, tokens: TokenizerFiles) -> State:
    with orchestration.part_builders(build_part, run.build) as builders:
        built = shards.build(
            run.shard_config,
            run.data,
            tokens,
            run.cache_dir,
            seed=run.seed,
            builders=builders,
            show=orchestration.Progress("shards", run.run_dir.name),
        )
    page = report.write_data(built, tokens, run.run_dir)
    orchestration.publish(report.with_pictures(page), "data", run.run_dir.name)
    return orchestration.completed(built, reused=built.reused)


@task(name="pre-flight", **CHECKED_AGAIN)
def check_before(job: TrainingJob, device: str) -> State:
    if before := preflight.known(job, device):
        return orchestration.completed(before, reused=True)
    if jobs.finished(job):
        before = preflight.read(job.run_dir)
        return orchestration.completed(
            before and before.replace(reused=True, why=TRAINED), reused=True
        )
    result = preflight.check(job, device)
    orchestration.publish(report.preflight_section(result), "preflight", job.run_dir.name)
    if not result.passed:
        raise PreflightFailed(result)
    return orchestration.completed(result, reused=False)


@task(
    name="train",
    **UNCACHED,
    retries=recovery.MOST_RETRIES,
    retry_condition_fn=orchestration.was_helped,
)
def train_model(job: TrainingJob, run: RunConfig) -> State:
    if jobs.finished(job):
        checkpoint.latest(job.checkpoints)  # sets a damaged one aside
    if before := jobs.finished(job):
        return orchestration.completed(before.replace(reused=True, why=TRAINED), reused=True)
    why = jobs.why_trained(job, partial(settling.unlike_others, run))
    log.info("training has to run: %s", why)
    bar = orchestration.Progress("training", job.run_dir.name)
    watch = LossWatch(job, orchestration.LivePicture("loss", job.run_dir.name))
    with TrainingProgress(bar) as progress:

        def follow(event: events.Line) -> None:
            progress(event)
            watch(event)

        result = recovery.train(job, follow)
    return orchestration.completed(result.replace(why=why), reused=False)


@task(name="overfit check", **CHECKED_AGAIN)
def check_overfit(job: OverfitJob) -> State:
    result = overfit.check(job)
    picture = pictures.overfit_curve(
        result.curve, job.run_dir / report.OVERFIT_CURVE, limit=job.limits.overfit_loss
    )
    orchestration.publish_picture(picture, "overfit", job.run_dir.name)
    if not result.passed:
        raise OverfitFailed(result)
    return orchestration.completed(result, reused=result.reused)


@task(name="report", **UNCACHED)
def write_report(*parts: Any) -> Path:
    path = report.write(*parts)
    page = path.with_name(report.MARKDOWN)
    orchestration.publish(report.with_pictures(page), "report", path.parent.name)
    return path


@flow(name=prefect_server.FLOW, persist_result=False)
def pretrain(run: RunConfig = RunConfig()) -> Path:  # noqa: B008, it is frozen
    """Raw text to a checked model; a run of the same name goes on where it stopped.

    Returns:
        the path of the run's report.json
    """
    with orchestration.logs_delivered(), jobs.ownership() as own:
        return _pretrain(run, own)


def _pretrain(asked: RunConfig, own: Callable[[Path], None]) -> Path:
    settled = make_plan(asked, own)
    run = settled.run
    orchestration.name_flow_run(asked, run)
    tokens: TokenizerFiles = fetch_tokenizer(run).result()
    rows: ShardSet = build_shards(run, tokens).result()
    model = build_model(run.model.shape, tokens.vocab_size, run.run_dir)
    job = settling.training_job(settled, model, rows, tokens, tags=orchestration.tags())
    checked: PreflightResult | None
    with orchestration.gpu_slot("none" if jobs.finished(job) else run.device):
        if run.skip_preflight:
            checked = preflight.read(job.run_dir)  # of an earlier command
        else:
            checked = check_before(job, settled.device.name).result()
        trained: TrainResult = train_model(job, run).result()
        found = (run, job, rows, settled.device, checked, trained)
        try:
            learned: OverfitResult = check_overfit(overfit_job(job, run)).result()
        except OverfitFailed as failure:
            write_report(*found, failure.result)
            raise
    return write_report(*found, learned)


def overfit_job(job: TrainingJob, run: RunConfig) -> OverfitJob:
    return OverfitJob(
        run_dir=job.run_dir,
        model=job.model,
        training=job.training,
        shards=job.shards,
        limits=run.overfit,
        compile_cache=job.compile_cache,
    )


if __name__ == "__main__":
    orchestration.leave(cli.run_flow(pretrain))
