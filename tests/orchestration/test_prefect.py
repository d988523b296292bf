"""Prefect's buttons, and the loss of its server, with real servers and a real worker."""

import argparse
import json
import shlex
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
from patience import HANG_SECONDS, wait_until
from pipeline import (
    LOGINS,
    ROOT,
    SMALL_SHAPE,
    Flow,
    api,
    free_port,
    headers,
    logged_steps,
    processes_of,
    rank_of,
    started,
    wait_until_healthy,
)
from prefect.settings import get_current_settings, temporary_settings

from zeroflow.cli import arguments
from zeroflow.config import Config
from zeroflow.orchestration.access import Api
from zeroflow.orchestration.deployments import SILENCE, WORK_POOL, set_up
from zeroflow.settings.run_config import RunConfig
from zeroflow.settings.sweep import SweepConfig
from zeroflow.training import checkpoint

# The last flag of a name counts
pytestmark = pytest.mark.slow

RUN = [*SMALL_SHAPE, "--data-mode=synthetic", "--max-steps=600", "--log-interval=10"]
RUN += ["--checkpoint-every=100", "--validate-every=150"]
ENDLESS = [*RUN, "--max-steps=100000", "--checkpoint-every=100000", "--validate-every=100000"]


LOGIN = "team:s3cret"


class Server:
    """A Prefect server of the user's own, as the docs say how to protect it.

    It has a database of its own, and can be killed and started again.
    """

    def __init__(self, home: Path, environment: dict[str, str]) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}/api"
        LOGINS[self.url] = LOGIN
        self.environment = environment | {
            "PREFECT_HOME": str(home),
            "PREFECT_API_URL": self.url,
            "PREFECT_API_AUTH_STRING": LOGIN,
            "PREFECT_SERVER_API_PORT": str(port),
            "PREFECT_SERVER_API_AUTH_STRING": LOGIN,
            "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        }

    def start(self) -> None:
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1"]
        self.process = subprocess.Popen(
            command,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until_healthy(self.url, self.process)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def command(self, *arguments: str) -> str:
        ended = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    def deploy(self, *flags: str) -> None:
        """Have a worker run what the command line with `flags` would."""
        self._deploy("custom", "run", RunConfig, flags)

    def deploy_sweep(self, *flags: str) -> None:
        self._deploy("sizes", "sweep", SweepConfig, flags)

    def _deploy(
        self, deployment: str, name: str, config: type[Config], flags: tuple[str, ...]
    ) -> None:
        parser = argparse.ArgumentParser()
        arguments.add_settings(parser, config, name)
        given = arguments.read_settings(config, parser.parse_args(flags))
        asked = config.model_validate(given).model_dump(mode="json", exclude_unset=True)
        [found] = api(self.url, "/deployments/filter", deployments={"name": {"any_": [deployment]}})
        path = f"/deployments/{found['id']}/create_flow_run"
        api(self.url, path, parameters={name: asked})

    def run_named(self, name: str) -> dict[str, Any]:
        """The one flow run of the zeroflow run `name`."""
        found = api(self.url, "/flow_runs/filter")
        [run] = [run for run in found if run["parameters"].get("run", {}).get("run_name") == name]
        return run

    def sweep_named(self, name: str) -> dict[str, Any]:
        """The one flow run of the sweep `name`."""
        found = api(self.url, "/flow_runs/filter")
        [run] = [run for run in found if run["name"] == f"sweep · {name}"]
        return run

    def children_of(self, sweep: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """The flow runs below that of a sweep, by the names of the task runs they hang on."""
        tasks = api(self.url, "/task_runs/filter", flow_runs={"id": {"any_": [sweep["id"]]}})
        names = {task["id"]: task["name"] for task in tasks}
        below = {"parent_flow_run_id": {"any_": [sweep["id"]]}}
        runs = api(self.url, "/flow_runs/filter", flow_runs=below)
        return {names[run["parent_task_run_id"]]: run for run in runs}

    def press(self, button: str, run: dict[str, Any]) -> None:
        """Set the state that the UI sets for its buttons Cancel and Retry."""
        state = {
            "cancel": {"type": "CANCELLING", "name": "Cancelling"},
            "retry": {"type": "SCHEDULED", "name": "AwaitingRetry"},
        }[button]
        api(self.url, f"/flow_runs/{run['id']}/set_state", state=state)

    def wait_for(self, name: str, state: str) -> None:
        wait_until(lambda: self.run_named(name)["state_type"] == state)

    def states_of(self, name: str) -> list[str]:
        query = f"flow_run_id={self.run_named(name)['id']}"
        asked = urllib.request.Request(
            f"{self.url}/flow_run_states/?{query}", headers=headers(self.url)
        )
        with urllib.request.urlopen(asked) as answer:
            states = json.load(answer)
        return [state["name"] for state in sorted(states, key=lambda state: state["timestamp"])]

    def log_of(self, name: str) -> str:
        of_run = {"flow_run_id": {"any_": [self.run_named(name)["id"]]}}
        return "\n".join(line["message"] for line in api(self.url, "/logs/filter", logs=of_run))


def newest_step(flow: Flow, name: str) -> int:
    newest = checkpoint.latest(flow.folder(name) / "checkpoints")
    assert newest is not None
    return checkpoint.step_of(newest)


@contextmanager
def running(server: Server) -> Iterator[Server]:
    server.start()
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, base_environment: dict[str, str]
) -> Iterator[Server]:
    """A server made ready as the README says, with no worker yet."""
    with running(Server(tmp_path_factory.mktemp("prefect"), base_environment)) as server:
        for _ in range(2):
            server.command("zeroflow.cli", "prefect-setup")
        server.command("prefect", "deploy", "--all")
        yield server


@pytest.fixture(scope="module")
def worker(server: Server) -> Iterator[psutil.Process]:
    command = [sys.executable, "-m", "prefect", "worker", "start", "--limit=1", "--pool"]
    process = subprocess.Popen(
        [*command, WORK_POOL],
        env=server.environment | {"PREFECT_WORKER_QUERY_SECONDS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(HANG_SECONDS)


@pytest.fixture
def flow(tmp_path: Path, server: Server) -> Flow:
    return Flow(tmp_path / "cache", server.environment)


def test_setting_up_twice_leaves_one_pool_and_one_automation(server: Server) -> None:
    pools = api(server.url, "/work_pools/filter")
    assert [(pool["name"], pool["type"]) for pool in pools] == [("zeroflow", "process")]
    [automation] = api(server.url, "/automations/filter")
    assert automation["enabled"] and automation["trigger"]["within"] == 15 * 60


def kill_until_given_up(flow: Flow, process: "subprocess.Popen[str]") -> None:
    """Kill the rank, and those that are started in its place before they get anywhere."""
    killed: set[int] = set()
    while process.poll() is None and len(killed) < 3:
        with suppress(ValueError):  # there is none at the moment
            rank = rank_of(flow.cache)
            if rank.pid not in killed:
                rank.kill()
                killed.add(rank.pid)
        time.sleep(0.1)


def test_failed_run_of_the_shell_is_retried_by_a_worker_as_the_same_run(
    flow: Flow, server: Server, worker: psutil.Process
) -> None:
    process = flow.start("--run-name=run", *RUN)
    flow.wait_for_step("run", 130, process)
    kill_until_given_up(flow, process)
    output, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 1
    assert "retry: the button on the flow run's page in Prefect" in output
    assert f"retry: {shlex.join(map(str, process.args))}" in output
    failed = server.run_named("run")
    assert failed["state_type"] == "FAILED" and failed["name"] == "custom · synthetic · run"

    server.press("retry", server.run_named("run"))
    server.wait_for("run", "COMPLETED")
    retried = server.run_named("run")
    assert (retried["id"], retried["run_count"]) == (failed["id"], 2)
    assert "resumed at step 100" in server.log_of("run")
    assert "run run is complete" in flow.run("--run-name=run", *RUN)

    client = mlflow.MlflowClient(f"sqlite:///{flow.cache / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("zeroflow")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    steps = [p.step for p in client.get_metric_history(run.info.run_id, "loss/train")]
    assert len(set(steps)) == len(steps), "no step twice"
    assert {*range(110, 601, 10)} <= {*steps}, "all since the checkpoint"


def swept(server: Server, name: str, state: str) -> dict[str, Any]:
    """The flow run of sweep `name`, once it is in `state`."""

    def there() -> bool:
        found = api(server.url, "/flow_runs/filter")
        return any(run["name"] == f"sweep · {name}" and run["state_type"] == state for run in found)

    wait_until(there)
    return server.sweep_named(name)


def test_failed_run_of_a_sweep_is_retried_alone_by_a_worker(
    flow: Flow, server: Server, worker: psutil.Process
) -> None:
    flags = [f"--cache-dir={flow.cache}", "--sweep-name=alone", *RUN, "--seeds", "0", "1"]
    process = started([sys.executable, "flows/sweep.py", *flags], flow.environment)
    flow.wait_for_step("alone-custom-seed0", 130, process)
    kill_until_given_up(flow, process)
    output, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 1, output
    assert output.count("retry: the button on the flow run's page") == 2, "the run's, the sweep's"
    sweep = server.sweep_named("alone")
    assert sweep["state_type"] == "FAILED" and sweep["deployment_id"]
    children = server.children_of(sweep)
    failed, other = children["alone-custom-seed0"], children["alone-custom-seed1"]
    assert (failed["state_type"], other["state_type"]) == ("FAILED", "COMPLETED")
    assert failed["deployment_id"] and failed["deployment_id"] == other["deployment_id"]
    assert server.log_of("alone-custom-seed1").count("training the model: ") == 1

    server.press("retry", failed)
    server.wait_for("alone-custom-seed0", "COMPLETED")
    assert "resumed at step 100" in server.log_of("alone-custom-seed0")
    children = server.children_of(sweep)
    retried = children["alone-custom-seed0"]
    assert (retried["id"], retried["run_count"]) == (failed["id"], 2)
    assert retried["parent_task_run_id"] == failed["parent_task_run_id"]

    wait_until(lambda: not worker.children())
    server.press("retry", sweep)
    retried_sweep = swept(server, "alone", "COMPLETED")
    assert (retried_sweep["id"], retried_sweep["run_count"]) == (sweep["id"], 2)
    assert {
        name: (run["id"], run["run_count"]) for name, run in server.children_of(sweep).items()
    } == {name: (run["id"], run["run_count"]) for name, run in children.items()}
    page = (flow.cache / "sweeps" / "alone" / "comparison.md").read_text()
    assert "Not completed" not in page
    assert all(f"| custom-seed{seed} | " in page for seed in (0, 1))


def test_sweep_of_a_worker_runs_its_children_and_its_retry_the_failed_ones(
    flow: Flow, server: Server, worker: psutil.Process
) -> None:
    """The worker runs one thing at a time: it would never come to what waits for it."""
    blocked = flow.folder("there-custom-seed1")
    blocked.parent.mkdir(parents=True)
    blocked.write_text("")
    server.deploy_sweep(
        f"--cache-dir={flow.cache}", "--sweep-name=there", *RUN, "--seeds", "0", "1"
    )
    sweep = swept(server, "there", "FAILED")
    before = server.children_of(sweep)
    states = {name: run["state_type"] for name, run in before.items()}
    assert states == {"there-custom-seed0": "COMPLETED", "there-custom-seed1": "FAILED"}
    assert before["there-custom-seed1"]["name"] == "custom · synthetic · there-custom-seed1"

    blocked.unlink()
    # a worker with a limit ends if the process before is still there: "already holding one of"
    wait_until(lambda: not worker.children())
    server.press("retry", sweep)
    sweep = swept(server, "there", "COMPLETED")
    after = server.children_of(sweep)
    assert {name: run["id"] for name, run in after.items()} == {
        name: run["id"] for name, run in before.items()
    }
    assert {name: (run["state_type"], run["run_count"]) for name, run in after.items()} == {
        "there-custom-seed0": ("COMPLETED", 1),
        "there-custom-seed1": ("COMPLETED", 2),
    }


def test_cancelled_run_of_a_sweep_ends_alone(flow: Flow, server: Server) -> None:
    flags = [f"--cache-dir={flow.cache}", "--sweep-name=off", *ENDLESS, "--seeds", "0", "1"]
    process = started([sys.executable, "flows/sweep.py", *flags], flow.environment)
    for name in ("off-custom-seed0", "off-custom-seed1"):
        flow.wait_for_step(name, 10, process)
        server.press("cancel", server.run_named(name))
    output, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 0, output  # a cancelled run is not a failed one
    assert "run off-custom-seed0 was cancelled; the same command resumes it" in output
    assert "Not completed: off-custom-seed0 (cancelled), off-custom-seed1 (cancelled)" in output
    for name in ("off-custom-seed0", "off-custom-seed1"):
        assert server.states_of(name)[-2:] == ["Cancelling", "Cancelled"]
        assert newest_step(flow, name) >= 10


def test_run_of_the_shell_is_cancelled_with_a_checkpoint(
    flow: Flow, server: Server, worker: psutil.Process
) -> None:
    process = flow.start("--run-name=here", *ENDLESS)
    flow.wait_for_step("here", 10, process)
    server.press("cancel", server.run_named("here"))
    output, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 143, output
    assert "stopped; finished work is kept, and the same command resumes" in output
    assert "Traceback" not in output
    assert server.states_of("here")[-2:] == ["Cancelling", "Cancelled"], "and no Crashed"
    saved = f"saved at step {newest_step(flow, 'here'):,}; the same command resumes from there"
    assert saved in server.run_named("here")["state"]["message"]
    assert saved in server.log_of("here") and "Crash" not in server.log_of("here")
    assert newest_step(flow, "here") >= 10
    assert processes_of(flow.cache) == []


def test_run_of_a_worker_is_cancelled_with_a_checkpoint(
    flow: Flow, server: Server, worker: psutil.Process
) -> None:
    server.deploy("--run-name=there", *ENDLESS, f"--cache-dir={flow.cache}")
    events = flow.folder("there") / "events.jsonl"
    wait_until(lambda: events.exists() and max(logged_steps(events.read_text()), default=0) >= 10)
    server.press("cancel", server.run_named("there"))
    server.wait_for("there", "CANCELLED")
    wait_until(lambda: not processes_of(flow.cache))
    assert "Crashed" not in server.states_of("there")
    assert newest_step(flow, "there") >= 10
    kept = f"saved at step {newest_step(flow, 'there'):,}; Retry"
    wait_until(lambda: kept in server.log_of("there"))  # lines are sent after the state
    assert "Crash" not in server.log_of("there") and "Traceback" not in server.log_of("there")


def test_killed_run_is_marked_as_crashed_when_its_heartbeats_stop(
    flow: Flow, server: Server
) -> None:
    with temporary_settings(Api(server.url, LOGIN).settings):
        set_up(silence=timedelta(seconds=60))  # on a slow machine, to step 10
    try:
        process = flow.start("--run-name=killed", *ENDLESS)
        flow.wait_for_step("killed", 10, process)
        assert server.run_named("killed")["state_type"] == "RUNNING"
        process.kill()
        process.communicate()
        server.wait_for("killed", "CRASHED")
        wait_until(lambda: not processes_of(flow.cache))
    finally:
        server.command("zeroflow.cli", "prefect-setup")


def test_several_heartbeats_fit_into_the_time_after_which_a_run_is_crashed() -> None:
    every = get_current_settings().flows.heartbeat_frequency
    assert every is not None
    assert timedelta(seconds=every) * 5 <= SILENCE


def test_run_survives_a_lost_server_and_reports_when_it_is_back(
    tmp_path: Path, base_environment: dict[str, str]
) -> None:
    server = Server(tmp_path / "prefect", base_environment)
    flow = Flow(tmp_path / "cache", server.environment)
    with running(server):
        process = flow.start("--run-name=back", *RUN)
        flow.wait_for_step("back", 10, process)
        server.kill()
        server.start()
        assert process.wait(HANG_SECONDS) == 0
        assert server.run_named("back")["state_type"] == "COMPLETED"

        process = flow.start("--run-name=lost", *RUN)
        flow.wait_for_step("lost", 10, process)
        server.kill()
        output, _ = process.communicate(timeout=HANG_SECONDS)
        assert process.returncode == 0, output
        assert "cannot report to Prefect how the run ended" in output
        assert "run lost is complete" in output and "Traceback" not in output
        assert flow.report("lost")["steps"] == 600
        steps = [line["step"] for line in flow.metrics("lost") if "loss" in line]
        assert steps == [1, *range(10, 601, 10)]
