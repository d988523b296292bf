"""Ranks that synchronise repeatedly until the last one has the failure called `fate`."""

import os
import signal
import time
from itertools import count

import torch

from zeroflow.training import zero
from zeroflow.training.events import EVENTS, Started, Stopped
from zeroflow.training.job import RankJob
from zeroflow.training.rank_program import RankProgram
from zeroflow.training.stopping import Stop

_MEETINGS = 3
PIDS = "pids"
"""File with the process ids of both ranks."""


def work(job: RankJob, stop: Stop) -> None:
    fate = (job.run_dir / "fate").read_text()
    for number in count():
        if number == _MEETINGS and zero.rank() == zero.ranks() - 1:
            meet(fate, job)
        if zero.rank() == 0:
            job.folder.alive.touch()
        if number == 0:
            pids = zero.total(os.getpid() << 32 * zero.rank())
            if zero.rank() == 0:
                (job.run_dir / PIDS).write_text(f"{pids % 2**32} {pids >> 32}")
                event = Started(time=time.time(), step=0, steps=_MEETINGS, parts=1)
                EVENTS.append(job.folder.events, event)
        if stop():
            if zero.rank() == 0:
                EVENTS.append(job.folder.events, Stopped(message="as asked for"))
            return
        time.sleep(0.05)


def meet(fate: str, job: RankJob) -> None:
    match fate:
        case "killed while others are frozen":
            first, _ = (job.run_dir / PIDS).read_text().split()
            os.kill(int(first), signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGKILL)
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "out of memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        case "hang":
            time.sleep(1000)


PROGRAM = RankProgram(RankJob, work)
