"""Files that runs write into their folders up to some step, created without training."""

from collections.abc import Sequence

from logged import step_record, validation_record

from zeroflow.data.shards import ShardSet
from zeroflow.data.tokenizer import Tokenizer
from zeroflow.model.sizes import with_vocabulary
from zeroflow.report.records import RunReport
from zeroflow.settings.job import training_job
from zeroflow.settings.run_config import RunConfig
from zeroflow.settings.settle import settle
from zeroflow.training.events import EVENTS, Event
from zeroflow.training.goodput import BOOKINGS, Booking
from zeroflow.training.job import TrainingJob
from zeroflow.training.metrics import METRICS


def begun(run: RunConfig, shards: ShardSet, tokenizer: Tokenizer) -> TrainingJob:
    """The job of a run that is about to be trained."""
    settlement = settle(run)
    model = with_vocabulary(settlement.run.model.shape, tokenizer.vocab_size)
    job = training_job(settlement, model, shards, tokenizer, tags={})
    job.write(job.folder.job)
    return job


def trained(job: TrainingJob, losses: Sequence[float], *events: Event) -> None:
    """Leave a validation for each of `losses`, one every step, with other `events` after them."""
    tokens = job.training.workload.batch_tokens
    for step, loss in enumerate(losses):
        if step:
            METRICS.append(job.folder.metrics, step_record(step, loss, tokens=step * tokens))
        METRICS.append(job.folder.metrics, validation_record(step, loss, tokens=step * tokens))
        seconds = {"forward_backward": 2.0} if step > 1 else {}
        booking = Booking(step=step, time=float(step), ended=False, seconds=seconds)
        BOOKINGS.append(job.folder.goodput, booking)
    for event in events:
        EVENTS.append(job.folder.events, event)


def completed(job: TrainingJob, losses: Sequence[float], *, passed: bool = True) -> None:
    """Leave what a run leaves that was trained and checked; `losses` as in `trained`."""
    trained(job, losses)
    work, steps = job.training.workload, job.training.steps
    RunReport(
        device=work.device_name,
        precision=work.precision,
        status="completed" if passed else "failed",
        run=job.folder.name,
        size="custom",
        parameters=job.model.parameters,
        steps=steps,
        tokens=steps * work.batch_tokens,
        train_loss=losses[-1],
        first_val_loss=losses[0],
        val_loss=losses[-1],
        val_bpb=None,
        entropy=None,
        overfit={"passed": passed, "loss": 0.1, "steps": 1},
        tokens_per_second=None,
        mfu=None,
        peak_memory_bytes=2**20,
        resume="",
        data={
            "mode": "synthetic",
            "name": "synthetic",
            "revision": None,
            "synthetic_fallback": False,
            "documents": 1,
            "train_rows": 1,
            "epochs": 1.0,
            "path": job.shards.path,
        },
        tokenizer={"name": "t", "revision": None, "vocab_size": 300, "fingerprint": "t"},
        checkpoint=job.folder.checkpoints / "step",
        sample="",
        time={
            "wall_seconds": 1.0,
            "training_seconds": 1.0,
            "goodput": 1.0,
            "seconds": {},
            "shares": {},
            "restarts": 0,
            "steps_again": 0,
        },
    ).write(job.folder.report)
