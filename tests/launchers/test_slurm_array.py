"""The runs of a sweep as a job array; the slow tests run it on a real Slurm of two nodes."""

import _thread
import subprocess
import threading
from pathlib import Path

import pytest
from endings import assert_same_end
from patience import wait_until
from tiny import SHAPE

from zeroflow import artifacts, pipeline
from zeroflow.launchers.slurm_array import script
from zeroflow.report.comparison import Comparison
from zeroflow.run_folder import ArrayFolder
from zeroflow.settings.run_config import RunConfig
from zeroflow.settings.sweep import SweepConfig, cells
from zeroflow.training.events import EVENTS, Metrics, Started, Stopped

STEPS = 300


def sweep(cache: Path, **settings) -> SweepConfig:
    """A sweep over three seeds, of which two fit in the cluster at once."""
    run = RunConfig(
        cache_dir=cache,
        device="cpu",
        data={"data_mode": "synthetic"},
        skip_preflight=True,
        model=SHAPE.model_dump(),
        tokenizer={"vocab_size": 512},
        training={
            "seq_len": 32,
            "batch_size": 4,
            "grad_accum_steps": 1,
            "max_steps": STEPS,
            "log_interval": 1,
            "checkpoint_every": 50,
            "validation_tokens": 512,
            "sample_tokens": 8,
        },
        **settings,
    )
    return SweepConfig(sweep_name="s", seeds=(0, 1, 2), run=run)


OPTIONS = "--partition=low --exclusive"


def in_array(cache: Path) -> SweepConfig:
    return sweep(cache, hosts={"launcher": "slurm", "sbatch_options": OPTIONS})


def test_script_has_a_task_for_each_run(tmp_path: Path):
    text = script(ArrayFolder(tmp_path / "a b" / "array"), ["s-1", "s-2"], ["--partition=gpu"])
    options = [line.removeprefix("#SBATCH ") for line in text.splitlines() if "#SBATCH" in line]
    assert {"--array=0-1", "--nodes=1", "--requeue"} < set(options)
    assert options[-1] == "--partition=gpu"
    assert "runs=(s-1 s-2)" in text
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_runs_of_an_array_are_those_of_the_same_sweep_without_slurm(tmp_path: Path):
    assert cells(in_array(tmp_path)) == cells(sweep(tmp_path))
    of_two = sweep(tmp_path, hosts={"launcher": "slurm"}).run.training.replace(nodes=2)
    on_two = in_array(tmp_path).run.replace(training=of_two)
    [first, *_] = cells(SweepConfig(seeds=(0, 1), run=on_two))
    assert first.hosts.launcher == "slurm", "a job for each run"


def states() -> list[str]:
    words = ["squeue", "--noheader", "--array", "--format=%T"]
    return subprocess.check_output(words, text=True).split()


def reached(cell: RunConfig, step: int) -> bool:
    events = EVENTS.read(cell.folder.events) if cell.folder.events.exists() else []
    return any(isinstance(event, Metrics) and event.step >= step for event in events)


@pytest.mark.slow
def test_preempted_runs_of_an_array_end_with_the_bits_of_undisturbed_ones(tmp_path, cluster):
    asked = in_array(tmp_path / "cache")
    first = cells(asked)[0]

    def preempt() -> None:
        wait_until(lambda: reached(first, 60), "step 60")
        words = ["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null"]
        subprocess.run(["sbatch", *words, "--wrap=sleep 5"], check=True)

    threading.Thread(target=preempt).start()
    page = pipeline.sweep(asked)
    assert page.name == "comparison.md"
    compared = Comparison.read(asked.folder.comparison).runs
    completed = {cell.run_name: "completed" for cell in cells(asked)}
    assert {one.run: one.status for one in compared} == completed
    events = [e for e in EVENTS.read(first.folder.events) if isinstance(e, Started | Stopped)]
    _, stopped, again = events
    assert isinstance(stopped, Stopped) and 60 <= stopped.step == again.step < STEPS
    assert not states()

    alone = cells(sweep(tmp_path / "alone"))[0]
    pipeline.pretrain(alone)
    assert_same_end(first.run_dir, alone.run_dir)


@pytest.mark.slow
def test_interrupted_sweep_stops_its_array_and_the_same_command_resumes_it(tmp_path, cluster):
    asked = in_array(tmp_path / "cache")

    def interrupt() -> None:
        wait_until(lambda: any(reached(cell, 60) for cell in cells(asked)), "step 60")
        _thread.interrupt_main()

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        pipeline.sweep(asked)
    assert not states()
    statuses = {one.status for one in Comparison.read(asked.folder.comparison).runs}
    assert statuses <= {"stopped", "completed"} and "stopped" in statuses

    pipeline.sweep(asked)
    compared = Comparison.read(asked.folder.comparison).runs
    assert [one.status for one in compared] == ["completed"] * 3


@pytest.mark.slow
def test_run_that_fails_does_not_stop_the_others_of_its_array(tmp_path, cluster):
    """A file lies where one of its runs would be."""
    asked = in_array(tmp_path / "cache")
    blocked = cells(asked)[1]
    blocked.run_dir.parent.mkdir(parents=True)
    blocked.run_dir.write_text("")
    with pytest.raises(RuntimeError, match=f"1 run failed: {blocked.run_name}"):
        pipeline.sweep(asked)
    assert "error: " in asked.folder.array.log(str(blocked.run_name)).read_text()
    assert len(Comparison.read(asked.folder.comparison).runs) == 2
    settings = artifacts.read_json(asked.folder.array.settings(str(blocked.run_name)))
    assert RunConfig.model_validate(settings) == blocked
