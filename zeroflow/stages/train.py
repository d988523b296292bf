"""The training, and the checks before and after it."""

import logging
from functools import partial

from zeroflow.checks import overfit, preflight
from zeroflow.checks.overfit import OverfitConfig, OverfitFailed, OverfitJob, OverfitResult
from zeroflow.checks.preflight import PreflightFailed, PreflightResult
from zeroflow.launchers import kubernetes, slurm
from zeroflow.launchers.kubernetes import Cluster
from zeroflow.report import plots, run_page
from zeroflow.report.pages import Page, Plot, never_fatal
from zeroflow.report.progress import CheckProgress, LossWatch, SpikeWatch, TrainingProgress
from zeroflow.settings.existing import unlike_others
from zeroflow.settings.settled import Settled
from zeroflow.stages.view import LOG_ONLY, View
from zeroflow.training import recovery
from zeroflow.training.events import Event
from zeroflow.training.hosts import Launcher, by_hand
from zeroflow.training.job import TrainingJob, TrainResult, why_trained
from zeroflow.training.pulse import Pulse

log = logging.getLogger(__name__)


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
