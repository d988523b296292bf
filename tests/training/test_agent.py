"""Agents of torchrun on one machine, such as one for each of its GPUs, find each other again."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from agents import Agents, ThisHost, Trouble
from endings import assert_same_end
from patience import wait_until
from pipeline import free_port
from two_ranks import job_of_two

from zeroflow.training import recovery, tracked
from zeroflow.training.hosts import AGENT, Gang
from zeroflow.training.job import TrainingJob
from zeroflow.training.metrics import METRICS

LENGTH = {"steps": 120, "checkpoint": 20}


@pytest.fixture
def job(tmp_path: Path) -> TrainingJob:
    return job_of_two(tmp_path / "two", tmp_path / "cache", nodes=2, **LENGTH)


@pytest.fixture
def alone(tmp_path: Path) -> TrainingJob:
    """The same job, trained by the launcher of one machine."""
    job = job_of_two(tmp_path / "alone", tmp_path / "cache", nodes=1, **LENGTH)
    tracked.train(job)
    return job


def with_store(started: Agents, port: int) -> int:
    """Return the number of the agent that has the store through which the agents meet."""
    [number] = [
        number
        for number, agent in started.running.items()
        for connection in psutil.Process(agent.pid).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    ]
    return number


@pytest.mark.slow
def test_agents_of_one_machine_meet_again_whichever_of_them_dies(job, alone):
    port = free_port()
    trouble = Trouble(job, (ThisHost(), ThisHost()), port=port)

    def script(started: Agents) -> None:
        for step, has_store in ((25, True), (65, False)):
            trouble.wait_for(step)
            store = with_store(started, port)
            lost = store if has_store else 1 - store
            started.kill_all(lost)
            started.start(lost)
        assert [agent.wait(300) for agent in started.running.values()] == [0, 0]

    done = trouble.do(script)
    recovery.train(job, trouble)
    done.result(60)
    assert [entry.reason for entry in recovery.read(job.folder)] == ["killed"] * 2
    assert_same_end(job.folder.path, alone.folder.path)


@pytest.mark.slow
def test_agent_that_is_left_trains_alone_although_the_other_had_the_store(job, alone):
    port = free_port()
    job = job.replace(min_nodes=1)
    trouble = Trouble(job, (ThisHost(), ThisHost()), min_nodes=1, port=port)

    def script(started: Agents) -> None:
        trouble.wait_for(25)
        started.kill_all(with_store(started, port))
        assert [agent.wait(300) for agent in started.running.values()] == [0]

    done = trouble.do(script)
    recovery.train(job, trouble)
    done.result(60)
    losses, expected = (
        [r.loss for r in METRICS.read(folder.metrics) if hasattr(r, "loss")]
        for folder in (job.folder, alone.folder)
    )
    assert losses[:20] == expected[:20]
    assert losses == pytest.approx(expected, rel=1e-3), "the same rows, summed in another order"


@pytest.mark.slow
def test_agent_tries_again_to_find_the_others_until_the_run_is_trained(tmp_path, job):
    job.write(job.folder.job)
    gang = Gang("zeroflow.training", job.folder.job, nodes=2, min_nodes=2, ranks=2, device="cpu")
    command = gang.command(f"localhost:{free_port()}", (sys.executable, *AGENT[1:]))
    command.insert(3, "--rdzv-conf=is_host=0,read_timeout=1")
    log = tmp_path / "agent.log"
    with log.open("w") as output:
        agent = subprocess.Popen(command, stderr=output)
    try:
        wait_until(lambda: log.read_text().count("trying again") == 2, "the second attempt")
        tracked.train(job_of_two(job.run_dir, tmp_path / "cache", nodes=1, **LENGTH))
        assert agent.wait(60) == 0
    finally:
        agent.kill()
