"""Jobs of Slurm: submit, find again, ask for their state."""

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path

from zeroflow import artifacts
from zeroflow.launchers.commands import run
from zeroflow.records import Record
from zeroflow.training.failures import TrainingFailed

log = logging.getLogger(__name__)

WARNED_SECONDS = 120
"""Time before the time limit of a job at which its ranks save."""

_NO_JOB = "Invalid job id"
"""Error text of squeue for a job that ended minutes ago, which Slurm no longer lists."""


class Submitted(Record):
    """A submitted job, in slurm.json of its run or its sweep."""

    job: int
    """Its number in Slurm."""


def directives(options: Sequence[str]) -> str:
    """Return the lines of a script with options for sbatch, and those that every job has."""
    common = [f"--signal=B:USR1@{WARNED_SECONDS}", "--requeue", "--open-mode=append"]
    return "\n".join(f"#SBATCH {shlex.quote(option)}" for option in [*common, *options])


def gpu_option(number: int) -> str:
    """Return the option that requests `number` GPUs on each node."""
    return f"--gpus-per-node={number}"


def write_script(path: Path, script: str) -> None:
    with artifacts.create_private(path) as file:  # an option may contain a secret
        file.write(script.encode())


def submit(script: Path, record: Path, logs: Path) -> int:
    """Submit `script`, and record the number of its job.

    Raises:
        TrainingFailed: Slurm is missing, or does not accept the job.
    """
    said = run("sbatch", "--parsable", str(script))
    number = int(said.strip().partition(";")[0])  # the name of a cluster may follow
    Submitted(job=number).write(record)
    log.info("submitted Slurm job %d; its output is in %s", number, logs)
    return number


def waiting_or_running(record: Path) -> int | None:
    """Return the job that an earlier command, which was killed, has left; None if there is none."""
    before = Submitted.read_if_exists(record)
    if before is None or not states(before.job):
        return None
    log.info("watching Slurm job %d, which an earlier command submitted", before.job)
    return before.job


def states(job: int) -> list[str]:
    """Return the states, such as PENDING, of a job's tasks that have not ended."""
    try:
        said = run("squeue", "--noheader", "--array", "--format=%T", f"--jobs={job}")
    except TrainingFailed as error:
        if _NO_JOB in str(error):
            return []
        log.warning("%s", error)  # Slurm's controller may be restarting
        return ["UNKNOWN"]
    return said.split()
