"""Ranks of several machines: two agents of torchrun on this one, each with a rank."""

import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from endings import read_tensors
from tiny import MODEL, synthetic_rows, training_config, training_job

from zeroflow.training import hosts, tracked, zero
from zeroflow.training.events import Event, Metrics
from zeroflow.training.failures import TrainingFailed, TrainingStopped
from zeroflow.training.job import Cadence, TrainingJob
from zeroflow.training.metrics import METRICS

STEPS = 40


def test_command_starts_the_ranks_of_one_machine_with_torchrun():
    words = shlex.split(
        hosts.command("zeroflow.training", Path("/c/runs/a b/job.json"), nodes=2, ranks=8)
    )
    assert words[0] == "env" and words[2] == "torchrun"
    assert words[-3:] == ["-m", "zeroflow.training", "/c/runs/a b/job.json"]
    assert {"--nnodes=2", "--nproc-per-node=4", "--rdzv-backend=c10d", "--rdzv-id=a b"} < set(words)


TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "h",
    "MASTER_PORT": "1",
}
SLURM = {
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "77",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (TORCHRUN, {"RANK": "5", "CUDA_VISIBLE_DEVICES": "1"}),
        (TORCHRUN | {"CUDA_VISIBLE_DEVICES": "4, 6"}, {"CUDA_VISIBLE_DEVICES": "6"}),
        # srun may give each task its own GPU
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "0"}),
        (SLURM, {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1"}),
        # a flow within a job of Slurm: its ranks are those of our launcher
        (SLURM | {"RANK": "0", "WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "1"}),
        (SLURM | {"ZEROFLOW_RENDEZVOUS": "r", "RANK": "1"}, {"RANK": "1", "MASTER_ADDR": None}),
    ],
)
def test_rank_takes_its_place_from_torchrun_and_from_slurm(monkeypatch, given, expected):
    for name in {*TORCHRUN, *SLURM, "CUDA_VISIBLE_DEVICES", "ZEROFLOW_RENDEZVOUS"}:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    try:
        zero.take_place()
        assert {name: os.environ.get(name) for name in expected} == expected
    finally:
        os.environ.clear()
        os.environ.update(before)


def job_of_two(folder: Path, cache: Path, *, nodes: int) -> TrainingJob:
    shards, tokenizer = synthetic_rows(cache)
    model = MODEL.replace(vocab_size=tokenizer.vocab_size)
    training = training_config(steps=STEPS, ranks=2, zero_stage=2, nodes=nodes, model=model)
    job = training_job(folder, shards, tokenizer, training)
    return job.replace(cadence=Cadence(log=1, validate_=20, checkpoint=5))


@contextmanager
def agents(job: TrainingJob) -> Iterator[list[subprocess.Popen]]:
    """Two agents, as two machines would start them by the command that the log has."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"--rdzv-endpoint=127.0.0.1:{free.getsockname()[1]}"
    line = hosts.command("zeroflow.training", job.folder.job, nodes=2, ranks=2)
    _, setting, _, *words = shlex.split(line)
    words = [endpoint if "endpoint" in word else word for word in words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | dict([setting.split("=")])
    while not job.folder.job.exists():
        time.sleep(0.05)
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *words],
            env=environment,
            start_new_session=True,
        )
        for _ in range(2)
    ]
    try:
        yield started
    finally:
        for agent in started:
            for process in [*psutil.Process(agent.pid).children(recursive=True), agent]:
                process.kill()
            agent.wait()


def in_thread(function) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def end_of(job: TrainingJob) -> tuple[list[float], dict]:
    losses = [r.loss for r in METRICS.read(job.folder.metrics) if hasattr(r, "loss")]
    [checkpoint] = job.folder.checkpoints.glob(f"step-{STEPS:08d}")
    return losses, read_tensors(checkpoint)


def retried(job: TrainingJob, watch) -> list[str]:
    """Train to the end as a flow's retries do, while torchrun restarts the ranks; the failures."""
    failures = []
    while True:
        try:
            tracked.train(job, watch)
            return failures
        except TrainingFailed as failure:
            failures.append(failure.reason)
            assert len(failures) < 5  # ranks may miss each other at a restart


@pytest.mark.slow
def test_two_machines_end_with_the_bits_of_one_although_a_rank_is_killed(tmp_path):
    alone = job_of_two(tmp_path / "alone", tmp_path / "cache", nodes=1)
    tracked.train(alone)

    job = job_of_two(tmp_path / "two", tmp_path / "cache", nodes=2)
    killed = threading.Event()

    def kill_one() -> None:
        with agents(job) as (_, second):
            seen.wait(300)
            [rank] = psutil.Process(second.pid).children()
            rank.kill()
            killed.set()
            ended.wait(300)

    seen, ended = threading.Event(), threading.Event()

    def watch(event: Event) -> None:
        if isinstance(event, Metrics) and event.step >= 12:
            seen.set()

    thread = in_thread(kill_one)
    try:
        reasons = retried(job, watch)
        assert set(reasons) == {"killed"} and killed.is_set()
    finally:
        ended.set()
        thread.join(60)
    losses, tensors = end_of(job)
    expected, expected_tensors = end_of(alone)
    assert losses == expected
    assert tensors.keys() == expected_tensors.keys()
    assert all(tensors[name].equal(value) for name, value in expected_tensors.items())


@pytest.mark.slow
def test_flow_that_is_interrupted_stops_the_ranks_of_all_machines_with_a_checkpoint(tmp_path):
    job = job_of_two(tmp_path / "two", tmp_path / "cache", nodes=2)
    job = job.replace(cadence=Cadence(log=1, validate_=10**6, checkpoint=10**6))
    codes: list[int] = []

    def run_agents() -> None:
        with agents(job) as started:
            codes.extend(agent.wait(300) for agent in started)

    def interrupt(event: Event) -> None:
        if isinstance(event, Metrics) and event.step == 3:
            raise KeyboardInterrupt

    thread = in_thread(run_agents)
    with pytest.raises((KeyboardInterrupt, TrainingStopped)):
        tracked.train(job, interrupt)
    thread.join(300)
    assert codes == [0, 0]
    [checkpoint] = job.folder.checkpoints.glob("step-*")
    assert 3 <= int(checkpoint.name[5:]) < STEPS
    assert not job.folder.stop.exists()


@pytest.mark.slow
def test_other_number_of_ranks_than_the_job_has_is_refused_with_both(tmp_path):
    job = job_of_two(tmp_path / "two", tmp_path / "cache", nodes=2)
    job.write(job.folder.job)
    command = [sys.executable, "-m", "zeroflow.training", str(job.folder.job)]
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode and "1 ranks were started" in ended.stderr
