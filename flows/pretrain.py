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

from zeroflow import pipeline, records
from zeroflow.checks import overfit, preflight
from zeroflow.checks.overfit import OverfitFailed, OverfitJob, OverfitResult
from zeroflow.checks.preflight import PreflightFailed, PreflightResult
from zeroflow.cli.flow import run_flow
from zeroflow.data import build, tokenizer
from zeroflow.data import parts as data_parts
from zeroflow.data.shards import ShardSet
from zeroflow.data.tokenizer import Tokenizer
from zeroflow.model import build as models
from zeroflow.orchestration import pages, parts, server
from zeroflow.orchestration.flow_runs import leave, logs_delivered, name_flow_run, tags
from zeroflow.orchestration.gpu_slot import gpu_slot
from zeroflow.orchestration.states import completed, is_transient, task_name, was_helped, was_killed
from zeroflow.report import data_page, pictures, run_report
from zeroflow.report.pages import with_pictures
from zeroflow.report.progress import LossWatch, TrainingProgress
from zeroflow.run_folder import RunFolder
from zeroflow.settings.job import training_job
from zeroflow.settings.run_config import RunConfig
from zeroflow.settings.settle import unlike_others
from zeroflow.training import checkpoint, recovery
from zeroflow.training.job import TrainingJob, TrainResult, finished, why_trained
from zeroflow.training.launch import ownership

log = logging.getLogger("zeroflow")

TRAINED = "the run was trained to its last step before"

# A stage finds its own finished work on disk. Prefect's cache would miss a change inside zeroflow,
# and would return the path of a folder that has since been deleted.
UNCACHED: dict[str, Any] = {
    "cache_policy": NO_CACHE,
    "persist_result": False,
    "task_run_name": task_name,
}
FROM_THE_HUB: dict[str, Any] = {
    **UNCACHED,
    "retries": 3,
    "retry_delay_seconds": [5, 30, 120],
    "retry_condition_fn": is_transient,
}
CHECKED_AGAIN: dict[str, Any] = {
    **UNCACHED,
    "retries": 2,
    "retry_condition_fn": was_killed,
}

make_plan = task(name="plan", **UNCACHED)(pipeline.make)
build_model = task(name="build model", **UNCACHED)(models.build_model)
build_part = task(name="build part", **FROM_THE_HUB | {"task_run_name": "build {job.path.name}"})(
    data_parts.build_part
)


@task(name="fetch tokenizer", **FROM_THE_HUB)
def fetch_tokenizer(run: RunConfig) -> State:
    fetched = tokenizer.fetch_tokenizer(run.tokenizer, run.data, run.cache_dir)
    return completed(fetched, reused=fetched.reused)


@task(name="build shards", **UNCACHED)
def build_shards(run: RunConfig, tokenizer: Tokenizer) -> State:
    with parts.part_builders(build_part, run.build) as builders:
        shards = build.build_shards(
            run.shard_config,
            run.data,
            tokenizer,
            run.cache_dir,
            seed=run.seed,
            builders=builders,
            show=pages.ProgressBar("shards", run.folder.name),
        )
    page = data_page.write_data(shards, tokenizer, run.folder)
    pages.publish(with_pictures(page), "data", run.folder.name)
    return completed(shards, reused=shards.reused)


@task(name="pre-flight", **CHECKED_AGAIN)
def check_before(job: TrainingJob, device: str) -> State:
    if before := preflight.known(job, device):
        return completed(before, reused=True)
    if finished(job):
        before = preflight.read(job.folder)
        return completed(before and before.replace(reused=True, why=TRAINED), reused=True)
    result = preflight.check(job, device)
    pages.publish(run_report.preflight_section(result), "preflight", job.folder.name)
    if not result.passed:
        raise PreflightFailed(result)
    return completed(result, reused=False)


@task(
    name="train",
    **UNCACHED,
    retries=recovery.MOST_RETRIES,
    retry_condition_fn=was_helped,
)
def train_model(job: TrainingJob, run: RunConfig) -> State:
    if finished(job):
        checkpoint.latest(job.folder.checkpoints)  # sets a damaged one aside
    if before := finished(job):
        return completed(before.replace(reused=True, why=TRAINED), reused=True)
    why = why_trained(job, partial(unlike_others, run))
    log.info("training has to run: %s", why)
    bar = pages.ProgressBar("training", job.folder.name)
    watch = LossWatch(job, pages.LivePicture("loss", job.folder.name))
    with TrainingProgress(bar) as progress:

        def follow(event: records.Line) -> None:
            progress(event)
            watch(event)

        result = recovery.train(job, follow)
    return completed(result.replace(why=why), reused=False)


@task(name="overfit check", **CHECKED_AGAIN)
def check_overfit(job: OverfitJob) -> State:
    result = overfit.check(job)
    picture = pictures.overfit_curve(
        result.curve, job.folder.overfit_picture, limit=job.limits.overfit_loss
    )
    pages.publish_picture(picture, "overfit", job.folder.name)
    if not result.passed:
        raise OverfitFailed(result)
    return completed(result, reused=result.reused)


@task(name="report", **UNCACHED)
def write_report(*parts: Any) -> Path:
    path = run_report.write(*parts)
    folder = RunFolder(path.parent)
    pages.publish(with_pictures(folder.report_page), "report", folder.name)
    return path


@flow(name=server.FLOW, persist_result=False)
def pretrain(run: RunConfig = RunConfig()) -> Path:  # noqa: B008, it is frozen
    """Raw text to a checked model; a run of the same name goes on where it stopped.

    Returns:
        the path of the run's report.json
    """
    with logs_delivered(), ownership() as acquire:
        return _pretrain(run, acquire)


def _pretrain(asked: RunConfig, acquire: Callable[[Path], None]) -> Path:
    settled = make_plan(asked, acquire)
    run = settled.run
    name_flow_run(asked, run)
    tokenizer: Tokenizer = fetch_tokenizer(run).result()
    shards: ShardSet = build_shards(run, tokenizer).result()
    model = build_model(run.model.shape, tokenizer.vocab_size, run.folder)
    job = training_job(settled, model, shards, tokenizer, tags=tags())
    checked: PreflightResult | None
    with gpu_slot("none" if finished(job) else run.device):
        if run.skip_preflight:
            checked = preflight.read(job.folder)  # of an earlier command
        else:
            checked = check_before(job, settled.device.name).result()
        trained: TrainResult = train_model(job, run).result()
        found = (run, job, shards, settled.device, checked, trained)
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
    leave(run_flow(pretrain))
