"""Agents of torchrun, one on each of two hosts, and trouble for them while a run is watched."""

import os
import queue
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import ClassVar

import psutil
from patience import wait_until
from two_hosts import Host

from zeroflow.training.events import Event, Metrics
from zeroflow.training.hosts import AGENT, PORT, Gang
from zeroflow.training.job import TrainingJob


class ThisHost:
    """This machine, on which both agents may run."""

    name = "localhost"
    prefix: ClassVar[list[str]] = []


Hosts = tuple[Host, Host] | tuple[ThisHost, ThisHost]


class Agents:
    """Agents of torchrun on two hosts, each started by the command that the log has."""

    def __init__(
        self,
        job: TrainingJob,
        hosts: Hosts,
        *,
        min_nodes: int = 2,
        port: int = PORT,
    ) -> None:
        self._hosts = hosts
        gang = Gang(
            "zeroflow.training", job.folder.job, nodes=2, min_nodes=min_nodes, ranks=2, device="cpu"
        )
        self._command = gang.command(f"{hosts[0].name}:{port}", (sys.executable, *AGENT[1:]))
        self._environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.running: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, number: int) -> None:
        self.running[number] = subprocess.Popen(
            [*self._hosts[number].prefix, *self._command],
            env=self._environment,
            start_new_session=True,
        )

    def processes(self, number: int) -> list[psutil.Process]:
        """Agent, its ranks, and their children."""
        agent = psutil.Process(self.running[number].pid)
        return [agent, *agent.children(recursive=True)]

    def kill_all(self, number: int) -> None:
        if self.running[number].poll() is None:
            for process in self.processes(number):
                process.kill()
        self.running.pop(number).wait()

    def end(self) -> None:
        for number in list(self.running):
            self.kill_all(number)


@contextmanager
def agents(job: TrainingJob, hosts: Hosts, **settings: int) -> Iterator[Agents]:
    """Two agents, one on each host."""
    started = Agents(job, hosts, **settings)
    wait_until(job.folder.job.exists, "the job")
    try:
        for number in (0, 1):
            started.start(number)
        yield started
    finally:
        started.end()


class Trouble:
    """Watches a run, and acts on its hosts when a step is reached."""

    def __init__(self, job: TrainingJob, hosts: Hosts, **settings: int) -> None:
        self.job, self.hosts, self.settings = job, hosts, settings
        self.reached: queue.Queue[int] = queue.Queue()
        self._thread = ThreadPoolExecutor(1)

    def __call__(self, event: Event) -> None:
        if isinstance(event, Metrics):
            self.reached.put(event.step)

    def wait_for(self, step: int) -> None:
        while self.reached.get(timeout=300) < step:
            pass
        while not self.reached.empty():
            self.reached.get()

    def do(self, script: Callable[[Agents], None]) -> Future[None]:
        def run() -> None:
            with agents(self.job, self.hosts, **self.settings) as started:
                script(started)

        return self._thread.submit(run)
