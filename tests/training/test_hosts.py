"""Ranks of several machines: two network namespaces, each with an agent of torchrun and a rank."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest
import two_ranks
from agents import Agents, Trouble
from endings import read_tensors
from patience import wait_until
from remote_folder import remote_folder
from two_hosts import Host, two_hosts

from zeroflow.run_folder import RunFolder
from zeroflow.training import hosts as hosts_module
from zeroflow.training import recovery, tracked, zero
from zeroflow.training.events import EVENTS, Done, Event, Failed, Metrics, Started, Stopped
from zeroflow.training.failures import TrainingFailed, TrainingStopped
from zeroflow.training.host_watch import SILENT_SECONDS
from zeroflow.training.hosts import PORT, Gang, asked_to_stop, follow
from zeroflow.training.job import Cadence, TrainingJob
from zeroflow.training.metrics import METRICS, StepRecord

STEPS = 200


def test_command_starts_the_ranks_of_one_machine_with_torchrun():
    gang = Gang(
        "zeroflow.training",
        Path("/c/runs/a b/job.json"),
        nodes=2,
        min_nodes=2,
        ranks=8,
        device="cpu",
    )
    words = gang.command("first:29400")
    assert words[:3] == ["python", "-m", "zeroflow.training.agent"]
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
def test_rank_number_comes_from_torchrun_or_slurm(monkeypatch, given, expected):
    for name in {*TORCHRUN, *SLURM, "CUDA_VISIBLE_DEVICES", "ZEROFLOW_RENDEZVOUS"}:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    try:
        zero.set_rank_environment()
        assert {name: os.environ.get(name) for name in expected} == expected
    finally:
        os.environ.clear()
        os.environ.update(before)


START = Started(time=1.0, step=0, steps=9, parts=1)
LOST = Failed(message="Connection closed by peer", reason="error")
FULL = Failed(message="no memory", reason="out of memory")
STOP = Stopped(message="stopped at step 3")


def followed(folder: Path, events: list[Event], *, held: bool | None = None) -> list[str]:
    """Follow ranks that write `events`; return the failures that they were restarted after."""
    gang = Gang("m", folder / "job.json", nodes=2, min_nodes=2, ranks=2, device="cpu")
    restarts: list[str] = []

    @contextmanager
    def launcher(gang: Gang, ended: Callable[[], bool]) -> Iterator[Callable[[], bool] | None]:
        with asked_to_stop(gang.folder, ended):
            for event in events:
                EVENTS.append(gang.folder.events, event)
            yield None if held is None else lambda: held

    def note(failure: TrainingFailed) -> None:
        restarts.append(str(failure))

    follow(gang, launcher, lambda event: None, note, hang_seconds=3600)
    return restarts


def test_ranks_that_torchrun_restarts_are_followed_to_their_end(tmp_path):
    lost = [LOST.replace(message="a rank that lost the lost one"), FULL.replace(reason="error")]
    assert followed(tmp_path, [START, LOST, *lost, START, Done()]) == ["Connection closed by peer"]
    [silent] = followed(tmp_path, [START, START, Done()])
    assert "without an error message" in silent
    assert followed(tmp_path, [START, STOP, START, Done()]) == []
    assert followed(tmp_path, [START, STOP, START, Done()], held=True) == []


@pytest.mark.parametrize(
    ("events", "held", "reason"),
    [
        ([START, FULL], None, "out of memory"),
        ([START, LOST, FULL], None, "out of memory"),
        ([LOST], None, "error"),  # they have never been connected
        ([START], False, "killed"),
    ],
)
def test_failure_that_a_restart_cannot_fix_ends_the_ranks_until_there_is_another_job(
    tmp_path, events, held, reason
):
    with pytest.raises(TrainingFailed) as failed:
        followed(tmp_path, events, held=held)
    assert failed.value.reason == reason
    assert RunFolder(tmp_path).pause.exists()
    followed(tmp_path, [START, Done()])
    assert not RunFolder(tmp_path).pause.exists()


@pytest.mark.parametrize("held", [None, False])
def test_ranks_that_are_stopped_by_others_stop_the_run(tmp_path, monkeypatch, held):
    monkeypatch.setattr(hosts_module, "_REJOIN_SECONDS", 1.0)
    with pytest.raises(TrainingStopped, match="stopped at step 3"):
        followed(tmp_path, [START, STOP], held=held)


job_of_two = partial(two_ranks.job_of_two, steps=STEPS, checkpoint=20)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as made:
        yield made


def end_of(job: TrainingJob) -> tuple[list[float], dict]:
    losses = [r.loss for r in METRICS.read(job.folder.metrics) if hasattr(r, "loss")]
    [checkpoint] = job.folder.checkpoints.glob(f"step-{STEPS:08d}")
    return losses, read_tensors(checkpoint)


def assert_same_end(job: TrainingJob, alone: TrainingJob) -> None:
    losses, tensors = end_of(job)
    expected, expected_tensors = end_of(alone)
    assert losses == expected
    assert tensors.keys() == expected_tensors.keys()
    assert all(tensors[name].equal(value) for name, value in expected_tensors.items())


def lose_torchrun(started: Agents) -> None:
    """Kill an agent only; its rank has to end by itself."""
    [_, *ranks] = started.processes(1)
    started.running.pop(1).kill()
    _, left = psutil.wait_procs(ranks, timeout=20)
    assert not left


def lose_host(started: Agents) -> None:
    """Let a host fall silent, which closes no connection."""
    for process in started.processes(1):
        process.suspend()
    [_, rank, *_] = started.processes(0)
    rank.wait(SILENT_SECONDS + 30)
    started.kill_all(1)


def drain_host(started: Agents) -> None:
    """Ask the ranks of one host to end, as a scheduler does before it reclaims the host."""
    [_, *ranks] = started.processes(1)
    for process in started.processes(1)[:1]:
        process.terminate()
    started.running.pop(1).wait(60)
    _, left = psutil.wait_procs(ranks, timeout=20)
    assert not left


def lose_rank(started: Agents) -> None:
    [_, rank, *_] = started.processes(1)
    rank.kill()


def is_asked_to_end(process: psutil.Process) -> bool:
    """True if SIGTERM waits for a suspended process."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    pending = re.findall(r"(?:Shd|Sig)Pnd:\s+(\w+)", status)
    return any(int(signals, 16) >> (signal.SIGTERM - 1) & 1 for signals in pending)


@pytest.mark.slow
def test_two_hosts_end_with_the_bits_of_one_although_ranks_agents_and_hosts_die(tmp_path, hosts):
    alone = job_of_two(tmp_path / "alone", tmp_path / "cache", nodes=1)
    tracked.train(alone)

    job = job_of_two(tmp_path / "two", tmp_path / "cache", nodes=2)
    trouble = Trouble(job, hosts)

    def script(started: Agents) -> None:
        for step, lose in ((25, lose_torchrun), (65, lose_rank), (105, lose_host)):
            trouble.wait_for(step)
            lose(started)
            if 1 not in started.running:
                started.start(1)
        assert [agent.wait(300) for agent in started.running.values()] == [0, 0]

    done = trouble.do(script)
    recovery.train(job, trouble)
    done.result(60)
    ledger = recovery.read(job.folder)
    assert [entry.reason for entry in ledger] == ["killed"] * 3
    assert [entry.step >= least for entry, least in zip(ledger, (20, 60, 100), strict=True)]
    names = {path.name.partition("-rank-")[0] for path in job.folder.logs.glob("*-rank-?.log")}
    assert names == {host.name for host in hosts}
    assert_same_end(job, alone)


@pytest.mark.slow
def test_second_host_may_reach_the_cache_over_a_network_file_system(tmp_path, hosts):
    alone = job_of_two(tmp_path / "alone", tmp_path / "local", nodes=1)
    tracked.train(alone)

    shared, keys = tmp_path / "shared", tmp_path / "keys"
    shared.mkdir()
    keys.mkdir()
    job = job_of_two(shared / "two", shared / "cache", nodes=2)
    with remote_folder(shared, keys, hosts) as remote:
        trouble = Trouble(job, (hosts[0], remote))

        def script(started: Agents) -> None:
            for step, lose in ((25, lose_torchrun), (65, lose_rank)):
                trouble.wait_for(step)
                lose(started)
                if 1 not in started.running:
                    started.start(1)
            assert [agent.wait(300) for agent in started.running.values()] == [0, 0]

        done = trouble.do(script)
        recovery.train(job, trouble)
        done.result(60)
    assert [entry.reason for entry in recovery.read(job.folder)] == ["killed"] * 2
    assert_same_end(job, alone)


@pytest.mark.slow
def test_training_continues_with_the_remaining_host_and_later_with_both(tmp_path, hosts):
    job = job_of_two(tmp_path / "two", tmp_path / "cache", nodes=2).replace(min_nodes=1)
    workload = job.training.workload
    trouble = Trouble(job, hosts, min_nodes=1)

    def script(started: Agents) -> None:
        trouble.wait_for(25)
        started.kill_all(1)
        trouble.wait_for(30)  # alone
        [_, rank, *_] = started.processes(0)
        rank.suspend()  # it would reach its last step before the other host is there
        started.start(1)
        wait_until(lambda: is_asked_to_end(rank), "the other host")
        rank.resume()
        trouble.wait_for(100)
        drain_host(started)
        assert [agent.wait(300) for agent in started.running.values()] == [0]

    done = trouble.do(script)
    recovery.train(job, trouble)
    done.result(60)
    records = [r for r in METRICS.read(job.folder.metrics) if isinstance(r, StepRecord)]
    assert [r.step for r in records] == list(range(1, STEPS + 1)), "each step once"
    assert {r.tokens - r.step * workload.batch_tokens for r in records} == {0}
    output = (job.folder.logs / "first-rank-0.log").read_text()
    assert "training on 1 machine of 2" in output
    assert output.count("resumed at step") >= 3
    ends = [e.event for e in EVENTS.read(job.folder.events) if isinstance(e, Stopped | Failed)]
    assert ends[0] == "failed" and "stopped" in ends, "the second loss was announced"

    alone = job_of_two(tmp_path / "alone", tmp_path / "cache", nodes=1)
    tracked.train(alone)
    losses, expected = end_of(job)[0], end_of(alone)[0]
    assert losses[:20] == expected[:20]
    assert losses == pytest.approx(expected, rel=1e-3), "the same rows, summed in another order"


@pytest.mark.slow
def test_interrupted_flow_stops_the_ranks_of_all_machines_with_a_checkpoint(tmp_path, hosts):
    job = job_of_two(tmp_path / "two", tmp_path / "cache", nodes=2)
    job = job.replace(cadence=Cadence(log=1, validate_=10**6, checkpoint=10**6))

    def interrupt(event: Event) -> None:
        if isinstance(event, Metrics) and event.step == 3:
            raise KeyboardInterrupt

    def script(started: Agents) -> None:
        assert [agent.wait(300) for agent in started.running.values()] == [0, 0]

    done = Trouble(job, hosts).do(script)
    with pytest.raises((KeyboardInterrupt, TrainingStopped)):
        tracked.train(job, interrupt)
    done.result(300)
    [checkpoint] = job.folder.checkpoints.glob("step-*")
    assert 3 <= int(checkpoint.name[5:]) < STEPS
    assert not job.folder.stop.exists()


@pytest.mark.slow
def test_torchrun_takes_its_settings_from_kubeflow_s_variables(tmp_path, hosts):
    job = job_of_two(tmp_path / "two", tmp_path / "cache", nodes=2)
    started = []

    def start(number: int) -> None:
        place = {
            "PET_NNODES": "2",
            "PET_NPROC_PER_NODE": "1",
            "PET_NODE_RANK": str(number),
            "PET_MASTER_ADDR": hosts[0].name,
            "PET_MASTER_PORT": str(PORT),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "torch.distributed.run", "-m", "zeroflow.training"]
        words = [*hosts[number].prefix, *command, str(job.folder.job)]
        started.append(subprocess.Popen(words, env=os.environ | place))

    def start_both() -> None:
        wait_until(job.folder.job.exists, "the job")
        for number in (0, 1):
            start(number)

    with ThreadPoolExecutor(1) as beside:
        beside.submit(start_both)
        tracked.train(job)
    assert [container.wait(60) for container in started] == [0, 0]
    assert len(end_of(job)[0]) == STEPS


@pytest.mark.slow
def test_other_number_of_ranks_than_the_job_has_is_refused_with_both(tmp_path):
    job = job_of_two(tmp_path / "two", tmp_path / "cache", nodes=2)
    job.write(job.folder.job)
    command = [sys.executable, "-m", "zeroflow.training", str(job.folder.job)]
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode and ", not of 1: start 2, or run" in ended.stderr
