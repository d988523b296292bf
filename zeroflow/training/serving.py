"""The process of a rank on one machine: `-m zeroflow.training.serving FOLDER`.

It works on the jobs that its parent writes to standard input (`processes.Task`), one after another.
Imports, an open device and compiled code are kept for the next job. Everything else that a job
leaves is given back, so that the next one has the memory and the settings of a new process. If that
fails, or a job fails, the process ends, and its parent starts a new one.
"""

import ctypes
import gc
import importlib
import logging
import os
import signal
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from zeroflow.training import compiling, interpreter
from zeroflow.training.processes import DONE, Task
from zeroflow.training.rank_program import RankProgram, log_to_parent
from zeroflow.training.stopping import Parent

log = logging.getLogger("zeroflow.training")

_MOST_LEFT_BYTES = 2**26
"""GPU memory that a job may leave allocated."""


def main() -> None:
    parent = Parent()
    log_to_parent(int(os.environ.get("RANK", "0")))
    for task in map(Task.model_validate_json, parent.lines()):
        module = importlib.import_module(_program_module(task.module))
        if task.job_file is None:
            if torch.cuda.is_available():
                compiling.import_compiler()
            continue
        os.environ.update(task.environment)
        interpreter.collect_again()
        frozen = gc.get_freeze_count()
        parent.working = True
        program: RankProgram[Any] = module.PROGRAM
        program.run(task.job_file, parent)
        parent.working = False
        if not _give_back(frozen):
            break
        with suppress(OSError):  # the parent has died
            sys.stdout.write(f"{DONE}\n")
    # Without the clean-up of libraries, which takes seconds for an open GPU
    os._exit(0)


def _program_module(name: str) -> str:
    """Return the module that `python -m name` would run."""
    spec = find_spec(name)
    is_package = spec is not None and spec.submodule_search_locations is not None
    return f"{name}.__main__" if is_package and find_spec(f"{name}.__main__") else name


def _give_back(frozen: int) -> bool:
    """Give back what a job has left; return False if that fails.

    Args:
        frozen: number of objects that garbage collections skipped when the job began.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.use_deterministic_algorithms(False)
    compiling.end_watch()
    gc.enable()
    if gc.get_freeze_count() > frozen:  # the job may have frozen what it must give back
        gc.unfreeze()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        if (left := torch.cuda.memory_reserved()) > _MOST_LEFT_BYTES:
            log.info("%d MiB of GPU memory are not given back: a new process follows", left >> 20)
            return False
    with suppress(OSError, AttributeError):  # not Linux, or another C library
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident memory
    return True


if __name__ == "__main__":
    main()
