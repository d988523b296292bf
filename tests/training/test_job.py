"""Whether a training lives is told by changes, not by times: the clock may be set meanwhile."""

import logging
import os
import py_compile
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import format1
import pytest
from tiny import synthetic_rows, training_config, training_job

from zeroflow import artifacts
from zeroflow.training import launch as launch_module
from zeroflow.training import zero
from zeroflow.training.job import (
    RunIsBusy,
    TrainingFailed,
    TrainingJob,
    TrainResult,
    finished,
    why_trained,
)
from zeroflow.training.launch import _environment, _pass_on, _SignsOfLife, launch, ownership
from zeroflow.training.workload import Workload


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that have passed, by the clock that nobody can set."""
    seconds = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: seconds[0])
    return seconds


@pytest.mark.parametrize("days", [0, 1000, -1000])
def test_file_that_is_touched_is_a_sign_of_life_whatever_the_clock_says(tmp_path, passed, days):
    alive = tmp_path / "alive"
    signs = _SignsOfLife(alive)
    for number in range(3):
        passed[0] += 50
        assert signs.seconds_since_last() == 50
        touch(alive, time.time() + 86_400 * days * number)
        assert signs.seconds_since_last() == 0


@pytest.mark.parametrize("days", [0, 1000, -1000])
def test_file_that_is_not_touched_is_none(tmp_path, passed, days):
    alive = tmp_path / "alive"
    touch(alive, time.time() + 86_400 * days)
    signs = _SignsOfLife(alive)
    assert signs.seconds_since_last() == 0
    passed[0] += 500
    assert signs.seconds_since_last() == 500


def touch(file: Path, when: float) -> None:
    file.touch()
    os.utime(file, (when, when))


def test_compiled_code_is_kept_with_the_cache_unless_the_user_says_where(monkeypatch):
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    environment = _environment(Path("cache/compile"))
    assert environment["TRITON_CACHE_DIR"] == str(Path("cache/compile/triton"))
    assert environment["TORCHINDUCTOR_CACHE_DIR"] == "mine"
    assert "TRITON_CACHE_DIR" not in _environment(None)


def test_bytecode_is_kept_where_the_interpreter_keeps_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)
    source = tmp_path / "torch.py"
    source.write_text("")
    monkeypatch.setattr(launch_module.torch, "__file__", str(source))
    environment = _environment(tmp_path / "compile")
    command = [sys.executable, "-c", "import torch"]
    environment["PYTHONPATH"] = str(tmp_path)
    subprocess.run(command, env=environment, cwd=tmp_path, check=True)
    assert list((tmp_path / "compile" / "python").rglob("torch.*.pyc"))

    py_compile.compile(str(source))
    environment = _environment(tmp_path / "compile")
    assert "PYTHONPYCACHEPREFIX" not in environment
    assert environment["PYTHONDONTWRITEBYTECODE"] == "1"


SAYS = """
import logging, sys
from zeroflow.training import worker
worker._log_to_parent(rank=int(sys.argv[1]))
for level in ("info", "warning", "error"):
    getattr(logging.getLogger("zeroflow.some"), level)(level)
print("printed")
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_says_what_goes_on_and_others_what_goes_wrong(rank, caplog):
    caplog.set_level(logging.DEBUG, logger="zeroflow")
    child = subprocess.Popen(
        [sys.executable, "-c", SAYS, str(rank)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    _pass_on(child, deque())
    child.wait()
    heard = [(record.levelname, record.getMessage()) for record in caplog.records]
    if rank:
        wrong = [("WARNING", "rank 1: warning"), ("ERROR", "rank 1: error")]
    else:
        wrong = [("INFO", "info"), ("WARNING", "warning"), ("ERROR", "error")]
    assert [line for line in heard if line[0] != "DEBUG"] == wrong
    assert ("DEBUG", "printed") in heard


def test_child_is_alone_whatever_a_launcher_has_told_the_flow(monkeypatch):
    told = {"RANK": "3", "WORLD_SIZE": "4"}
    for name, number in told.items():
        monkeypatch.setenv(name, number)
    environment = _environment(None) | zero.environment(0, 1, Path("meeting"))
    assert (environment["RANK"], environment["WORLD_SIZE"]) == ("0", "1")


@pytest.mark.parametrize(
    ("visible", "seen"),
    [(None, ["0", "1"]), ("5,3", ["5", "3"]), ("GPU-a, GPU-b,GPU-c", ["GPU-a", "GPU-b"])],
)
def test_each_rank_sees_a_gpu_of_its_own_among_those_that_the_user_lets_be_seen(
    visible, seen, monkeypatch
):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    told = [zero.environment(rank, 2, Path("meeting")) for rank in range(2)]
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in told] == seen


def test_job_of_format_1_is_read():
    job = TrainingJob.model_validate(format1.JOB)
    expected = Workload.model_validate(format1.WORKLOAD)
    assert job.training.workload == expected and job.model == expected.model
    assert (job.training.seed, job.training.steps, job.training.z_loss) == (0, 60, 0.0)
    assert TrainingJob.model_validate_json(job.model_dump_json()) == job
    more = format1.JOB["training"] | {"optimizer": {"beta2": 0.99}, "ranks": 2}
    other = TrainingJob.model_validate(format1.JOB | {"training": more}).training.workload
    assert (other.optimizer.beta2, other.ranks) == (0.99, 2)


def test_training_that_goes_on_says_from_where_and_why(tmp_path):
    rows, tokens = synthetic_rows(tmp_path)
    training = training_config(steps=6)
    planned = training_job(tmp_path / "run", rows, tokens, training)

    def why() -> str:
        assert finished(planned) is None
        return why_trained(planned, lambda: "no other run is like it")

    assert why() == "no other run is like it"
    artifacts.write_json(planned.folder.job, {})
    assert why() == "it was started before, and ended without a checkpoint"
    checkpoints = planned.folder.checkpoints
    (checkpoints / "step-00000004").mkdir(parents=True)
    newest = "its newest checkpoint is of step 4 of 6"
    assert why() == f"it was not trained to its end: {newest}"
    artifacts.write_json(planned.folder.training, result(checkpoints, 4))
    assert why() == f"it was trained to step 4, and more are asked for: {newest}"
    artifacts.write_json(planned.folder.training, result(checkpoints, 6))
    assert why() == f"step-00000006 is gone: {newest}"
    (checkpoints / "step-00000004").rename(checkpoints / "step-00000006")
    assert finished(planned) is not None


def result(checkpoints: Path, steps: int) -> dict[str, object]:
    """What a training of so many steps leaves."""
    losses = dict.fromkeys(("train_loss", "val_loss", "first_val_loss", "tokens_per_second"), 1.0)
    return TrainResult(
        checkpoint=checkpoints / f"step-{steps:08d}",
        steps=steps,
        tokens=64 * steps,
        **losses,
        val_bpb=None,
        mfu=None,
        peak_memory_bytes=0,
        sample="",
    ).model_dump(mode="json")


def test_process_that_ends_on_a_full_disk_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(launch_module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    with pytest.raises(TrainingFailed, match=r"the disk of .* has 0 bytes left") as failure:
        launch("no_such_module", tmp_path / "job.json", lambda event: None)
    assert failure.value.reason == "error"


def test_directory_is_owned_by_one_until_its_block_ends(tmp_path):
    with ownership() as acquire, ownership() as other:
        acquire(tmp_path / "run")
        acquire(tmp_path / "run")
        with pytest.raises(RunIsBusy, match="another process is at work on run run"):
            other(tmp_path / "run")
        other(tmp_path / "another")
    with ownership() as acquire:
        acquire(tmp_path / "run")


def test_peak_memory_is_of_the_process_itself_not_of_the_one_that_started_it():
    held = b"x" * 2**30  # getrusage of a child begins with what its parent holds
    code = (
        "from types import SimpleNamespace as N; from zeroflow.training import metrics;"
        "job = N(training=N(workload=N(device='cpu'))); print(metrics.peak_memory_bytes(job))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert 2**27 < int(printed) < len(held), "PyTorch alone takes 200 MiB"
