"""The chain of the stages: plain functions, independent of Prefect.

A stage finds its own finished work on disk, so calling the pipeline again with the same settings
resumes where it stopped. The caller decides how each stage is called (`Stages`) and where progress
and pages are shown (`View`). In the package's flows, stages are Prefect tasks.
"""

import contextvars
import logging
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from threading import Thread
from typing import NamedTuple

from zeroflow import reuse
from zeroflow.checks import preflight
from zeroflow.checks.overfit import OverfitConfig, OverfitFailed, OverfitResult
from zeroflow.checks.preflight import PreflightFailed, PreflightResult
from zeroflow.checks.resume import ProofConfig
from zeroflow.data.shards import ShardSet
from zeroflow.data.tokenizer import Tokenizer
from zeroflow.device import find_device
from zeroflow.inference.evaluate import require_tasks
from zeroflow.lab.study import LabConfig
from zeroflow.launchers import slurm_array
from zeroflow.launchers.slurm_jobs import gpu_option
from zeroflow.model.llama import ModelConfig
from zeroflow.report import sweep as sweeps
from zeroflow.report.outcome import Status, outcome
from zeroflow.report.registration import Registrations
from zeroflow.report.summary import in_one_line
from zeroflow.run_folder import Cache
from zeroflow.settings.flags import error_message
from zeroflow.settings.job import training_job
from zeroflow.settings.proof import ProofRun, settings
from zeroflow.settings.run_config import RunConfig
from zeroflow.settings.settle import Acquire
from zeroflow.settings.settled import Settled, Settlement
from zeroflow.settings.sweep import SweepConfig, cells
from zeroflow.settings.zero_lab import ZeroLabRun, lab_run
from zeroflow.stages.plan import plan
from zeroflow.stages.prepare import Prepared, build_model, build_shards, fetch_tokenizer, show_data
from zeroflow.stages.results import (
    Evaluated,
    compare,
    evaluate,
    evaluation_config,
    measure_stages,
    prove,
    register,
    write_report,
)
from zeroflow.stages.train import check_before, check_overfit, train
from zeroflow.stages.view import LOG_ONLY, View
from zeroflow.training import checkpoint
from zeroflow.training.failures import TrainingFailed, TrainingStopped
from zeroflow.training.job import TrainingJob, TrainResult, finished
from zeroflow.training.ownership import ownership
from zeroflow.training.processes import KeptRanks, kept_ranks
from zeroflow.units import count

log = logging.getLogger(__name__)


class RunCancelled(RuntimeError):
    """A run of a sweep was cancelled; its finished work is kept."""


class SweepFailed(RuntimeError):
    """Some runs of a sweep failed or were stopped early."""

    def __init__(self, message: str, *, may_succeed: bool) -> None:
        """
        Args:
            may_succeed: True if the same command may succeed for one of these runs.
        """
        super().__init__(message)
        self.may_succeed = may_succeed


def may_succeed(error: Exception) -> bool:
    """Return True if the command that ended with `error` may succeed when it is repeated.

    Otherwise it would fail in the same way, and the error says what to change.
    """
    match error:
        case ValueError() | OverfitFailed():
            return False
        case PreflightFailed() | SweepFailed():
            return error.may_succeed
        case TrainingFailed():  # its remedies are exhausted
            return error.reason not in ("out of memory", "diverged")
    return True


@contextmanager
def in_background(work: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Do `work` in a thread while the block runs.

    Yields:
        A function that waits until the work is done.
    """
    # In a copy of this context, from which Prefect knows the flow run
    thread = Thread(target=contextvars.copy_context().run, args=(work,))
    thread.start()
    try:
        yield thread.join
    finally:
        thread.join()


class Stages(NamedTuple):
    """The functions of the stages, plain or decorated."""

    plan: Callable[[RunConfig, Acquire], Settlement] = plan
    fetch_tokenizer: Callable[[Settled], Tokenizer] = fetch_tokenizer
    build_shards: Callable[[Settled, Tokenizer, View], ShardSet] = build_shards
    build_model: Callable[[Settled, Tokenizer], ModelConfig] = build_model
    check_before: Callable[[TrainingJob, TrainResult | None, View], PreflightResult | None] = (
        check_before
    )
    train: Callable[[TrainingJob, Settled, TrainResult | None, View], TrainResult] = train
    check_overfit: Callable[[TrainingJob, OverfitConfig, View], OverfitResult] = check_overfit
    write_report: Callable[
        [Prepared, PreflightResult | None, TrainResult, OverfitResult, View], Path
    ] = write_report
    evaluate: Callable[[Settled, View], Evaluated] = evaluate
    register: Callable[[Settled], Registrations] = register
    prove: Callable[[TrainingJob, ProofConfig, View], Path] = prove
    measure_stages: Callable[[TrainingJob, LabConfig, View], Path] = measure_stages
    compare: Callable[[SweepConfig, Mapping[str, Status], View], Path] = compare


PLAIN = Stages()


def pretrain(asked: RunConfig, stages: Stages = PLAIN, view: View = LOG_ONLY) -> Path:
    """Turn raw text into a checked model; a run of the same name is resumed.

    Returns:
        the path of the run's report.json

    Raises:
        ValueError, hub.HubError: the settings or the input cannot be used.
        RunIsBusy: another process is working on the run.
        PreflightFailed, TrainingFailed, OverfitFailed, EvaluationFailed: the stage failed; finished
            work is kept.
        TrainingStopped: training was stopped from outside after writing a checkpoint.
    """
    with ownership() as acquire, kept_ranks() as ranks:
        start_ranks(asked, ranks)
        prepared = prepare(asked, acquire, stages, view)
        run, job = prepared.settlement.run, prepared.job
        before = _trained_before(job)
        if before is None:
            find_device(run.device)  # raises for a complete run whose checkpoint was lost just now
            require_tasks(evaluation_config(run))  # a misspelled name would fail after training
        busy = run.device == "cuda" and (before is None or run.evaluation.is_asked_for)
        # `kept_ranks` is inside, so that ranks end before another run gets the GPU
        with (
            in_background(partial(show_data, prepared, view)) as data_shown,
            view.gpu_slot() if busy else nullcontext(),
            kept_ranks(),
        ):
            # If the pre-flight is skipped now, an earlier command may still have run it
            skipped = run.skip_preflight
            checked = (
                preflight.read(job.folder) if skipped else stages.check_before(job, before, view)
            )
            if job.training.workload.nodes > 1:
                ranks.end()  # torchrun starts others, which need the memory of the GPUs
            trained = stages.train(job, run, before, view)
            data_shown()
            try:
                learned = stages.check_overfit(job, run.overfit, view)
            except OverfitFailed as failure:
                stages.write_report(prepared, checked, trained, failure.result, view)
                raise
            page = stages.write_report(prepared, checked, trained, learned, view)
            if run.evaluation.is_asked_for:
                ranks.end()  # another process evaluates, and needs the memory of the GPU
                stages.evaluate(run, view)
        if run.register_:
            stages.register(run)
        if before is None:
            view.alert("done", in_one_line(page))
        return page


def start_ranks(asked: RunConfig, ranks: KeptRanks) -> None:
    """Start the ranks of a run ahead of their first job, so that they import its programs.

    Ranks that wait already are used.
    """
    if asked.training.nodes > 1:
        return  # the ranks of several machines are started in another way
    ranks.start_for_run(Cache(asked.cache_dir.resolve()), asked.run_name, asked.training.ranks)


def prove_resume(asked: ProofRun, stages: Stages = PLAIN, view: View = LOG_ONLY) -> Path:
    """Prove that resume is exact: train undisturbed and with kills, and compare every bit.

    Returns:
        the path of proof.md

    Raises:
        ResumeInexact: the two runs differ; the page shows where.
    """
    with ownership() as acquire:
        prepared = prepare(settings(asked.run), acquire, stages, view)
        show_data(prepared, view)
        return stages.prove(prepared.job, asked.proof, view)


def zero_laboratory(asked: ZeroLabRun, stages: Stages = PLAIN, view: View = LOG_ONLY) -> Path:
    """Measure memory, collectives, speed and losses of the stages of ZeRO, and predict them.

    Returns:
        the path of zero_lab.md

    Raises:
        ValueError: the settings cannot be used.
        TrainingFailed: a rank failed.
        StagesDisagree: the losses of a stage differ from those of one rank by more than rounding.
    """
    with ownership() as acquire:
        prepared = prepare(lab_run(asked), acquire, stages, view)
        show_data(prepared, view)
        on_gpus = prepared.settlement.run.device == "cuda"
        with view.gpu_slot() if on_gpus else nullcontext():
            return stages.measure_stages(prepared.job, asked.lab, view)


def sweep(
    asked: SweepConfig,
    run_one: Callable[[RunConfig], object] = pretrain,
    stages: Stages = PLAIN,
    view: View = LOG_ONLY,
) -> Path:
    """Train every combination of the varied settings, one after the other, and compare the runs.

    A run that fails or is cancelled does not stop the others; repeating the call resumes it.

    Returns:
        the path of comparison.md

    Raises:
        ValueError: a run of the sweep was already trained with other settings.
        SweepFailed: some runs failed or were stopped; the comparison has the steps that they did.
    """
    view.name_sweep(asked)
    sweeps.require_as_started(asked)
    sweeps.open_group(asked)
    ended: dict[str, Status] = {}
    errors: list[Exception] = []
    try:
        if asked.in_array:
            ended |= _run_in_array(asked)
        else:
            for cell in cells(asked):
                try:
                    run_one(cell)
                except Exception as error:  # the sweep continues with the next run
                    ended[str(cell.run_name)] = _ended(cell, error)
                    errors.append(error)
                except BaseException:  # the whole sweep is stopped
                    ended[str(cell.run_name)] = "cancelled"
                    raise
        page = stages.compare(asked, ended, view)
    except BaseException:  # also Ctrl-C and a cancellation of the whole sweep
        sweeps.abandon(asked, ended, lambda page: view.page(page, "comparison"))
        raise
    # The errors of an array are in the logs of its runs, and some may not come again
    worth_a_retry = asked.in_array or any(map(may_succeed, errors))
    _require_no_failure(ended, page, may_succeed=worth_a_retry)
    view.alert("done", f"comparison of its runs: {page}")
    return page


def _run_in_array(asked: SweepConfig) -> dict[str, Status]:
    """Execute the unfinished runs of a sweep as tasks of a job array of Slurm.

    Returns:
        status of each run that did not complete
    """
    folder = asked.folder.array
    slurm_array.finish_earlier(folder)
    left = [cell for cell in cells(asked) if not sweeps.finished(cell)]
    if not left:
        return {}
    options = shlex.split(asked.run.hosts.sbatch_options)
    if asked.run.device != "cpu":
        options.insert(0, gpu_option(asked.run.training.ranks))
    settings = {
        str(cell.run_name): cell.anywhere.model_dump(mode="json", exclude_unset=True)
        for cell in left
    }
    slurm_array.run_all(folder, settings, options)
    ended: dict[str, Status] = {}
    for name in (str(cell.run_name) for cell in left if not sweeps.finished(cell)):
        found = outcome(asked.run.cache_dir, name)
        ended[name] = "stopped" if found and found.status == "stopped" else "failed"
        log.error("run %s %s: see %s", name, ended[name], folder.log(name))
    return ended


def _ended(cell: RunConfig, error: Exception) -> Status:
    """Log why a run of a sweep did not complete, and return its status."""
    if isinstance(error, RunCancelled):
        log.warning("run %s was cancelled; the same command resumes it", cell.run_name)
        return "cancelled"
    log.error("run %s failed: %s", cell.run_name, error_message(error))
    for note in getattr(error, "__notes__", ()):
        log.error("%s", note)
    return "stopped" if isinstance(error, TrainingStopped) else "failed"


def _require_no_failure(ended: Mapping[str, Status], page: Path, *, may_succeed: bool) -> None:
    found = []
    for status, words in (("failed", "failed"), ("stopped", "stopped early")):
        if names := [name for name, how in ended.items() if how == status]:
            found.append(f"{count(len(names), 'run')} {words}: {', '.join(names)}")
    if found:
        raise SweepFailed(f"{'; '.join(found)}; see {page}", may_succeed=may_succeed)


def prepare(asked: RunConfig, acquire: Acquire, stages: Stages, view: View) -> Prepared:
    """Run the stages before training: plan, tokenizer, shards and model."""
    settlement = stages.plan(asked, acquire)
    run = settlement.run
    view.name_run(asked, run)
    tokenizer = stages.fetch_tokenizer(run)
    shards = stages.build_shards(run, tokenizer, view)
    model = stages.build_model(run, tokenizer)
    job = training_job(settlement, model, shards, tokenizer, tags=view.tags())
    return Prepared(settlement, tokenizer, shards, job)


def _trained_before(job: TrainingJob) -> TrainResult | None:
    """Return the result of a finished job if its last checkpoint verifies."""
    if finished(job):
        checkpoint.latest(job.folder.checkpoints)  # sets damaged checkpoints aside
    result = finished(job)
    return result and result.replace(reused=True, why=reuse.TRAINED)
