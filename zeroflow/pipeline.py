"""The stages of a run, chained: plain functions that know no Prefect."""

import logging
from collections.abc import Callable
from pathlib import Path

from zeroflow import artifacts
from zeroflow.checks import resume
from zeroflow.checks.resume import Proof, ProofConfig, ResumeInexact
from zeroflow.data.build import build_shards
from zeroflow.data.builders import in_threads
from zeroflow.data.tokenizer import fetch_tokenizer
from zeroflow.model.build import build_model
from zeroflow.report.plan import is_same, load, predict
from zeroflow.report.plan_page import log_lines
from zeroflow.report.progress import TrainingProgress
from zeroflow.report.proof import write
from zeroflow.settings.job import training_job
from zeroflow.settings.proof import ProofRun, settings
from zeroflow.settings.run_config import RunConfig
from zeroflow.settings.settle import Settled, settle
from zeroflow.training.job import TrainingJob
from zeroflow.training.launch import ownership

log = logging.getLogger(__name__)


def make(asked: RunConfig, acquire: Callable[[Path], None] = lambda run_dir: None) -> Settled:
    """Settle `asked` and say what the run will be, before anything is built.

    The plan is kept in the run's directory, and stays as it was made for as long as the run is the
    same.

    Args:
        acquire: as for `settle`.

    Raises:
        ValueError, hub.HubError: as `settle` does.
    """
    settled = settle(asked, acquire)
    run = settled.run
    plan = predict(run, settled.device)
    if (before := load(run.folder)) and is_same(before, plan):
        plan = before.replace(free_bytes=plan.free_bytes)
    artifacts.write_json(run.folder.plan, plan.model_dump(mode="json"))
    for line in log_lines(settled, plan):
        log.info("%s", line)
    return settled


def prove(asked: ProofRun) -> Path:
    """From settings to a proof.

    Returns:
        the path of proof.md

    Raises:
        ResumeInexact: the proof failed; its page says how.
    """
    with ownership() as acquire:
        return _prove(asked, acquire)


def _prove(asked: ProofRun, acquire: Callable[[Path], None]) -> Path:
    settled = make(settings(asked.run), acquire)
    run = settled.run
    tokenizer = fetch_tokenizer(run.tokenizer, run.data, run.cache_dir)
    with in_threads(run.build.data_workers) as builders:
        shards = build_shards(
            run.shard_config, run.data, tokenizer, run.cache_dir, seed=run.seed, builders=builders
        )
    model = build_model(run.model.shape, tokenizer.vocab_size, run.folder)
    job = training_job(settled, model, shards, tokenizer, tags={})
    return passed(*demonstrate(job, asked.proof))


def demonstrate(job: TrainingJob, config: ProofConfig) -> tuple[Proof, Path]:
    """Do the proof, and write its page into the job's directory.

    Returns:
        what came out, and the path of proof.md
    """
    with TrainingProgress() as progress:
        proof = resume.prove(job, config, progress)
    return proof, write(job, proof)


def passed(proof: Proof, page: Path) -> Path:
    """`page`, if the proof has passed.

    Raises:
        ResumeInexact: it has not.
    """
    if not proof.passed:
        raise ResumeInexact(f"resume is not exact here: {proof.reason}\nreport: {page}")
    return page
