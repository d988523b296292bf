"""A run that is killed, interrupted or orphaned resumes and ends like an undisturbed one."""

import importlib.util
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from endings import assert_same_end, wait_until_gone
from event_files import curves
from patience import HANG_SECONDS
from pipeline import (
    ROOT,
    SMALL_SHAPE,
    Flow,
    api,
    mlflow_client,
    mlflow_run,
    processes_of,
    rank_of,
)

from zeroflow import RunConfig, pretrain
from zeroflow.run_folder import RunFolder
from zeroflow.training import checkpoint, goodput, recovery
from zeroflow.training.failures import RunIsBusy
from zeroflow.training.job import TrainingJob

STEPS = 800  # enough that none is at its end when it is stopped
# The last flag of a name counts
RUN = [*SMALL_SHAPE, "--data-mode=synthetic", f"--max-steps={STEPS}", "--log-interval=10"]
RUN += ["--checkpoint-every=100", "--validate-every=150", "--skip-preflight"]

HAS_TENSORBOARD = importlib.util.find_spec("tensorboard") is not None
RUN += ["--log-to=tensorboard"] if HAS_TENSORBOARD else []


def test_run_stopped_in_every_way_ends_with_the_bits_of_an_undisturbed_run(
    flow: Flow, tmp_path: Path
) -> None:
    kill_the_training_and_then_the_flow(flow)
    process = start_and_wait(flow, step=310)
    refuse_a_second_run_of_the_name(flow)
    terminate(flow, process)
    assert_shown_as_cancelled(flow)
    assert "resumed at step" in flow.run("--run-name=run", *RUN)
    assert_same_end(flow.folder("run"), trained_undisturbed(flow, tmp_path / "undisturbed"))
    assert_time_is_accounted_for(flow)
    assert_one_mlflow_run_has_every_line_once(flow)
    if HAS_TENSORBOARD:
        assert_event_file_has_every_line_once(flow)


def trained_undisturbed(flow: Flow, folder: Path) -> Path:
    """The directory of the same training, that nobody stops."""
    job = TrainingJob.read(flow.folder("run") / "job.json")
    other = job.replace(run_dir=folder, tracking=job.tracking.replace(run_name="undisturbed"))
    other.write(other.folder.job)
    command = [sys.executable, "-m", "zeroflow.training", str(other.folder.job)]
    ended = subprocess.run(command, cwd=ROOT, env=flow.environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return folder


def kill_the_training_and_then_the_flow(flow: Flow) -> None:
    process = start_and_wait(flow, step=130)
    rank_of(flow.cache).kill()
    flow.wait_for_step("run", 230, process)
    [entry] = recovery.read(RunFolder(flow.folder("run")))
    assert (entry.reason, entry.step) == ("killed", 100), "the last regular checkpoint"
    process.kill()
    output, _ = process.communicate()
    assert "training failed (killed)" in output and "resumes from step 100" in output
    wait_until_gone(flow.cache)
    assert newest_step(flow) % 100, "the orphan saved and ended by itself"


def start_and_wait(flow: Flow, *, step: int) -> "subprocess.Popen[str]":
    process = flow.start("--run-name=run", *RUN)
    flow.wait_for_step("run", step, process)
    return process


def records_of(flow: Flow) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in flow.folder("run").glob("*.json*")}


def refuse_a_second_run_of_the_name(flow: Flow) -> None:
    rank = rank_of(flow.cache)
    rank.suspend()  # or it would be at its end by then
    before = records_of(flow)
    asked = RunConfig(run_name="run", cache_dir=flow.cache, training={"log_interval": 7})
    with pytest.raises(RunIsBusy, match="another process is working on run run"):
        pretrain(asked)
    assert records_of(flow) == before
    rank.resume()


def terminate(flow: Flow, process: "subprocess.Popen[str]") -> None:
    reached = max(line["step"] for line in flow.metrics("run"))
    process.terminate()
    output, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 143, output
    assert "the same command resumes" in output and "Traceback" not in output
    assert processes_of(flow.cache) == []
    assert newest_step(flow) >= reached


def assert_shown_as_cancelled(flow: Flow) -> None:
    """In Prefect, with the step that was saved, and nothing that looks like a crash."""
    url = flow.environment["PREFECT_API_URL"]
    runs = api(url, "/flow_runs/filter", sort="START_TIME_DESC")
    run = next(run for run in runs if run["name"].endswith(" · run"))
    message = f"Stopped by a signal: saved at step {newest_step(flow)}; the same command resumes"
    assert run["state_type"] == "CANCELLED", run["state"]
    assert run["state"]["message"].startswith(message)
    lines = api(url, "/logs/filter", logs={"flow_run_id": {"any_": [run["id"]]}})
    assert [line["message"] for line in lines if line["level"] >= logging.ERROR] == []


def assert_time_is_accounted_for(flow: Flow) -> None:
    account = goodput.read(RunFolder(flow.folder("run")))
    assert account.restarts == 1, "of four processes one was killed; the orphan ended in order"
    assert account.steps_again >= 30, "from step 130, or later, back to 100"
    report = flow.report("run")
    rate = report["tokens"] / report["steps"] * account.steps / account.training
    assert report["tokens_per_second"] == pytest.approx(rate)
    assert report["steps"] - 5 <= account.steps < report["steps"], "a first step a process"


def newest_step(flow: Flow) -> int:
    newest = checkpoint.latest(flow.folder("run") / "checkpoints")
    assert newest is not None
    return checkpoint.step_of(newest)


def assert_one_mlflow_run_has_every_line_once(flow: Flow) -> None:
    client, run = mlflow_client(flow), mlflow_run(flow, "run")
    runs = client.search_runs([run.info.experiment_id])
    assert [found.info.run_name for found in runs] == ["run"]
    assert run.info.status == "FINISHED"
    curves = {"loss/train": "loss", "loss/val": "val_loss", "optim/grad_norm": "grad_norm"}
    for key, field in curves.items():
        lines = [(line["step"], line[field]) for line in flow.metrics("run") if field in line]
        points = client.get_metric_history(run.info.run_id, key)
        assert sorted((point.step, point.value) for point in points) == lines, key


def assert_event_file_has_every_line_once(flow: Flow) -> None:
    found = curves(flow.folder("run"))
    for key, field in (("loss/train", "loss"), ("loss/val", "val_loss")):
        lines = [(line["step"], line[field]) for line in flow.metrics("run") if field in line]
        # TensorBoard keeps 32 bits of a value
        assert found[key] == [(step, pytest.approx(value, rel=1e-6)) for step, value in lines]
