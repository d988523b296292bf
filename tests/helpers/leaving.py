"""A rank that records the process it runs in, leaves traces in it, and meets the given fate."""

import gc
import json
import os
import signal
from pathlib import Path

import torch

from zeroflow.training.events import EVENTS, Done
from zeroflow.training.job import RankJob
from zeroflow.training.rank_program import RankProgram, make_deterministic
from zeroflow.training.stopping import Stop

SEEN = "seen.jsonl"
_MEGABYTES = 600


def work(job: RankJob, stop: Stop) -> None:
    status = Path("/proc/self/status").read_text()
    seen = {
        "pid": os.getpid(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "collects": gc.isenabled(),
        "peak": int(status.split("VmHWM:")[1].split()[0]) // 1024,
    }
    with (job.run_dir / SEEN).open("a") as file:
        file.write(f"{json.dumps(seen)}\n")
    match (job.run_dir / "fate").read_text():
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "out of memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
    make_deterministic()
    gc.disable()
    cycle: list[object] = [torch.ones(_MEGABYTES, 2**18)]
    cycle.append(cycle)
    gc.freeze()
    EVENTS.append(job.folder.events, Done())


PROGRAM = RankProgram(RankJob, work)
