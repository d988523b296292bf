import pytest

from zeroflow import tracking
from zeroflow.tracking import Tracker, TrackingConfig


@pytest.fixture
def patient(monkeypatch):
    """Wait for as long as a busy machine needs, and no longer than it must."""
    monkeypatch.setattr(tracking, "_CLOSE_SECONDS", 300.0)
    monkeypatch.setattr(tracking, "_FLUSH_SECONDS", 0.05)


@pytest.fixture
def config(tmp_path, monkeypatch) -> TrackingConfig:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri, folder = tracking.location(tmp_path)
    return TrackingConfig(
        uri=uri,
        folder=folder,
        run_name="mine",
        tags={"size": "tiny"},
        params={"seed": "7", "long": "x" * 9000},
        dataset={"name": "sample", "digest": "abc", "source": "sample@1"},
    )


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    return folder


def client(config: TrackingConfig):
    from mlflow.tracking import MlflowClient

    return MlflowClient(config.uri)


def history(config: TrackingConfig, run_id: str, key: str) -> list[tuple[int, float]]:
    points = client(config).get_metric_history(run_id, key)
    return sorted((point.step, point.value) for point in points)


def test_resumed_run_is_one_run_with_every_step_once(patient, config, run_dir, tmp_path):
    tracker = Tracker(config, run_dir)
    for step in (1, 2, 3):
        tracker.log(step, {"loss/train": 5.0 - step, "perf/mfu": None})
    tracker.close("KILLED")
    first = tracking.run_facts(run_dir)
    assert client(config).get_run(first["run_id"]).info.status == "KILLED"

    tracker = Tracker(config, run_dir)
    for step in (2, 3, 4, 5):  # the killed process was ahead of its checkpoint
        tracker.log(step, {"loss/train": 5.0 - step, "loss/val": float(step)})
    tracker.close("FINISHED")

    assert tracking.run_facts(run_dir) == first
    run = client(config).get_run(first["run_id"])
    expected = [(step, 5.0 - step) for step in (1, 2, 3, 4, 5)]
    assert history(config, first["run_id"], "loss/train") == expected
    assert history(config, first["run_id"], "loss/val") == [(s, float(s)) for s in (2, 3, 4, 5)]
    assert "perf/mfu" not in run.data.metrics
    assert run.info.status == "FINISHED" and run.info.run_name == "mine"
    assert run.data.params["seed"] == "7" and run.data.tags["size"] == "tiny"
    [used] = run.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("sample", "abc")
    [experiment] = [e for e in client(config).search_experiments() if e.name == "zeroflow"]
    assert len(client(config).search_runs([experiment.experiment_id])) == 1

    # the end of the run, told twice as by a flow that runs again
    attached = tmp_path / "report.md"
    attached.write_text("# report")
    for _ in range(2):
        done = tracking.finish(
            config,
            run_dir,
            files=[attached],
            step=5,
            metrics={"overfit/steps": 9},
            series={"overfit/loss": [3.0, 2.0, 1.0]},
            succeeded=False,
        )
        assert done == first["run_id"]
    assert history(config, done, "overfit/loss") == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert history(config, done, "overfit/steps") == [(5, 9.0)]
    assert client(config).get_run(done).info.status == "FAILED"
    assert [file.path for file in client(config).list_artifacts(done)] == ["report.md"]
    assert (config.folder / "artifacts").exists()


def test_store_that_cannot_be_written_is_a_warning_only(patient, config, run_dir, caplog):
    blocked = run_dir / "a file"
    blocked.write_text("where a folder should be")
    dead = config.replace(uri=f"sqlite:///{blocked}/mlflow.db", folder=blocked / "mlflow")
    with caplog.at_level("WARNING", logger="zeroflow.tracking"):
        tracker = Tracker(dead, run_dir)
        tracker.log(1, {"loss/train": 1.0})
        tracker.close("FINISHED")
        finished = tracking.finish(
            dead, run_dir, files=[], step=1, metrics={}, series={}, succeeded=True
        )
    assert finished is None
    assert any("failed, will try again" in message for message in caplog.messages)
    assert any("could not be added to MLflow" in message for message in caplog.messages)
    assert tracking.run_facts(run_dir) is None


def test_store_lies_in_the_cache_unless_a_server_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri, folder = tracking.location(tmp_path)
    assert folder == tmp_path / "mlflow" and uri == f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    assert uri in tracking.ui_command(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert tracking.location(tmp_path) == ("http://127.0.0.1:5000", None)
    assert tracking.ui_command(tmp_path) is None
    assert not list(tmp_path.iterdir())
