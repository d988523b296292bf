"""Proof that resume is exact, seen in Prefect: `python flows/prove_resume.py --kills 5`."""

import logging
import sys
from pathlib import Path

from prefect import flow, task
from pretrain import UNCACHED, build_model, build_shards, fetch_tokenizer, make_plan

from zeroflow import cli, orchestration, prefect_server, proof, report, settling
from zeroflow.checks.resume import ProofConfig
from zeroflow.data.shards import ShardSet
from zeroflow.data.tokenizer import TokenizerFiles
from zeroflow.proof import ProofRun
from zeroflow.training import job as jobs
from zeroflow.training.job import TrainingJob

log = logging.getLogger("zeroflow")


@task(name="prove resume", **UNCACHED)
def prove(job: TrainingJob, config: ProofConfig) -> Path:
    found, page = proof.demonstrate(job, config)
    orchestration.publish(report.with_pictures(page), "proof", job.run_dir.name)
    return proof.passed(found, page)


@flow(name="prove-resume", persist_result=False)
def prove_resume(asked: ProofRun = ProofRun()) -> Path:  # noqa: B008, it is frozen
    """Train undisturbed and killed, and compare every bit.

    Returns:
        the path of proof.md
    """
    with orchestration.logs_delivered(), jobs.ownership() as own:
        settled = make_plan(proof.settings(asked.run), own)
        run = settled.run
        tokens: TokenizerFiles = fetch_tokenizer(run).result()
        rows: ShardSet = build_shards(run, tokens).result()
        model = build_model(run.model.shape, tokens.vocab_size, run.run_dir)
        job = settling.training_job(settled, model, rows, tokens, tags=orchestration.tags())
        return prove(job, asked.proof)


def in_prefect(asked: ProofRun) -> Path:
    with prefect_server.server() as address:
        log.info("Prefect UI: %s", address)
        return prove_resume(asked)


if __name__ == "__main__":
    orchestration.silence_console()
    raise SystemExit(cli.main(["prove-resume", *sys.argv[1:]], prove=in_prefect))
