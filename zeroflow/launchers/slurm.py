"""Starts the ranks as a Slurm job, which returns to the queue when it is pre-empted.

The job starts torchrun once on each node. When it is pre-empted or its time limit is near, the
ranks save a checkpoint and the job returns to the queue. The same happens, without a checkpoint, if
a node fails. The flow watches the job until training has ended.

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
from zeroflow.launchers.slurm_jobs import (
    directives,
    gpu_option,
    states,
    submit,
    waiting_or_running,
    write_script,
)
from zeroflow.training.hosts import OWN_STORE, Ended, Gang, Held, Launcher, asked_to_stop

log = logging.getLogger(__name__)

_END_SECONDS = 60.0
"""Time for torchrun to end after its ranks have ended."""

_SCRIPT = """\
#!/bin/bash
{options}
run={run}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))
rm -f "$run/stop"

# The time limit is near: the ranks check for this file after each step
trap 'touch "$run/stop"; out_of_time=1' USR1
# scancel: the ranks get the same signal, and save
trap 'cancelled=1' TERM

srun --kill-on-bad-exit=0 {no_kill}{command} &
ranks=$!
while kill -0 "$ranks" 2>/dev/null; do wait "$ranks"; code=$?; done  # a signal interrupts `wait`

if [ -n "$out_of_time" ]; then rm -f "$run/stop"; fi
# The ranks were stopped, and neither by the run's command nor by scancel
if [ ! -e "$run/stop" ] && [ -z "$cancelled" ] \\
    && tail -n 1 "$run/events.jsonl" | grep -q '"event": "stopped"'; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def launcher(options: str) -> Launcher:
    """Return a launcher that submits a job, with additional `options` for sbatch."""
    return partial(_on_slurm, options=shlex.split(options))


@contextmanager
def _on_slurm(gang: Gang, ended: Ended, *, options: Sequence[str]) -> Iterator[Held]:
    job = waiting_or_running(gang.folder.slurm_job) or _submit(gang, options)
    try:
        # A job that is still in the queue has no ranks that could save
        with asked_to_stop(gang.folder, lambda: ended() or _state(job) != "RUNNING"):
            yield seldom(lambda: bool(_state(job)))
        _wait_for_end(job)
    finally:
        if _state(job):
            run("scancel", str(job))


def _wait_for_end(job: int) -> None:
    """Wait until torchrun has also ended. If the job were cancelled earlier, Slurm would list it as
    cancelled instead of completed.
    """
    until = time.monotonic() + _END_SECONDS
    while _state(job) and time.monotonic() < until:
        time.sleep(1)


def _state(job: int) -> str:
    """Return the state of a job, such as PENDING; an empty string if it has ended."""
    return next(iter(states(job)), "")


def script(gang: Gang, options: Sequence[str]) -> str:
    """Return the script for sbatch."""
    least = "" if gang.min_nodes == gang.nodes else f"{gang.min_nodes}-"
    given = [
        f"--job-name=zeroflow-{gang.folder.name}",
        f"--nodes={least}{gang.nodes}",
        "--ntasks-per-node=1",
        *([gpu_option(gang.ranks_of_each)] if gang.device == "cuda" else []),
        *(["--no-kill"] if least else []),
        f"--output={gang.folder.logs.absolute()}/slurm-%j.log",
        *options,
    ]
    # The torchrun of this Python environment, which all nodes share. Slurm does not restart it on a
    # node that was lost, so it does not wait for one
    torchrun = ("env", f"{OWN_STORE}=1", sys.executable, "-m", "torch.distributed.run")
    command = shlex.join(gang.command("@endpoint@", torchrun))
    return _SCRIPT.format(
        options=directives(given),
        run=shlex.quote(str(gang.folder.path.absolute())),
        no_kill="--no-kill " if least else "",
        command=command.replace("@endpoint@", '"$first:$port"'),
    )


def _submit(gang: Gang, options: Sequence[str]) -> int:
    folder = gang.folder
    folder.logs.mkdir(exist_ok=True)
    write_script(folder.slurm_script, script(gang, options))
    return submit(folder.slurm_script, folder.slurm_job, folder.logs)
