"""The proof that resume is exact, as a user runs it."""

import json
import subprocess
import sys

import mlflow
import pytest
from patience import HANG_SECONDS
from pipeline import CHECKED_SHAPE, ROOT, Flow, api

from zeroflow import artifacts
from zeroflow.settings.proof import settings
from zeroflow.settings.run_config import RunConfig

RUN = ["--run-name=mine", *CHECKED_SHAPE, "--data-mode=synthetic", "--max-steps=30", "--kills=2"]
RUN += ["--kill-seed=2"]  # while it starts up and while it validates


@pytest.mark.slow
def test_flow_proves_resume_and_shows_it_everywhere(flow: Flow, prefect_api: str) -> None:
    command = [sys.executable, "flows/prove_resume.py", f"--cache-dir={flow.cache}", *RUN]
    ended = subprocess.run(
        command,
        cwd=ROOT,
        env=flow.environment,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = artifacts.read_json(flow.folder("mine") / "proof.json")
    assert found["passed"] and found["difference"] is None
    assert found["sha256"]["undisturbed"] == found["sha256"]["killed"]
    assert found["numbers"] == 2 * 30 + 1 + 6, "validated before the first step and 6 times"
    assert {kill["aimed_at"] for kill in found["kills"]} >= {"start-up"}
    page = (flow.folder("mine") / "proof.md").read_text()
    assert "ended with the same bits" in ended.stdout and "**passed**" in page

    [artifact] = api(prefect_api, "/artifacts/filter", artifacts={"key": {"any_": ["proof-mine"]}})
    assert "**passed**" in artifact["data"] and "data:image/png;base64" in artifact["data"]
    client = mlflow.MlflowClient(f"sqlite:///{flow.cache / 'mlflow' / 'mlflow.db'}")
    facts = json.loads((flow.folder("mine") / "mlflow.json").read_text())
    run = client.get_run(facts["run_id"])
    assert run.info.status == "FINISHED" and run.data.tags["proof"] == "passed"
    assert run.data.tags["kills"] == str(len(found["kills"]))
    files = {file.path for file in client.list_artifacts(facts["run_id"])}
    assert files == {"proof.html", "proof.png", "proof.json"}


def test_open_settings_become_small_and_given_ones_are_kept() -> None:
    small = settings(RunConfig(device="cpu"))
    assert small.data.data_mode == "synthetic" and small.model.hidden_size == 64
    assert small.run_name == settings(RunConfig(device="cpu")).run_name
    given = RunConfig(
        device="cpu",
        model={"size": "tiny"},
        data={"data_mode": "sample"},
        training={"max_steps": 90, "batch_tokens": 1024, "checkpoint_every": 7},
    )
    run = settings(given)
    assert run.model == given.model and run.data == given.data
    assert run.training.checkpoint_every == 7 and run.training.batch_tokens == 1024
    assert run.training.log_interval == 1 and run.training.validate_every == 15
    assert run.training.seq_len is None, "as a run of that size has it"
    assert run.run_name != small.run_name


def test_settings_that_do_not_apply_to_a_proof_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="no overfit check"):
        settings(RunConfig(overfit={"overfit_steps": 3}))
    with pytest.raises(ValueError, match="no pre-flight"):
        settings(RunConfig(skip_preflight=True))
    with pytest.raises(ValueError, match="no model to register"):
        settings(RunConfig(register_="mine"))
    (tmp_path / "runs" / "mine" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"mine is a training run: .* another --run-name"):
        settings(RunConfig(run_name="mine", cache_dir=tmp_path))
