"""Machines from Slurm: a job that it queues, pre-empts and starts again.

The job starts torchrun once on each node. Before its time is over, or if it is pre-empted, the
ranks save a checkpoint and the job returns to the queue; the flow watches it until the training has
ended. A node that fails also returns it to the queue.

Sources: https://slurm.schedmd.com/sbatch.html and https://slurm.schedmd.com/preempt.html
"""

import logging
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from zeroflow.launchers.commands import run, seldom
from zeroflow.records import Record
from zeroflow.training.failures import TrainingFailed
from zeroflow.training.hosts import Ended, Gang, Held, Launcher, asked_to_stop

log = logging.getLogger(__name__)

_WARNED_SECONDS = 120
"""Time before the end of the job's time at which its ranks save."""

_END_SECONDS = 60.0
"""Time for torchrun to end after its ranks."""

_NO_JOB = "Invalid job id"
"""Error text of squeue for a job that ended some minutes ago."""

_SCRIPT = """\
#!/bin/bash
{options}
run={run}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))
rm -f "$run/stop"

# The time is almost over: the ranks look at this file after each step
trap 'touch "$run/stop"; out_of_time=1' USR1
# scancel: the ranks get the same signal, and save
trap 'cancelled=1' TERM

srun --kill-on-bad-exit=0 {command} &
ranks=$!
while kill -0 "$ranks" 2>/dev/null; do wait "$ranks"; code=$?; done  # signals interrupt a wait

if [ -n "$out_of_time" ]; then rm -f "$run/stop"; fi
# Stopped, and neither by the run's command nor by scancel
if [ ! -e "$run/stop" ] && [ -z "$cancelled" ] \\
    && tail -n 1 "$run/events.jsonl" | grep -q '"event": "stopped"'; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


class Submitted(Record):
    """The job of a run, in slurm.json."""

    job: int


def launcher(options: str, *, gpus: bool) -> Launcher:
    """Return a launcher that submits a job.

    Args:
        options: more options for sbatch.
        gpus: each rank needs a GPU.
    """
    return partial(_on_slurm, options=shlex.split(options), gpus=gpus)


@contextmanager
def _on_slurm(gang: Gang, ended: Ended, *, options: Sequence[str], gpus: bool) -> Iterator[Held]:
    job = _waiting_or_running(gang) or _submit(gang, options, gpus=gpus)
    try:
        # Ranks of a job that still waits cannot answer
        with asked_to_stop(gang.folder, lambda: ended() or _state(job) != "RUNNING"):
            yield seldom(lambda: bool(_state(job)))
        _wait_for_end(job)
    finally:
        if _state(job):
            run("scancel", str(job))


def _wait_for_end(job: int) -> None:
    """Wait until torchrun has ended too, because Slurm would list the job as cancelled."""
    until = time.monotonic() + _END_SECONDS
    while _state(job) and time.monotonic() < until:
        time.sleep(1)


def _state(job: int) -> str:
    """Return the state of a job, such as PENDING; "" if it has ended."""
    try:
        return run("squeue", "--noheader", "--format=%T", f"--jobs={job}").strip()
    except TrainingFailed as error:
        if _NO_JOB in str(error):
            return ""
        log.warning("%s", error)  # its controller may be starting again
        return "UNKNOWN"


def script(gang: Gang, options: Sequence[str], *, gpus: bool) -> str:
    """Return the content of the file for sbatch."""
    least = "" if gang.min_nodes == gang.nodes else f"{gang.min_nodes}-"
    given = [
        f"--job-name=zeroflow-{gang.folder.name}",
        f"--nodes={least}{gang.nodes}",
        "--ntasks-per-node=1",
        *([f"--gpus-per-node={gang.ranks_of_each}"] if gpus else []),
        *(["--no-kill"] if least else []),
        f"--signal=B:USR1@{_WARNED_SECONDS}",
        "--requeue",
        "--open-mode=append",
        f"--output={gang.folder.logs.absolute()}/slurm-%j.log",
        *options,
    ]
    # torchrun of this environment, which all nodes share
    torchrun = (sys.executable, "-m", "torch.distributed.run")
    command = shlex.join(gang.command("@endpoint@", torchrun))
    return _SCRIPT.format(
        options="\n".join(f"#SBATCH {shlex.quote(option)}" for option in given),
        run=shlex.quote(str(gang.folder.path.absolute())),
        command=command.replace("@endpoint@", '"$first:$port"'),
    )


def _submit(gang: Gang, options: Sequence[str], *, gpus: bool) -> int:
    folder = gang.folder
    folder.logs.mkdir(exist_ok=True)
    folder.slurm_script.write_text(script(gang, options, gpus=gpus), encoding="utf-8")
    said = run("sbatch", "--parsable", str(folder.slurm_script))
    number = int(said.strip().partition(";")[0])  # a cluster may follow
    Submitted(job=number).write(folder.slurm_job)
    log.info("submitted job %d to Slurm; its output is in %s", number, folder.logs)
    return number


def _waiting_or_running(gang: Gang) -> int | None:
    """Return the job of the run, if one is left from a command that was killed."""
    before = Submitted.read_if_exists(gang.folder.slurm_job)
    if before is None or not _state(before.job):
        return None
    log.info("job %d of Slurm is still there, and is followed again", before.job)
    return before.job
