import json
import re
import shlex
import subprocess
import sys

import mlflow
import pytest
from patience import HANG_SECONDS
from pipeline import CHECKED_SHAPE, ROOT, SMALL_SHAPE, Flow, api


@pytest.mark.slow
def test_sweep_continues_after_a_failed_run_and_compares_the_others(
    flow: Flow, prefect_api: str
) -> None:
    """A file lies where one of its runs would be."""
    blocked = flow.folder("s-custom-seed1")
    blocked.parent.mkdir(parents=True)
    blocked.write_text("")
    command = [sys.executable, "flows/sweep.py", f"--cache-dir={flow.cache}", "--sweep-name=s"]
    command += [*SMALL_SHAPE, "--data-mode=synthetic", "--seeds", "0", "1"]
    ended = subprocess.run(
        command,
        cwd=ROOT,
        env=flow.environment,
        text=True,
        capture_output=True,
        timeout=HANG_SECONDS,
    )
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "1 run failed" in ended.stderr and "s-custom-seed1" in ended.stderr
    [alone] = re.findall(r"retry: (zeroflow pretrain .*)", ended.stdout)
    page = (flow.cache / "sweeps" / "s" / "comparison.md").read_text()
    assert "| custom-seed0 | completed | custom | " in page
    assert "**Not completed: s-custom-seed1 (failed)**" in page
    kept = json.loads((flow.cache / "sweeps" / "s" / "comparison.json").read_text())
    assert [one["run"] for one in kept["runs"]] == ["s-custom-seed0"]

    client = mlflow.MlflowClient(f"sqlite:///{flow.cache / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("zeroflow").experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    group = runs.pop("s")
    assert group.info.status == "FAILED"
    assert set(group.data.metrics) == {"sweep/val_best"}, "none among the curves of its runs"
    assert "comparison.html" in [file.path for file in client.list_artifacts(group.info.run_id)]
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
        command,
        cwd=ROOT,
        env=flow.environment,
        text=True,
        capture_output=True,
        timeout=HANG_SECONDS,
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
