"""The program of a rank that trains: `-m zeroflow.training JOB.json`."""

import logging
import os
import time

from zeroflow.training import checkpoint, goodput, worker
from zeroflow.training.events import Done, Stopped
from zeroflow.training.goodput import Clock
from zeroflow.training.job import TrainingJob
from zeroflow.training.launch import LAUNCHED
from zeroflow.training.session import Session
from zeroflow.training.worker import Stop

log = logging.getLogger("zeroflow.training")


def work(job: TrainingJob, stop: Stop) -> None:
    """Train the job from its newest checkpoint to its end, or until asked to stop."""
    workload = job.training.workload
    if workload.deterministic:
        worker.make_deterministic()
    clock = Clock(float(os.environ.get(LAUNCHED, time.time())), device=workload.device)
    session = Session(job, clock)
    try:
        ended = session.run(stop)
    finally:
        session.saver.wait()  # what is being written is what the next process goes on from
    account = session.ledger.book(session.state.step, ended=True)
    log.info("time of the training: %s", goodput.summary(account.shares, account.wall))
    step = session.state.step
    if ended:
        session.recorder.event(Done(time=time.time(), step=step))
    else:
        newest = checkpoint.newest_step(job.folder.checkpoints)
        message = f"stopped at step {step} with a checkpoint; the same command goes on from there"
        if newest < step:
            kept = f"the newest one is of step {newest}" if newest else "there is none"
            message = f"stopped at step {step} without a checkpoint of it: {kept}"
        session.recorder.event(Stopped(time=time.time(), step=step, message=message))


if __name__ == "__main__":
    worker.main(TrainingJob, work)
