"""Training in ranks, with logging to the trackers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from zeroflow.tracking import others, tracker
from zeroflow.tracking.delivery import Delivery
from zeroflow.training import checkpoint, hosts
from zeroflow.training.events import Event, Failed
from zeroflow.training.failures import TrainingFailed
from zeroflow.training.job import TrainingJob, TrainResult, finished
from zeroflow.training.launch import launch
from zeroflow.training.metrics import follow_points
from zeroflow.training.pulse import Pulse


def train(
    job: TrainingJob,
    on_event: Callable[[Event | Pulse], None] = lambda event: None,
    *,
    launcher: hosts.Launcher = hosts.by_hand,
    on_restart: Callable[[TrainingFailed], None] = lambda failure: None,
) -> TrainResult:
    """Train the job in its own ranks from its newest checkpoint, and log to the trackers.

    Args:
        on_event: called in this process with every new event and pulse.
        launcher: brings the machines, if there are several.
        on_restart: called with every failure of ranks on several machines after which they are
            started again; may raise it.

    Raises:
        CheckpointError: the run's checkpoints have another model or tokenizer.
        TrainingFailed: a rank failed; the message has its reason or its last output.
        TrainingStopped: training was stopped from outside after writing a checkpoint.
    """
    # Checked before the run's job is replaced, so that a refusal leaves the run as it was
    checkpoint.require_resumable(
        job.folder.checkpoints, job.model, tokenizer=job.tokenizer.fingerprint
    )
    job.write(job.folder.job)
    with _tracked(job) as begin:

        def follow(event: Event | Pulse) -> None:
            # On several machines, ranks may have started before they are followed
            if not isinstance(event, Failed | Pulse):
                begin()
            on_event(event)

        workload = job.training.workload
        if workload.nodes > 1:
            gang = hosts.Gang(
                "zeroflow.training",
                job.folder.job,
                nodes=workload.nodes,
                min_nodes=job.min_nodes or workload.nodes,
                ranks=workload.ranks,
                device=workload.device,
            )
            hosts.follow(gang, launcher, follow, on_restart, hang_seconds=job.hang_seconds)
        else:
            launch(
                "zeroflow.training",
                job.folder.job,
                follow,
                ranks=workload.ranks,
                hang_seconds=job.hang_seconds,
                compile_cache=job.compile_cache,
            )
    if (result := finished(job)) is None:
        raise TrainingFailed(f"training ended without a result in {job.folder.training}")
    return result


@contextmanager
def _tracked(job: TrainingJob) -> Iterator[Callable[[], None]]:
    """Yield a function that starts logging to the trackers until the block ends.

    Call it when the ranks have started: at their start, they drop the lines of metrics.jsonl whose
    steps will be trained again.
    """
    deliveries: list[Delivery] = []
    status = "KILLED"

    def begin() -> None:
        if deliveries:
            return
        folder, look = job.folder, partial(follow_points, job.folder.metrics)
        files = (folder.settings, folder.lengths_plot, folder.loss_plot)
        deliveries.append(tracker.follow(job.tracking, folder, look, files))
        deliveries.extend(others.follow(job.tracking, folder, look))

    try:
        yield begin
        status = "FINISHED"
    except TrainingFailed:
        status = "FAILED"
        raise
    finally:
        for delivery in deliveries:
            delivery.close(status)
