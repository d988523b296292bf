import json
import re
import shlex
import subprocess
import sys

import mlflow
import pytest
from pipeline import CHECKED_SHAPE, ROOT, SMALL_SHAPE, Flow, api
from pydantic import ValidationError

from zeroflow import artifacts
from zeroflow.report import comparison
from zeroflow.report import sweep as sweep_report
from zeroflow.report.comparison import Outcome
from zeroflow.settings.run_config import RunConfig
from zeroflow.settings.settle import settle
from zeroflow.settings.sweep import SweepConfig, cells
from zeroflow.tracking import tracker


def test_every_combination_is_a_run_with_a_name_that_tells_it():
    sweep = SweepConfig(
        sweep_name="s",
        sizes=("tiny", "small"),
        seeds=(0, 1),
        learning_rates=(1e-3,),
        run={"training": {"max_steps": 7}},
    )
    runs = cells(sweep)
    assert [cell.run_name for cell in runs] == [
        "s-tiny-seed0-lr0.001",
        "s-tiny-seed1-lr0.001",
        "s-small-seed0-lr0.001",
        "s-small-seed1-lr0.001",
    ]
    assert [(cell.model.size, cell.seed) for cell in runs] == [
        ("tiny", 0),
        ("tiny", 1),
        ("small", 0),
        ("small", 1),
    ]
    assert all(cell.sweep == "s" and cell.training.max_steps == 7 for cell in runs)
    assert all(cell.training.learning_rate == 1e-3 for cell in runs)


def test_stages_of_zero_are_varied_like_all_else():
    sweep = SweepConfig(sweep_name="s", zero_stages=(0, 3), run={"training": {"gpus": 2}})
    runs = cells(sweep)
    assert [cell.run_name for cell in runs] == ["s-tiny-zero0", "s-tiny-zero3"]
    assert [cell.training.zero_stage for cell in runs] == [0, 3]
    assert all(cell.training.gpus == 2 for cell in runs)


def test_what_is_not_varied_stays_as_the_run_has_it():
    [cell] = cells(SweepConfig(sweep_name="s", run={"model": {"size": "small"}}))
    assert cell == RunConfig(model={"size": "small"}, sweep="s", run_name="s-small")


def test_sweep_of_the_name_with_other_settings_is_refused_before_anything_is_changed(tmp_path):
    given = {"device": "cpu", "data": {"data_mode": "synthetic"}, "cache_dir": tmp_path}
    first = SweepConfig(sweep_name="s", sizes=("tiny",), run=given)
    [cell] = cells(first)
    run = settle(cell).run
    (run.run_dir / "checkpoints" / "step-00000001").mkdir(parents=True)
    sweep_report.require_as_started(first)
    more = first.model_copy(update={"sizes": ("tiny", "small")})
    sweep_report.require_as_started(more)
    other = {**given, "training": {"learning_rate": 0.5}}
    with pytest.raises(ValueError, match="s-tiny of sweep s was started with"):
        sweep_report.require_as_started(
            SweepConfig(sweep_name="s", sizes=("small", "tiny"), run=other)
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"run": {"run_name": "mine"}}, "drop it"),
        ({"sizes": ["tiny"], "run": {"model": {"size": "small"}}}, "--size"),
        ({"learning_rates": [1e-3], "run": {"training": {"learning_rate": 1}}}, "--learning-rate"),
        ({"seeds": [1, 1]}, "the same twice"),
        ({"zero_stages": [0, 1]}, "--zero-stages needs several GPUs: add --gpus"),
        (
            {"zero_stages": [1], "run": {"training": {"gpus": 2, "zero_stage": 3}}},
            "sets --zero-stage of its runs",
        ),
        ({"sizes": ["huge"]}, "tiny"),
    ],
)
def test_contradictions_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        SweepConfig(**settings)


def test_name_follows_from_what_is_varied():
    one, same, other = (SweepConfig(seeds=seeds) for seeds in ((0, 1), (0, 1), (0, 2)))
    assert one.name == same.name != other.name


def test_runs_of_an_earlier_command_stay_in_the_comparison(tmp_path, monkeypatch):
    for name, sweep in (("s-tiny-seed0", "s"), ("t-tiny-seed0", "t"), ("alone", None)):
        artifacts.write_json(tmp_path / "runs" / name / "run.json", {"sweep": sweep})
    (tmp_path / "runs" / "alone" / "run.json").write_text("{")
    monkeypatch.setattr(comparison, "outcome", lambda cache, name: ended(name))
    monkeypatch.setattr(tracker, "close_group", lambda *told, **more: None)
    added = SweepConfig(sweep_name="s", sizes=("tiny",), seeds=(1,), run={"cache_dir": tmp_path})
    added.folder.path.mkdir(parents=True)
    page = sweep_report.compare(added, failed=[]).read_text()
    assert "2 runs," in page and "| tiny-seed0 |" in page and "| tiny-seed1 |" in page


def ended(name: str) -> Outcome:
    return Outcome(
        run=name,
        size="tiny",
        seed=0,
        learning_rate=1e-3,
        parameters=1000,
        vocabulary=512,
        context=32,
        flops_per_token=6000,
        tokens=100,
        val_loss=5.0,
        val_bpb=None,
        metrics={"loss/val": 5.0},
        tokens_per_second=None,
        seconds=1.0,
        ranks=1,
        zero_stage=0,
        peak_memory_bytes=2**30,
        curve=((0, 6.0), (100, 5.0)),
    )


@pytest.mark.slow
def test_sweep_goes_on_past_a_run_that_fails_and_compares_the_rest(
    flow: Flow, prefect_api: str
) -> None:
    """A file lies where one of its runs would be."""
    blocked = flow.folder("s-custom-seed1")
    blocked.parent.mkdir(parents=True)
    blocked.write_text("")
    command = [sys.executable, "flows/sweep.py", f"--cache-dir={flow.cache}", "--sweep-name=s"]
    command += [*SMALL_SHAPE, "--data-mode=synthetic", "--seeds", "0", "1"]
    ended = subprocess.run(
        command, cwd=ROOT, env=flow.environment, text=True, capture_output=True, timeout=280
    )
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "1 runs failed" in ended.stderr and "s-custom-seed1" in ended.stderr
    [alone] = re.findall(r"retry: (.* flows/pretrain.py .*)", ended.stdout)
    page = (flow.cache / "sweeps" / "s" / "comparison.md").read_text()
    assert "| custom-seed0 | custom | " in page
    assert "**Not finished: s-custom-seed1**" in page
    kept = json.loads((flow.cache / "sweeps" / "s" / "comparison.json").read_text())
    assert [one["run"] for one in kept["runs"]] == ["s-custom-seed0"]

    client = mlflow.MlflowClient(f"sqlite:///{flow.cache / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("zeroflow").experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    group = runs.pop("s")
    assert group.info.status == "FAILED"
    assert set(group.data.metrics) == {"sweep/val_best"}, "none among the curves of its runs"
    assert "comparison.md" in [file.path for file in client.list_artifacts(group.info.run_id)]
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {group.info.run_id}
    assert "loss/val_by_gflops" in runs["s-custom-seed0"].data.metrics

    flows = api(prefect_api, "/flow_runs/filter", flows={"name": {"any_": ["sweep"]}})
    [parent] = [one for one in flows if one["parameters"]["sweep"]["sweep_name"] == "s"]
    children = api(
        prefect_api,
        "/flow_runs/filter",
        flow_runs={"parent_flow_run_id": {"any_": [parent["id"]]}},
    )
    assert sorted(child["state_name"] for child in children) == ["Completed", "Failed"]

    blocked.unlink()
    subprocess.run(shlex.split(alone), cwd=ROOT, env=flow.environment, check=True)
    assert flow.report("s-custom-seed1")["status"] == "completed"


@pytest.mark.slow
def test_stages_of_zero_are_trained_checked_and_compared(flow: Flow) -> None:
    """On two processes that share the CPU, with the pre-flight and the overfit check."""
    command = [sys.executable, "flows/sweep.py", f"--cache-dir={flow.cache}", "--sweep-name=lab"]
    command += [*CHECKED_SHAPE, "--data-mode=synthetic", "--device=cpu", "--gpus=2"]
    command += ["--batch-size=1", "--zero-stages", "0", "3"]
    ended = subprocess.run(
        command, cwd=ROOT, env=flow.environment, text=True, capture_output=True, timeout=400
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "2 processes on one x86_64 CPU" in ended.stdout or "aarch64" in ended.stdout
    assert ", ZeRO stage 3, fp32" in ended.stdout
    names = ("lab-custom-zero0", "lab-custom-zero3")
    reports = [flow.report(name) for name in names]
    assert [report["gpus"] for report in reports] == [2, 2]
    assert [report["zero_stage"] for report in reports] == [0, 3]
    assert all(report["preflight"]["passed"] for report in reports)
    # the same sums but for the order of two ranks' gradients: test_zero has the tolerance
    losses = [report["val_loss"] for report in reports]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    page = (flow.cache / "sweeps" / "lab" / "comparison.md").read_text()
    assert "| custom-zero0 |" in page and "GPUs 2" in page
    assert "ZeRO" in next(line for line in page.splitlines() if line.startswith("| run |"))
