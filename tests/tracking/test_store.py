import shutil
from pathlib import Path

import pytest
from mlflow_runs import HARD, begun, client, the_run
from pipeline import free_port

from zeroflow.run_folder import Cache
from zeroflow.tracking.config import TrackingConfig, database, location
from zeroflow.tracking.store import existing, forget, open_run, open_store, run_ids


def test_runs_that_begin_at_once_share_the_experiment(config, mine, monkeypatch, tmp_path):
    from mlflow.tracking import MlflowClient

    _, first = open_run(config, mine)
    look, answers = MlflowClient.get_experiment_by_name, iter([None])  # the other is not there yet
    monkeypatch.setattr(
        MlflowClient,
        "get_experiment_by_name",
        lambda self, name: next(answers, look(self, name)),
    )
    other = begun(tmp_path, "other")
    _, second = open_run(config, other)
    runs = [the_run(config, folder).info for folder in (mine, other)]
    assert [run.run_id for run in runs] == [first, second]
    assert runs[0].experiment_id == runs[1].experiment_id


def test_new_run_is_created_only_if_the_store_has_none(config, mine):
    from mlflow.exceptions import MlflowException

    _, run = open_run(config, mine)
    away = config.replace(uri=f"http://127.0.0.1:{free_port()}", folder=None)
    with pytest.raises(MlflowException, match="refused"):
        existing(client(away), run)
    assert open_run(config, mine)[1] == run
    client(config).delete_run(run)
    _, anew = open_run(config, mine)
    assert anew != run and run_ids(mine).run_id == anew
    forget(mine)
    assert run_ids(mine) is None and open_run(config, mine)[1] not in (run, anew)


def test_artifacts_follow_a_cache_that_moves(config, tmp_path):
    from mlflow.tracking._tracking_service import utils

    def attach(cache: Path, name: str) -> TrackingConfig:
        uri, folder = location(cache)
        moved = config.replace(uri=uri, folder=folder)
        file = tmp_path / name
        file.write_text("content")
        store, run_id = open_run(moved, Cache(cache).run("mine"))
        store.log_artifact(run_id, file)
        return moved

    old, new = tmp_path / HARD / "old", tmp_path / HARD / "new"
    begun(old, "mine")
    (old / "mlflow").mkdir()
    shutil.copy(database(config.folder), database(old / "mlflow"))
    attach(old, "before.txt")
    old.rename(new)
    utils._artifact_repos_cache.clear()  # as in the process of the next command
    moved = attach(new, "after.txt")
    assert not old.exists()
    folder = new / "mlflow" / "artifacts"
    assert {file.name for file in folder.rglob("*.txt")} == {"before.txt", "after.txt"}
    run = the_run(moved, Cache(new).run("mine")).info
    shown = client(moved).list_artifacts(run.run_id)
    assert {file.path for file in shown} == {"before.txt", "after.txt"}


def test_store_is_in_the_cache_unless_a_server_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri, folder = location(tmp_path)
    assert folder == tmp_path / "mlflow" and uri == f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    assert run_ids(Cache(tmp_path).run("mine")) is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert location(tmp_path) == ("http://127.0.0.1:5000", None)
    assert not list(tmp_path.iterdir())


def test_only_this_user_can_read_a_new_database(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    _, folder = location(tmp_path)
    open_store(folder)
    assert {file.stat().st_mode & 0o077 for file in folder.glob("mlflow.db*")} == {0}


def test_consecutive_runs_have_different_colours(config, tmp_path):
    colours = []
    for number in range(11):
        other = begun(tmp_path, f"run-{number}")
        open_run(config, other)
        colours.append(the_run(config, other).data.tags["mlflow.runColor"])
        group = begun(tmp_path, f"group-{number}")  # has no curve that would need one
        open_run(config.replace(dataset=None), group)
        assert "mlflow.runColor" not in the_run(config, group).data.tags
    assert len({*colours[:10]}) == 10 and colours[10] == colours[0]


def test_run_that_was_extended_has_its_new_tags_and_its_first_params(config, mine):
    _, run = open_run(config, mine)
    longer = config.replace(tags={"size": "tiny", "max_steps": "9"}, params={"seed": "8"})
    assert open_run(longer, mine)[1] == run
    data = the_run(config, mine).data
    assert data.tags["max_steps"] == "9" and data.params["seed"] == "7"
    assert len(data.params["long"]) == 6000, "the longest that MLflow takes"
    [dataset] = the_run(config, mine).inputs.dataset_inputs
    assert dataset.dataset.digest == "abc"
