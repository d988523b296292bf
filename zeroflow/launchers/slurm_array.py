"""Runs of a sweep as one job array of Slurm. Each task of the array is a whole run on one node.

A task that is pre-empted, or whose time limit is near, saves a checkpoint and returns to the queue.

Source: https://slurm.schedmd.com/job_array.html
"""

import logging
import shlex
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence

from zeroflow import artifacts
from zeroflow.artifacts import JsonObject
from zeroflow.launchers.commands import run
from zeroflow.launchers.slurm_jobs import (
    directives,
    states,
    submit,
    waiting_or_running,
    write_script,
)
from zeroflow.run_folder import ArrayFolder

log = logging.getLogger(__name__)

_LOOK_SECONDS = 5.0
"""Time between two requests to Slurm."""

_STOP_SECONDS = 120.0
"""Time for the tasks to save after they were asked to stop."""

_PROGRAM = "zeroflow.cli.array_task"
"""Program of a task. Its argument is the file with the settings of a run."""

_STOPPED = 143
"""Exit code of a run that was stopped by SIGTERM."""

_SCRIPT = """\
#!/bin/bash
{options}
folder={folder}
runs=({runs})
run="${{runs[$SLURM_ARRAY_TASK_ID]}}"
task="${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"

trap 'scancel --signal=TERM "$task"' USR1  # the time limit is near: the run saves and ends
trap 'cancelled=1' TERM  # scancel: the run gets the same signal, and saves

srun --ntasks=1 --open-mode=append --output="$folder/$run.log" \\
    {python} -m {program} "$folder/$run.json" &
work=$!
while kill -0 "$work" 2>/dev/null; do wait "$work"; code=$?; done  # a signal interrupts `wait`

# The run was stopped, and neither by the sweep's command nor by scancel
if [ "$code" -eq {stopped} ] && [ ! -e "$folder/stop" ] && [ -z "$cancelled" ]; then
    scontrol requeue "$task"
fi
exit "$code"
"""


def script(folder: ArrayFolder, runs: Sequence[str], options: Sequence[str]) -> str:
    """Return the script for sbatch. Its tasks read the settings of `runs` from `folder`."""
    path = folder.path.absolute()
    given = [
        f"--array=0-{len(runs) - 1}",
        f"--job-name=zeroflow-{path.parent.name}",
        "--nodes=1",
        "--ntasks=1",
        f"--output={path}/slurm-%A_%a.log",
        *options,
    ]
    return _SCRIPT.format(
        options=directives(given),
        folder=shlex.quote(str(path)),
        runs=shlex.join(runs),
        python=shlex.quote(sys.executable),
        program=_PROGRAM,
        stopped=_STOPPED,
    )


def finish_earlier(folder: ArrayFolder) -> None:
    """Wait for the end of the runs of an array that an earlier command submitted."""
    if (job := waiting_or_running(folder.slurm_job)) is not None:
        _watch(folder, job)


def run_all(folder: ArrayFolder, runs: Mapping[str, JsonObject], options: Sequence[str]) -> None:
    """Execute `runs` as tasks of a job array, and wait until all of them have ended.

    If this is interrupted, the runs that are being executed save and end, and the others are
    cancelled.

    Args:
        runs: settings of each run, by its name.
        options: additional options for sbatch.

    Raises:
        TrainingFailed: Slurm is missing, or does not accept the job.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    for name, settings in runs.items():
        artifacts.write_json(folder.settings(name), settings, private=True)
    folder.stop.unlink(missing_ok=True)
    write_script(folder.script, script(folder, list(runs), options))
    _watch(folder, submit(folder.script, folder.slurm_job, folder.path))


def _watch(folder: ArrayFolder, job: int) -> None:
    before: Counter[str] = Counter()
    try:
        while left := Counter(states(job)):
            if left != before:
                before, words = left, (f"{n} {state.lower()}" for state, n in left.items())
                log.info("runs in Slurm: %s", ", ".join(words))
            time.sleep(_LOOK_SECONDS)
    except BaseException:
        _stop(folder, job)
        raise


def _stop(folder: ArrayFolder, job: int) -> None:
    log.info("asking the runs of Slurm job %d to save a checkpoint and stop", job)
    folder.stop.touch()
    run("scancel", "--state=PENDING", str(job))
    run("scancel", "--signal=TERM", str(job))
    until = time.monotonic() + _STOP_SECONDS
    while states(job) and time.monotonic() < until:
        time.sleep(1)
    if states(job):
        run("scancel", str(job))
