"""Ranks that meet again and again, until what `fate` says happens to the last of them."""

import os
import signal
import time
from itertools import count
from pathlib import Path

import torch

from zeroflow import records
from zeroflow.training import worker, zero
from zeroflow.training.job import RankJob

_MEETINGS = 3


def work(job: RankJob, stop: worker.Stop) -> None:
    fate = (job.run_dir / "fate").read_text()
    history = job.folder.events
    for number in count():
        if number == _MEETINGS and zero.rank() == zero.ranks() - 1:
            meet(fate, history)
        if zero.rank() == 0:
            job.folder.alive.touch()
        if number == 0:
            pids = zero.total(os.getpid() << 32 * zero.rank())
            if zero.rank() == 0:
                by_rank = [pids % 2**32, pids >> 32]
                records.append(history, {"event": "started", "pids": by_rank})
        if stop():
            if zero.rank() == 0:
                records.append(history, {"event": "stopped", "message": "as asked for"})
            return
        time.sleep(0.05)


def meet(fate: str, history: Path) -> None:
    match fate:
        case "killed while others are frozen":
            [line] = records.read(history)
            os.kill(line["pids"][0], signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGKILL)
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "out of memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        case "hang":
            time.sleep(1000)


if __name__ == "__main__":
    worker.main(RankJob, work)
