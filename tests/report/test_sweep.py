"""A sweep around its runs: their results are compared, and its MLflow run is ended."""

import shutil
from collections.abc import Callable

import pytest
from left import begun, completed, trained
from mlflow.tracking import MlflowClient
from tiny import SHAPE, synthetic_rows

from zeroflow import pipeline
from zeroflow.pipeline import RunCancelled, SweepFailed
from zeroflow.report import sweep as sweep_report
from zeroflow.report.comparison import Comparison
from zeroflow.report.pages import Page
from zeroflow.run_folder import Cache
from zeroflow.settings.run_config import RunConfig
from zeroflow.settings.settle import settle
from zeroflow.settings.sweep import SweepConfig, cells
from zeroflow.stages.view import View
from zeroflow.tracking.config import address
from zeroflow.tracking.store import open_store, run_ids
from zeroflow.training.events import Failed, Stopped
from zeroflow.training.failures import TrainingFailed, TrainingStopped
from zeroflow.training.job import TrainingJob
from zeroflow.training.ownership import ownership

STEPS = 2
LOSSES = (6.0, 5.0, 4.0)


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """MLflow's store before its first run, which takes seconds to make."""
    folder = Cache(tmp_path_factory.mktemp("store")).mlflow
    open_store(folder)
    return folder


@pytest.fixture
def make(tmp_path, monkeypatch, empty_store):
    """A function that makes the settings of a sweep over seeds."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copytree(empty_store, Cache(tmp_path).mlflow)

    def made(*seeds: int) -> SweepConfig:
        given = {
            "device": "cpu",
            "cache_dir": tmp_path,
            "data": {"data_mode": "synthetic"},
            "tokenizer": {"vocab_size": 300},
            "model": SHAPE.model_dump(),
            "training": {"max_steps": STEPS, "seq_len": 32, "batch_size": 1},
        }
        return SweepConfig(sweep_name="s", seeds=seeds, run=given)

    return made


@pytest.fixture
def begin(tmp_path) -> Callable[[RunConfig], TrainingJob]:
    shards, tokenizer = synthetic_rows(tmp_path)
    return lambda cell: begun(cell, shards, tokenizer)


def mlflow_status(sweep: SweepConfig) -> str:
    ids = run_ids(sweep.folder)
    assert ids is not None
    store = address(Cache(sweep.run.cache_dir).mlflow)
    return MlflowClient(store).get_run(ids.run_id).info.status


def statuses(sweep: SweepConfig) -> dict[str, str]:
    found = Comparison.read(sweep.folder.comparison)
    return {one.run.removeprefix("s-custom-"): one.status for one in found.runs}


def test_sweep_compares_every_run_with_a_loss_and_shows_how_each_ended(make, begin, caplog):
    sweep = make(0, 1, 2, 3, 4)

    def run_one(cell: RunConfig) -> None:
        match cell.seed:
            case 0:
                completed(begin(cell), LOSSES)
            case 1:
                trained(begin(cell), LOSSES[:2])
                raise RunCancelled("it was cancelled in Prefect")
            case 2:
                completed(begin(cell), LOSSES, passed=False)
                raise TrainingFailed("the overfit check failed")
            case 3:
                raise ValueError("no such file")
            case 4:
                trained(begin(cell), LOSSES[:2])
                raise TrainingStopped("stopped by SIGTERM")

    failed = "2 runs failed: s-custom-seed2, s-custom-seed3; 1 run stopped early: s-custom-seed4"
    with pytest.raises(RuntimeError, match=failed):
        pipeline.sweep(sweep, run_one)
    assert statuses(sweep) == {
        "seed0": "completed",
        "seed1": "cancelled",
        "seed2": "failed",
        "seed4": "stopped",
    }
    page = sweep.folder.comparison_page.read_text()
    assert "| custom-seed1 | cancelled |" in page
    assert "s-custom-seed3 (failed)" in page and "s-custom-seed1 (cancelled)" in page
    assert mlflow_status(sweep) == "FAILED"
    assert not any("seed1 failed" in message for message in caplog.messages)
    assert any("seed1 was cancelled" in message for message in caplog.messages)


def refuse(cell: RunConfig) -> None:
    raise ValueError("no such file")


def test_sweep_without_a_completed_run_is_compared_and_ended(make, begin):
    sweep = make(0, 1)

    def run_one(cell: RunConfig) -> None:
        trained(begin(cell), LOSSES[:2])
        raise TrainingFailed("out of memory")

    with pytest.raises(RuntimeError, match="2 runs failed"):
        pipeline.sweep(sweep, run_one)
    assert statuses(sweep) == {"seed0": "failed", "seed1": "failed"}
    assert mlflow_status(sweep) == "FAILED"
    assert sweep.folder.loss_plot("tokens").exists()

    nothing = make(7)
    nothing.folder.comparison_page.unlink()
    for folder in Cache(sweep.run.cache_dir).existing_runs():
        folder.settings.unlink(missing_ok=True)
    with pytest.raises(SweepFailed, match="1 run failed") as failure:
        pipeline.sweep(nothing, lambda cell: 1 / 0)
    assert pipeline.may_succeed(failure.value)
    with pytest.raises(SweepFailed) as failure:
        pipeline.sweep(nothing, refuse)
    assert not pipeline.may_succeed(failure.value), "its only run needs other settings"
    assert "s-custom-seed7 (failed)" in nothing.folder.comparison_page.read_text()


def test_sweep_with_a_cancelled_run_has_not_failed(make, begin):
    sweep = make(0, 1)

    def run_one(cell: RunConfig) -> None:
        job = begin(cell)
        if cell.seed:
            trained(job, LOSSES[:2])
            raise RunCancelled
        completed(job, LOSSES)

    page = pipeline.sweep(sweep, run_one)
    assert "s-custom-seed1 (cancelled)" in page.read_text()
    assert mlflow_status(sweep) == "KILLED"

    def resume(cell: RunConfig) -> None:
        assert mlflow_status(sweep) == "RUNNING"
        if cell.seed:
            completed(begin(cell), LOSSES)

    pipeline.sweep(sweep, resume)
    assert mlflow_status(sweep) == "FINISHED"
    assert statuses(sweep) == {"seed0": "completed", "seed1": "completed"}


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_interrupted_sweep_is_compared_so_far_and_ended(make, begin, stop):
    sweep = make(0, 1, 2)

    def run_one(cell: RunConfig) -> None:
        if cell.seed:
            trained(begin(cell), LOSSES[:2], Stopped(message="stopped"))
            raise stop
        completed(begin(cell), LOSSES)

    shown: list[str] = []

    class Shown(View):
        def page(self, page: Page, subject: str) -> None:
            shown.append(subject)

    with pytest.raises(stop):
        pipeline.sweep(sweep, run_one, view=Shown())
    assert shown == ["comparison"], "also in Prefect"
    assert statuses(sweep) == {"seed0": "completed", "seed1": "cancelled"}
    assert "s-custom-seed2 (without a loss)" in sweep.folder.comparison_page.read_text()
    assert mlflow_status(sweep) == "KILLED"


def test_comparison_that_fails_leaves_no_sweep_running(make, begin):
    sweep = make(0)

    def run_one(cell: RunConfig) -> None:
        completed(begin(cell), LOSSES)
        sweep.folder.loss_plot("flops").mkdir()

    with pytest.raises(OSError, match=r"loss-by-flops\.png"):
        pipeline.sweep(sweep, run_one)
    assert mlflow_status(sweep) == "FAILED"


def test_runs_of_an_earlier_command_stay_in_the_comparison(make, begin):
    """Also one that another process is working on; a damaged one is left out."""
    earlier = make(0, 1, 2, 3)
    for cell in cells(earlier):
        trained(begin(cell), LOSSES[:2], *failures(cell))
    completed(begin(cells(earlier)[1]), LOSSES)
    cut = cells(earlier)[3].folder.metrics
    cut.write_text("{}\n" + cut.read_text())
    added = make(4)
    added.folder.path.mkdir(parents=True)
    with ownership() as acquire:
        acquire(cells(earlier)[2].run_dir)
        sweep_report.compare(added, {})
    found = Comparison.read(added.folder.comparison)
    assert {one.run: one.status for one in found.runs} == {
        "s-custom-seed0": "failed",
        "s-custom-seed1": "completed",
        "s-custom-seed2": "running",
    }
    [completed_one] = [one for one in found.runs if one.status == "completed"]
    assert completed_one.curve == ((0, 6.0), (512, 5.0), (1024, 4.0)), "each step once"
    assert completed_one.tokens_per_second == 256.0, "the 512 tokens of a step in 2 s"


def failures(cell: RunConfig) -> list[Failed]:
    return [] if cell.seed else [Failed(message="out of memory", reason="out of memory")]


def test_report_of_a_run_that_was_extended_since_is_not_its_outcome(make, begin):
    [cell] = cells(make(0))
    completed(begin(cell), LOSSES)
    assert sweep_report.finished(cell)
    longer = cell.training.model_copy(update={"max_steps": 9})
    begin(cell.model_copy(update={"training": longer}))
    assert not sweep_report.finished(cell)


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
    with pytest.raises(ValueError, match="s-tiny of sweep s was trained with"):
        sweep_report.require_as_started(
            SweepConfig(sweep_name="s", sizes=("small", "tiny"), run=other)
        )
