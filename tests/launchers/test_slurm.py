"""Machines from Slurm; the slow tests run a real one of two nodes."""

import _thread
import subprocess
import threading
from functools import partial
from pathlib import Path

import pytest
import two_ranks
from endings import assert_same_end
from patience import wait_until

from zeroflow.launchers.slurm import launcher, script
from zeroflow.training import recovery, tracked
from zeroflow.training.events import EVENTS, Event, Metrics, Saved, Started, Stopped
from zeroflow.training.failures import TrainingFailed, TrainingStopped
from zeroflow.training.hosts import Gang

STEPS = 400


def test_script_requests_the_nodes_and_starts_torchrun_once_on_each(tmp_path: Path):
    gang = Gang(
        "zeroflow.training", tmp_path / "job.json", nodes=4, min_nodes=3, ranks=32, device="cuda"
    )
    text = script(gang, ["--partition=gpu", "--comment=a b"])
    options = [line.removeprefix("#SBATCH ") for line in text.splitlines() if "#SBATCH" in line]
    assert {"--nodes=3-4", "--ntasks-per-node=1", "--gpus-per-node=8", "--requeue"} < set(options)
    assert options[-2:] == ["--partition=gpu", "'--comment=a b'"]
    assert text.count("--no-kill") == 2, "of the job and of its step"
    assert '--rdzv-endpoint="$first:$port"' in text and "--nnodes=3:4" in text
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_missing_slurm_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    gang = Gang(
        "zeroflow.training", tmp_path / "job.json", nodes=2, min_nodes=2, ranks=2, device="cpu"
    )
    with (
        pytest.raises(TrainingFailed, match="sbatch was not found"),
        launcher("")(gang, lambda: False),
    ):
        pass


job_of_two = partial(two_ranks.job_of_two, steps=STEPS, checkpoint=50)


def states() -> list[str]:
    return subprocess.check_output(["squeue", "--noheader", "--format=%T"], text=True).split()


def preempt() -> None:
    words = ["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null"]
    subprocess.run(["sbatch", *words, "--wrap=sleep 5"], check=True)


def end_time() -> None:
    """Send what Slurm sends to the script before the time of the job is over."""
    [job] = subprocess.check_output(["squeue", "--noheader", "--format=%i"], text=True).split()
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("interrupt", [preempt, end_time])
def test_requeued_job_ends_with_the_same_bits_as_one_machine(tmp_path, cluster, interrupt):
    job = job_of_two(tmp_path / "two", tmp_path / "cache", nodes=2)
    asked = False

    def watch(event: Event) -> None:
        nonlocal asked
        if isinstance(event, Metrics) and event.step >= 60 and not asked:
            asked = True
            interrupt()

    recovery.train(job, watch, launcher("--partition=low"))
    assert asked
    events = [e for e in EVENTS.read(job.folder.events) if isinstance(e, Started | Stopped)]
    _, stopped, again = events
    assert isinstance(stopped, Stopped) and 60 <= stopped.step == again.step < STEPS
    assert not recovery.read(job.folder), "nothing has failed"
    assert not job.folder.stop.exists()

    alone = job_of_two(tmp_path / "alone", tmp_path / "cache", nodes=1)
    tracked.train(alone)
    assert_same_end(job.folder.path, alone.folder.path)


@pytest.mark.slow
def test_interrupted_flow_stops_a_running_job_with_a_checkpoint_and_a_queued_one_without(
    tmp_path, cluster
):
    job = job_of_two(tmp_path / "two", tmp_path / "cache", nodes=2)

    def interrupt(event: Event) -> None:
        if isinstance(event, Metrics) and event.step == 60:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, TrainingStopped)):
        recovery.train(job, interrupt, launcher(""))
    assert not set(states()) & {"PENDING", "RUNNING"}
    newest = [e for e in EVENTS.read(job.folder.events) if isinstance(e, Saved)][-1]
    assert newest.step >= 60

    words = ["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null"]
    subprocess.run(["sbatch", *words, "--wrap=sleep 600"], check=True)
    wait_until(lambda: states() == ["RUNNING"], "another job")

    def interrupt_in_queue() -> None:
        wait_until(lambda: "PENDING" in states(), "the job in the queue")
        _thread.interrupt_main()

    threading.Thread(target=interrupt_in_queue).start()
    with pytest.raises(KeyboardInterrupt):
        recovery.train(job, lambda event: None, launcher(""))
    assert states() == ["RUNNING"], "the other job only"
