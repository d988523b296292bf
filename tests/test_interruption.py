"""A run that is killed, interrupted or orphaned goes on as if nothing had happened."""

import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import SMALL_SHAPE, Flow, processes_of

from zeroflow.training import checkpoint

STEPS = 600
# The last flag of a name counts
RUN = [*SMALL_SHAPE, "--data-mode=synthetic", f"--max-steps={STEPS}", "--log-interval=10"]
RUN += ["--checkpoint-every=100", "--validate-every=150"]


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, base_environment: dict[str, str], prefect_api: str
) -> Flow:
    flow = Flow(
        tmp_path_factory.mktemp("undisturbed") / "cache",
        base_environment | {"PREFECT_API_URL": prefect_api},
    )
    flow.run("--run-name=run", *RUN)
    return flow


def test_killed_training_resumes_to_the_same_bits(undisturbed: Flow, flow: Flow) -> None:
    """SIGKILL of the training process, then the same command."""
    process = flow.start("--run-name=run", *RUN)
    flow.wait_for_step("run", 240, process)
    worker = youngest_training(flow.cache)
    worker.send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "killed, or out of memory" in output and "\nTraceback" not in output

    again = flow.run("--run-name=run", *RUN)
    assert "resumed at step" in again
    assert_same_end(flow, undisturbed)


def test_killed_flow_leaves_no_process_and_resumes_to_the_same_bits(
    undisturbed: Flow, flow: Flow
) -> None:
    """SIGKILL of the flow: the training notices, saves and ends by itself."""
    process = flow.start("--run-name=run", *RUN)
    flow.wait_for_step("run", 130, process)
    process.kill()
    process.communicate()
    wait_until_gone(flow.cache)
    saved = checkpoint.latest(flow.folder("run") / "checkpoints")
    assert saved is not None and checkpoint.step_of(saved) % 100, "not one of the regular ones"

    flow.run("--run-name=run", *RUN)
    assert_same_end(flow, undisturbed)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_flow_saves_and_leaves_nothing_running(
    undisturbed: Flow, flow: Flow, number: signal.Signals, code: int
) -> None:
    process = flow.start("--run-name=run", *RUN)
    flow.wait_for_step("run", 130, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert "the same command goes on" in output
    assert processes_of(flow.cache) == []
    assert checkpoint.latest(flow.folder("run") / "checkpoints") is not None

    flow.run("--run-name=run", *RUN)
    assert_same_end(flow, undisturbed)


def test_flow_without_a_server_starts_one_and_stops_it(
    tmp_path: Path, base_environment: dict[str, str]
) -> None:
    home = tmp_path / "prefect"
    flow = Flow(tmp_path / "cache", base_environment | {"PREFECT_HOME": str(home)})
    output = flow.run("--run-name=alone", "--data-mode=synthetic", *SMALL_SHAPE)
    assert "starting a Prefect server for this run" in output
    assert servers_of(home) == []
    assert (home / "prefect.db").exists()


def assert_same_end(flow: Flow, other: Flow) -> None:
    ours, theirs = (f.folder("run") / "checkpoints" / f"step-{STEPS:08d}" for f in (flow, other))
    mine, undisturbed = read_tensors(ours), read_tensors(theirs)
    assert mine.keys() == undisturbed.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, undisturbed[name]), name
    keys = ("step", "tokens", "loss", "grad_norm", "lr", "val_loss", "sample")
    lines, expected = (
        [{key: line.get(key) for key in keys} for line in f.metrics("run")] for f in (flow, other)
    )
    assert lines == expected, "every logged number, each once"
    report = ("val_loss", "overfit", "train_loss", "sample")
    assert {k: flow.report("run")[k] for k in report} == {
        k: other.report("run")[k] for k in report
    }


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by PyTorch's own converter."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    target = path.parent / "all.pt"
    dcp_to_torch_save(path, target)
    tensors = torch.load(target, weights_only=True)
    target.unlink()
    return tensors


def youngest_training(cache: Path) -> psutil.Process:
    """The rank that trains, not torchrun above it."""
    ranks = [p for p in processes_of(cache) if "zeroflow.training" in p.cmdline()]
    ranks = [p for p in ranks if not any("torch.distributed.run" in a for a in p.cmdline())]
    return max(ranks, key=lambda process: process.create_time())


def wait_until_gone(cache: Path) -> None:
    for _ in range(600):
        if not processes_of(cache):
            return
        time.sleep(0.1)
    pytest.fail(f"still running: {processes_of(cache)}")


def servers_of(home: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("PREFECT_HOME") == str(home):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found
