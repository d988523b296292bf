"""Stages after the training: reports, evaluation, registration and comparisons."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from zeroflow.checks import resume
from zeroflow.checks.overfit import OverfitResult
from zeroflow.checks.preflight import PreflightResult
from zeroflow.checks.resume import Proof, ProofConfig, ResumeInexact
from zeroflow.inference import evaluation
from zeroflow.inference.evaluate import EvaluationJob, evaluate_apart, is_known
from zeroflow.inference.evaluation import Evaluation, EvaluationConfig
from zeroflow.lab import measure
from zeroflow.lab.study import LabConfig, study
from zeroflow.report import evaluation_page, proof, registration, run_report, zero_lab
from zeroflow.report import sweep as sweeps
from zeroflow.report.outcome import Status
from zeroflow.report.pages import Page, never_fatal
from zeroflow.report.progress import CheckProgress, TrainingProgress
from zeroflow.report.registration import Registrations
from zeroflow.report.run_report import Finished
from zeroflow.settings.settled import Settled
from zeroflow.settings.sweep import SweepConfig
from zeroflow.stages.prepare import Prepared
from zeroflow.stages.view import LOG_ONLY, View
from zeroflow.tracking.models import RegistrationFailed
from zeroflow.training.job import TrainingJob, TrainResult

log = logging.getLogger(__name__)


class StagesDisagree(RuntimeError):
    """The losses of a stage of ZeRO differ from those of one rank by more than rounding."""


def write_report(
    prepared: Prepared,
    checked: PreflightResult | None,
    trained: TrainResult,
    learned: OverfitResult,
    view: View = LOG_ONLY,
) -> Path:
    """Write the report of a run, and show it.

    Returns:
        the path of report.json
    """
    settlement, _, shards, job = prepared
    return run_report.write(
        Finished(settlement.run, job, shards, checked, trained, learned),
        lambda page: view.page(page, "report"),
    )


class Evaluated(NamedTuple):
    """The scores of a run's last checkpoint."""

    found: Evaluation
    reused: bool
    """True if the checkpoint had been scored before."""


def evaluate(run: Settled, view: View = LOG_ONLY) -> Evaluated:
    """Score the trained model of a run as its settings ask, and show the scores.

    Raises:
        EvaluationFailed, ValueError, hub.HubError: the model could not be scored.
    """
    step = run.training.max_steps
    config = evaluation_config(run)
    job = EvaluationJob(cache=run.cache_dir, run=run.run_name, which=step, config=config)
    if not (reused := is_known(job, step)):
        log.info("evaluating the model of step %d", step)
        evaluate_apart(job)
    found = evaluation.read(run.folder).of(step)
    assert found is not None, "it was just recorded"
    run_report.add_evaluation(run.folder, found)
    with never_fatal("evaluation"):
        view.page(Page(tuple(evaluation_page.tables(found))), "evaluation")
    return Evaluated(found, reused)


def evaluation_config(run: Settled) -> EvaluationConfig:
    """Return the settings of the evaluation that a run asks for."""
    choice = run.evaluation
    return EvaluationConfig(
        data_path=choice.evaluate_path,
        tasks=choice.evaluate_tasks,
        task_path=choice.evaluate_task_path,
        core_path=choice.evaluate_core_path,
        # A machine without a GPU may evaluate what another has trained
        device="cpu" if run.device == "cpu" else "auto",
    )


def register(run: Settled) -> Registrations:
    """Register the models of a trained run in MLflow under the name `--register`.

    A failure of MLflow is a warning, because the run is complete.

    Raises:
        ValueError: a model cannot be exported.
    """
    assert run.register_ is not None, "called only if it is asked for"
    try:
        found = registration.register_run(run.folder, run.register_)
    except RegistrationFailed as error:
        log.warning("%s", error)
        return Registrations(())
    for version in found.versions:
        log.info("%s", version)
    return found


def prove(job: TrainingJob, config: ProofConfig, view: View = LOG_ONLY) -> Path:
    """Train `job` undisturbed and with kills, compare every bit, and write and show the result.

    Returns:
        the path of proof.md

    Raises:
        ResumeInexact: the two runs differ, and the page shows where; or training was not killed.
    """
    with TrainingProgress() as progress:
        found: Proof = resume.prove(job, config, progress)
    page = proof.write(job, found)
    with never_fatal("proof"):
        view.page(page, "proof")
    file = job.folder.proof_page
    if not found.passed:
        finding = "resume is not exact here" if found.difference else "resume was not tested"
        raise ResumeInexact(f"{finding}: {found.reason}\nreport: {file}")
    return file


def measure_stages(job: TrainingJob, config: LabConfig, view: View = LOG_ONLY) -> Path:
    """Measure the stages of ZeRO on the ranks of `job`, and write and show the results.

    Returns:
        the path of zero_lab.md

    Raises:
        StagesDisagree: the losses of a stage differ from those of one rank by more than rounding.
    """
    with CheckProgress(measure.PHASE, view.progress(measure.PHASE)) as shown:
        found = study(job, config, shown)
    page = zero_lab.write(job, found)
    with never_fatal("ZeRO laboratory"):
        view.page(page, "zero-lab")
    file = job.folder.zero_lab_page
    if not found.lab.agrees:
        raise StagesDisagree(f"the losses of the stages differ by more than rounding: see {file}")
    return file


def compare(sweep: SweepConfig, ended: Mapping[str, Status], view: View = LOG_ONLY) -> Path:
    """Write and show the comparison of a sweep's runs.

    Args:
        ended: status of each run of this command that did not complete.

    Returns:
        the path of comparison.md
    """
    page = sweeps.compare(sweep, ended)
    with never_fatal("comparison"):
        view.page(page, "comparison")
    return sweep.folder.comparison_page
