"""The program of a rank that trains: `-m zeroflow.training JOB.json`."""

import logging
import os
import time

from zeroflow.training import checkpoint, goodput
from zeroflow.training.environment import LAUNCHED
from zeroflow.training.events import Done, Stopped
from zeroflow.training.goodput import Clock
from zeroflow.training.job import TrainingJob
from zeroflow.training.rank_program import RankProgram, make_deterministic
from zeroflow.training.session import Session
from zeroflow.training.stopping import Stop

log = logging.getLogger("zeroflow.training")


def work(job: TrainingJob, stop: Stop) -> None:
    """Train the job from its newest checkpoint to its last step, or until asked to stop."""
    workload = job.training.workload
    if workload.deterministic:
        make_deterministic()
    clock = Clock(float(os.environ.get(LAUNCHED, time.time())), device=workload.device)
    session = Session(job, clock)
    try:
        ended = session.run(stop)
    finally:
        session.saver.wait()  # the next process resumes from the checkpoint that is being written
    account = session.ledger.book(session.state.step, ended=True)
    log.info("wall time of training: %s", goodput.summary(account.shares, account.wall))
    step = session.state.step
    if ended:
        session.recorder.event(Done(time=time.time(), step=step))
    else:
        newest = checkpoint.newest_step(job.folder.checkpoints)
        message = f"stopped at step {step} with a checkpoint; the same command resumes from it"
        if newest < step:
            kept = f"the newest is from step {newest}" if newest else "no checkpoint exists"
            message = f"stopped at step {step} without saving it: {kept}"
        session.recorder.event(Stopped(time=time.time(), step=step, message=message))


PROGRAM = RankProgram(TrainingJob, work)

if __name__ == "__main__":
    PROGRAM.main()
