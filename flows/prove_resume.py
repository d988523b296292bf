"""Proof that resume is exact, seen in Prefect: `python flows/prove_resume.py --kills 5`."""

import logging
import sys
from pathlib import Path

from prefect import flow, task
from pretrain import UNCACHED, build_model, build_shards, fetch_tokenizer, make_plan

from zeroflow import pipeline
from zeroflow.checks.resume import ProofConfig
from zeroflow.cli import commands
from zeroflow.data.shards import ShardSet
from zeroflow.data.tokenizer import Tokenizer
from zeroflow.orchestration import pages, server
from zeroflow.orchestration.flow_runs import logs_delivered, silence_console, tags
from zeroflow.report.pages import with_pictures
from zeroflow.settings.job import training_job
from zeroflow.settings.proof import ProofRun, settings
from zeroflow.training.job import TrainingJob
from zeroflow.training.launch import ownership

log = logging.getLogger("zeroflow")


@task(name="prove resume", **UNCACHED)
def prove(job: TrainingJob, config: ProofConfig) -> Path:
    found, page = pipeline.demonstrate(job, config)
    pages.publish(with_pictures(page), "proof", job.folder.name)
    return pipeline.passed(found, page)


@flow(name="prove-resume", persist_result=False)
def prove_resume(asked: ProofRun = ProofRun()) -> Path:  # noqa: B008, it is frozen
    """Train undisturbed and killed, and compare every bit.

    Returns:
        the path of proof.md
    """
    with logs_delivered(), ownership() as acquire:
        settled = make_plan(settings(asked.run), acquire)
        run = settled.run
        tokenizer: Tokenizer = fetch_tokenizer(run).result()
        shards: ShardSet = build_shards(run, tokenizer).result()
        model = build_model(run.model.shape, tokenizer.vocab_size, run.folder)
        job = training_job(settled, model, shards, tokenizer, tags=tags())
        return prove(job, asked.proof)


def in_prefect(asked: ProofRun) -> Path:
    with server.server() as address:
        log.info("Prefect UI: %s", address)
        return prove_resume(asked)


if __name__ == "__main__":
    silence_console()
    raise SystemExit(commands.main(["prove-resume", *sys.argv[1:]], prove=in_prefect))
