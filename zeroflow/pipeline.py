"""The stages of a run and the chain that calls them: plain functions, independent of Prefect.

A stage finds its own finished work on disk, so calling the pipeline again with the same settings
resumes where it stopped. The caller decides how each stage is called (`Stages`) and where progress
and pages are shown (`View`). In the package's flows, stages are Prefect tasks.
"""

import contextvars
import logging
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from threading import Thread
from typing import NamedTuple

from zeroflow import reuse
from zeroflow.checks import overfit, preflight, resume
from zeroflow.checks.overfit import OverfitConfig, OverfitFailed, OverfitJob, OverfitResult
from zeroflow.checks.preflight import PreflightFailed, PreflightResult
from zeroflow.checks.resume import Proof, ProofConfig, ResumeInexact
from zeroflow.data import build as builds
from zeroflow.data import shared_build, statistics
from zeroflow.data import tokenizer as tokenizers
from zeroflow.data.builders import Builders, BuildPart, in_threads
from zeroflow.data.on_dask import on_dask
from zeroflow.data.parts import build_part
from zeroflow.data.shards import ShardSet
from zeroflow.data.shared_build import Shared
from zeroflow.data.tokenizer import Tokenizer
from zeroflow.device import find_device, known_gpu
from zeroflow.inference import evaluation
from zeroflow.inference.evaluate import (
    EvaluationJob,
    evaluate_apart,
    is_known,
    require_tasks,
)
from zeroflow.inference.evaluation import Evaluation, EvaluationConfig
from zeroflow.lab import measure
from zeroflow.lab.study import LabConfig, study
from zeroflow.launchers import kubernetes, slurm, slurm_array
from zeroflow.launchers.kubernetes import Cluster
from zeroflow.launchers.slurm_jobs import gpu_option
from zeroflow.model import build as models
from zeroflow.model.llama import ModelConfig
from zeroflow.report import (
    data_page,
    evaluation_page,
    plan_page,
    plots,
    proof,
    registration,
    run_page,
    run_report,
    zero_lab,
)
from zeroflow.report import plan as plans
from zeroflow.report import sweep as sweeps
from zeroflow.report.outcome import Status, outcome
from zeroflow.report.pages import Page, Plot, never_fatal
from zeroflow.report.progress import CheckProgress, LossWatch, Show, SpikeWatch, TrainingProgress
from zeroflow.report.registration import Registrations
from zeroflow.report.run_report import Finished
from zeroflow.report.summary import in_one_line
from zeroflow.run_folder import Cache
from zeroflow.settings.alerts import Noticed
from zeroflow.settings.existing import unlike_others
from zeroflow.settings.flags import error_message
from zeroflow.settings.job import training_job
from zeroflow.settings.proof import ProofRun, settings
from zeroflow.settings.run_config import BuildChoice, RunConfig
from zeroflow.settings.settle import look_up, settle
from zeroflow.settings.settled import Settled, Settlement
from zeroflow.settings.sweep import SweepConfig, cells
from zeroflow.settings.zero_lab import ZeroLabRun, lab_run
from zeroflow.tracking.models import RegistrationFailed
from zeroflow.training import checkpoint, initial, recovery
from zeroflow.training.events import Event
from zeroflow.training.failures import TrainingFailed, TrainingStopped
from zeroflow.training.hosts import Launcher, by_hand
from zeroflow.training.job import (
    TrainingJob,
    TrainResult,
    finished,
    trained_tokenizer,
    why_trained,
)
from zeroflow.training.ownership import ownership
from zeroflow.training.processes import KeptRanks, kept_ranks
from zeroflow.training.pulse import Pulse
from zeroflow.units import count

log = logging.getLogger(__name__)


class StagesDisagree(RuntimeError):
    """The losses of a stage of ZeRO differ from those of one rank by more than rounding."""


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


Acquire = Callable[[Path], None]
"""Acquires the directory of a run for this process, or raises `RunIsBusy`."""


class View:
    """Display of progress and pages. Here, pages are files of the run and progress is logged.

    A subclass also shows them elsewhere, see `orchestration.view`.
    """

    def name_run(self, asked: RunConfig, run: Settled) -> None:
        """Called when `asked` has been settled to `run`, which is shown from now on."""

    def name_sweep(self, sweep: SweepConfig) -> None:
        """Called when `sweep` begins, which is shown from now on."""

    def tags(self) -> dict[str, str]:
        """MLflow tags that identify this view."""
        return {}

    def progress(self, subject: str) -> Show:
        """Return a function to call with the fraction done, from 0 to 1, and a line of text."""
        return lambda share, text: None

    def page(self, page: Page, subject: str) -> None:
        """Show a finished page."""

    def live_plot(self, subject: str) -> Callable[[Path], None]:
        """Return a function to call with each new version of a PNG file."""
        return lambda plot: None

    def alert(self, condition: Noticed, message: str) -> None:
        """Called when an alert condition holds."""

    def part_builder(self, build: BuildPart) -> BuildPart:
        """Return `build`, or a function that also shows each part that it builds."""
        return build

    def gpu_slot(self) -> AbstractContextManager[None]:
        """Return a context to stay in while the run uses GPUs."""
        return nullcontext()


LOG_ONLY = View()


def plan(asked: RunConfig, acquire: Acquire = lambda run_dir: None) -> Settlement:
    """Settle `asked` and log the plan of the run, before anything is built.

    The plan is saved in the run's directory. The log has the time that remains, at the speed that
    is expected now.

    Raises:
        ValueError, hub.HubError: as `settle` does.
    """
    settlement = settle(asked, acquire)
    now = plans.predict(settlement)
    plans.save(now, settlement.run.folder)
    for line in plan_page.log_lines(settlement, now):
        log.info("%s", line)
    return settlement


def fetch_tokenizer(run: Settled) -> Tokenizer:
    """Ensure that the run's tokenizer is in the cache; a trained run keeps its copy.

    Raises:
        ValueError, hub.HubError: there is no such tokenizer.
    """
    trained = trained_tokenizer(run.folder)
    if trained and (copy := tokenizers.own_copy(trained)):
        if changed := tokenizers.changed_since(run.tokenizer, copy):
            name = run.tokenizer.tokenizer_name
            log.warning("%s has changed (%s): the run uses its own copy", name, changed)
        log.info("tokenizer reused: %s", copy.path)
        return copy
    return tokenizers.fetch_tokenizer(run.tokenizer, run.data, run.cache_dir)


def build_shards(run: Settled, tokenizer: Tokenizer, view: View = LOG_ONLY) -> ShardSet:
    """Build the shards that the run needs."""
    with part_builders(run.build, view) as builders:
        return builds.build_shards(
            run.shard_config,
            run.data,
            tokenizer,
            run.cache_dir,
            seed=run.seed,
            builders=builders,
            show=view.progress("shards"),
        )


def build_together(asked: RunConfig, *, gpu: str | None = None) -> Shared:
    """Build the shards of a run together with other processes that use the same settings.

    The run itself is not recorded.

    Args:
        gpu: name of the GPU that the run will use; None for the device of this machine.

    Raises:
        ValueError, hub.HubError: the settings or the input cannot be used.
    """
    run = look_up(asked, known_gpu(gpu) if gpu else None).run
    tokenizer = tokenizers.fetch_tokenizer(run.tokenizer, run.data, run.cache_dir)
    planner = builds.planned(run.shard_config, run.data, tokenizer, run.cache_dir, seed=run.seed)
    with part_builders(run.build, LOG_ONLY) as builders:
        return shared_build.build_together(planner, run.shard_config, builders)


@contextmanager
def part_builders(choice: BuildChoice, view: View) -> Iterator[Builders]:
    """Yield threads that build parts, or that wait while Dask workers build them."""
    with ExitStack() as stack:
        build: BuildPart = build_part
        if choice.data_runner == "dask":
            build = stack.enter_context(on_dask(choice.data_workers, choice.dask_address))
        yield stack.enter_context(in_threads(choice.data_workers, view.part_builder(build)))


def build_model(run: Settled, tokenizer: Tokenizer) -> ModelConfig:
    """Return the configuration of the network.

    The weights that the run starts from are copied first, unless it has a checkpoint.

    Raises:
        ValueError, hub.HubError: the model of --init-from cannot be used.
    """
    config = run.network(tokenizer.vocab_size)
    source = run.model.init_from
    if run.initial and source and not checkpoint.newest_step(run.folder.checkpoints):
        initial.fetch(source, run.initial, run.cache_dir)
    return models.build_model(config, run.folder)


def check_before(
    job: TrainingJob, trained: TrainResult | None, view: View = LOG_ONLY
) -> PreflightResult | None:
    """Run the pre-flight checks of `job`, unless the same checks passed before.

    Args:
        trained: result of the job if it is finished; then no check is run.

    Returns:
        None if the job is finished and was never checked.

    Raises:
        PreflightFailed: a check failed.
    """
    result = preflight.check(job, trained=trained is not None)
    if result is None or result.reused:
        return result
    with never_fatal("page of the pre-flight"):
        view.page(Page(run_page.preflight_section(result)), "preflight")
    if not result.passed:
        raise PreflightFailed(result)
    return result


def train(
    job: TrainingJob, run: Settled, trained: TrainResult | None, view: View = LOG_ONLY
) -> TrainResult:
    """Train `job` from its newest checkpoint to its last step, and show its progress.

    Args:
        trained: result of the job if it is finished; it is returned unchanged.

    Raises:
        TrainingFailed: `will_retry` is True if another call may succeed.
        TrainingStopped: training was stopped from outside after writing a checkpoint.
    """
    if trained:
        return trained
    band = LossWatch(job, view.live_plot("loss"), partial(view.alert, "out-of-band"))
    spikes = SpikeWatch(partial(view.alert, "spike"))
    why = why_trained(job, partial(unlike_others, run))
    log.info("training the model: %s", why)
    with TrainingProgress(view.progress("training")) as progress:

        def follow(event: Event | Pulse) -> None:
            progress(event)
            band(event)
            spikes(event)

        return recovery.train(job, follow, launcher(run)).replace(why=why)


def launcher(run: Settled) -> Launcher:
    """Return the launcher of a run on several machines."""
    hosts = run.hosts
    match hosts.launcher:
        case "slurm":
            return slurm.launcher(hosts.sbatch_options)
        case "kubernetes":
            assert hosts.image and hosts.volume_claim, "checked by the settings"
            return kubernetes.launcher(Cluster(hosts.namespace, hosts.image, hosts.volume_claim))
    return by_hand


def check_overfit(job: TrainingJob, limits: OverfitConfig, view: View = LOG_ONLY) -> OverfitResult:
    """Run the overfit check with the settings of `job`, unless the same check passed before.

    Raises:
        OverfitFailed: the model could not memorise one batch.
    """
    check = OverfitJob(
        run_dir=job.run_dir,
        training=job.training.on_one_machine,
        shards=job.shards,
        limits=limits,
        compile_cache=job.compile_cache,
    )
    with CheckProgress("overfit check", view.progress("overfit check")) as shown:
        result = overfit.check(check, shown)
    with never_fatal("plot of the overfit check"):
        drawn, least = job.folder.overfit_plot, result.least_loss
        limit = limits.overfit_loss + least
        plots.overfit_curve(result.curve, drawn, limit=limit, least=least)
        view.page(Page((Plot(drawn, "overfit"),)), "overfit")
    if not result.passed:
        raise OverfitFailed(result)
    return result


class Prepared(NamedTuple):
    """A run that is ready for training."""

    settlement: Settlement
    tokenizer: Tokenizer
    shards: ShardSet
    job: TrainingJob


def show_data(prepared: Prepared, view: View = LOG_ONLY) -> None:
    """Write and show the page about the data of a run."""
    settlement, tokenizer, shards, _ = prepared
    with never_fatal("page of the data"):
        gathered = statistics.gather(shards, tokenizer)
        page = data_page.write_data(shards, gathered, tokenizer, settlement.run.folder)
        view.page(page, "data")


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
    """True if it had been scored before."""


def evaluate(run: Settled, view: View = LOG_ONLY) -> Evaluated:
    """Score the trained model of a run as its settings ask, and show the scores.

    Raises:
        EvaluationFailed, ValueError, hub.HubError: the model could not be scored.
    """
    step = run.training.max_steps
    config = _evaluation_config(run)
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


def _evaluation_config(run: Settled) -> EvaluationConfig:
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
        ResumeInexact: the two runs differ; the page shows where.
    """
    with TrainingProgress() as progress:
        found: Proof = resume.prove(job, config, progress)
    page = proof.write(job, found)
    with never_fatal("proof"):
        view.page(page, "proof")
    file = job.folder.proof_page
    if not found.passed:
        raise ResumeInexact(f"resume is not exact here: {found.reason}\nreport: {file}")
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
            find_device(run.device)  # raises if a complete run lost its checkpoint on the way here
            require_tasks(_evaluation_config(run))  # a misspelled name would fail after training
        busy = run.device == "cuda" and (before is None or run.evaluation.is_asked_for)
        # The inner block of ranks ends them before another run gets the GPU
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
        page = stages.compare(asked, ended, view)
    except BaseException:  # also Ctrl-C and a cancellation of the whole sweep
        sweeps.abandon(asked, ended)
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
