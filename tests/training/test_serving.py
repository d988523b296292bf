"""The process of a rank that works on the jobs of a run, one after another."""

import json
import os
from pathlib import Path
from typing import Any

import leaving
import psutil
import pytest
from patience import wait_until
from tiny import MODEL, synthetic_rows, training_config, training_job, with_workload

from zeroflow.checks import overfit, preflight
from zeroflow.checks.overfit import OverfitConfig, OverfitJob
from zeroflow.training import checkpoint, tracked
from zeroflow.training.environment import Place
from zeroflow.training.failures import TrainingFailed
from zeroflow.training.job import RankJob, TrainingJob
from zeroflow.training.launch import launch
from zeroflow.training.metrics import METRICS
from zeroflow.training.processes import kept_ranks


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RankJob:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "helpers"), prepend=os.pathsep)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    given = RankJob(run_dir=tmp_path, training=training_config())
    given.write(tmp_path / "job.json")
    return given


def work_on(job: RankJob, fate: str = "none") -> dict[str, Any]:
    """Run the job, and return what its rank saw."""
    (job.run_dir / "fate").write_text(fate)
    try:
        launch("leaving", job.run_dir / "job.json", lambda event: None)
    finally:
        lines = (job.run_dir / leaving.SEEN).read_text().splitlines()
        seen: dict[str, Any] = json.loads(lines[-1])
    return seen


def test_jobs_have_one_process_that_is_as_new_for_each_until_it_is_killed(job: RankJob) -> None:
    with kept_ranks():
        first, second = work_on(job), work_on(job)
        with pytest.raises(TrainingFailed) as failure:
            work_on(job, "killed")
        assert failure.value.reason == "killed"
        third = work_on(job)
    assert second == first | {"peak": second["peak"]}
    assert first["collects"] and not first["deterministic"]
    assert second["peak"] < first["peak"] + 200, "of 600 MB that the first job took"
    assert third["pid"] != first["pid"]
    assert not any(map(psutil.pid_exists, (first["pid"], third["pid"])))


def test_process_that_waits_is_replaced_if_it_dies_and_is_not_kept_after_a_failure(
    job: RankJob,
) -> None:
    with kept_ranks() as ranks:
        ranks.start([Place(0, 1, None)], job.run_dir, "leaving")
        [early] = [p for p in psutil.Process().children() if str(job.run_dir) in p.cmdline()]
        early.kill()
        wait_until(lambda: early.status() == psutil.STATUS_ZOMBIE)
        with pytest.raises(TrainingFailed) as failure:
            work_on(job, "out of memory")
        assert failure.value.reason == "out of memory"
        assert not [p for p in psutil.Process().children() if str(job.run_dir) in p.cmdline()]


def bits(job: TrainingJob) -> tuple[list[float], dict[str, str]]:
    """The losses and the digests of the last checkpoint."""
    newest = checkpoint.latest(job.folder.checkpoints)
    assert newest is not None
    records = METRICS.read(job.folder.metrics)
    return [getattr(r, "loss", None) or r.val_loss for r in records], checkpoint.digests(newest)


def test_training_after_a_preflight_in_the_same_process_has_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shards, tokenizer = synthetic_rows(tmp_path)
    model = MODEL.model_copy(update={"vocab_size": 300})
    config = with_workload(training_config(), model=model)
    alone, after = (
        training_job(tmp_path / name, shards, tokenizer, config).replace(validation_rows=1)
        for name in ("alone", "after")
    )
    tracked.train(alone)
    with kept_ranks():
        assert preflight.check(after) is not None
        tracked.train(after)
        limits = OverfitConfig()
        overfit.check(
            OverfitJob(run_dir=after.run_dir, training=config, shards=shards, limits=limits)
        )
    assert bits(after) == bits(alone)
