"""The flow as a user starts it, and queries to its files and to Prefect's server."""

import base64
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
from patience import HANG_SECONDS, wait_until

ROOT = Path(__file__).parents[2]

# A network of a few thousand parameters: its steps take milliseconds
CHECKED_SHAPE = [
    "--hidden-size=32",
    "--num-hidden-layers=2",
    "--num-attention-heads=4",
    "--num-key-value-heads=2",
    "--intermediate-size=64",
    "--vocab-size=512",
    "--seq-len=32",
    "--batch-size=4",
    "--grad-accum-steps=1",
    "--max-steps=12",
    "--validation-tokens=512",
    "--learning-rate=1e-2",
    "--sample-tokens=8",
]
SMALL_SHAPE = [*CHECKED_SHAPE, "--skip-preflight"]
"""For tests of other things, because the pre-flight takes some seconds."""


def started(
    command: list[str], environment: dict[str, str], folder: Path = ROOT
) -> "subprocess.Popen[str]":
    """Start a program in `folder`; its standard output also has its error output."""
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@dataclass
class Flow:
    """`python flows/pretrain.py`, or another `program` in `folder`, with its own cache."""

    cache: Path
    environment: dict[str, str]
    program: tuple[str, ...] = (sys.executable, "flows/pretrain.py")
    folder_of_program: Path = ROOT

    def start(self, *flags: str) -> "subprocess.Popen[str]":
        command = [*self.program, "--cache-dir", str(self.cache), *flags]
        return started(command, self.environment, self.folder_of_program)

    def run(self, *flags: str, expect: int = 0) -> str:
        """Run the flow, which must end with exit code `expect`, and return its output."""
        process = self.start(*flags)
        output, _ = process.communicate(timeout=HANG_SECONDS)
        assert process.returncode == expect, output
        return output

    def folder(self, name: str) -> Path:
        return self.cache / "runs" / name

    def report(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder(name) / "report.json").read_text())

    def metrics(self, name: str) -> list[dict[str, Any]]:
        lines = (self.folder(name) / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def wait_for_step(self, name: str, step: int, process: "subprocess.Popen[str]") -> None:
        """Wait until the training of run `name` has logged `step`."""
        path = self.folder(name) / "events.jsonl"
        while process.poll() is None:
            if path.exists() and any(s >= step for s in logged_steps(path.read_text())):
                return
            time.sleep(0.02)
        pytest.fail(f"ended before step {step}:\n{process.communicate()[0]}")


class Ui:
    """`zeroflow ui` on free ports, with its own Prefect database in the cache."""

    def __init__(
        self,
        cache: Path,
        environment: dict[str, str],
        program: tuple[str, ...] = (sys.executable, "-m", "zeroflow.cli"),
        folder: Path = ROOT,
    ) -> None:
        self.cache, self.program, self.folder = cache, program, folder
        self.ports = {"prefect": free_port(), "mlflow": free_port()}
        self.prefect, self.mlflow = (f"http://127.0.0.1:{port}" for port in self.ports.values())
        self.environment = environment | {"PREFECT_HOME": str(cache / "prefect")}

    @property
    def command(self) -> list[str]:
        flags = [f"--{name}-port={port}" for name, port in self.ports.items()]
        return [*self.program, "ui", f"--cache-dir={self.cache}", *flags]

    def start(self) -> str:
        """Start it, and return its output until everything is ready."""
        self.process = started(self.command, self.environment, self.folder)
        assert self.process.stdout is not None
        said = ""
        for line in self.process.stdout:
            said += line
            if "Ctrl-C stops everything" in line:
                [login] = (self.cache / "prefect" / "zeroflow").glob("login-*")
                LOGINS[f"{self.prefect}/api"] = self.login = login.read_text().strip()
                headers.cache_clear()  # it may have been started before
                return said
        pytest.fail(f"it ended:\n{said}")

    def programs(self) -> list[psutil.Process]:
        """All programs that it has started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self, *, expect: int) -> str:
        """End it, check that no program is left, and return the rest of its output."""
        programs = self.programs()
        output, _ = self.process.communicate(timeout=HANG_SECONDS)
        assert self.process.returncode == expect, output
        _, left = psutil.wait_procs(programs, timeout=HANG_SECONDS)
        assert not left
        return output


def logged_steps(events: str) -> list[int]:
    return [int(found) for found in re.findall(r'"step": (\d+),[^}\n]*"loss":', events)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_healthy(url: str, server: "subprocess.Popen[bytes]") -> None:
    def answers() -> bool:
        assert server.poll() is None, "the Prefect server ended"
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return True
        except OSError:
            return False

    wait_until(answers, "an answer of the Prefect server")


LOGINS: dict[str, str] = {}
"""Logins of Prefect's servers, by the address of their API."""


def api(url: str, path: str, *content: Any, method: str = "POST", **fields: Any) -> Any:
    """Return the answer of Prefect's server to a request with `content`, or with `fields`."""
    [body] = content or [fields]
    request = urllib.request.Request(
        f"{url}{path}", json.dumps(body).encode(), headers(url), method=method
    )
    with urllib.request.urlopen(request, timeout=HANG_SECONDS) as response:
        return json.loads(response.read() or "null")


@lru_cache
def headers(url: str) -> dict[str, str]:
    """Headers with the login of a server, and with its token for requests that change something."""
    asked = {"Content-Type": "application/json"}
    if (login := LOGINS.get(url)) is None:
        return asked
    asked["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
    token = urllib.request.Request(f"{url}/csrf-token?client=tests", headers=asked)
    with urllib.request.urlopen(token, timeout=HANG_SECONDS) as response:
        asked["Prefect-Csrf-Token"] = json.load(response)["token"]
    return asked | {"Prefect-Csrf-Client": "tests"}


def processes_of(cache: Path) -> list[psutil.Process]:
    """Return the training processes of runs in `cache`."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(cache) in argument for argument in process.cmdline()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def processes_with(variable: str, value: Path) -> list[psutil.Process]:
    """Processes in whose environment `variable` is `value`."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(variable) == str(value):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def rank_of(cache: Path) -> psutil.Process:
    """Return the process that trains, or that waits to train."""
    ranks = [p for p in processes_of(cache) if "zeroflow.training.serving" in p.cmdline()]
    return max(ranks, key=lambda process: process.create_time())


def mlflow_client(flow: Flow) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(f"sqlite:///{flow.cache / 'mlflow' / 'mlflow.db'}")


def mlflow_run(flow: Flow, name: str) -> mlflow.entities.Run:
    facts = json.loads((flow.folder(name) / "mlflow.json").read_text())
    return mlflow_client(flow).get_run(facts["run_id"])
