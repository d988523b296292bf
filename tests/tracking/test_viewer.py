import sys

from zeroflow.run_folder import Cache
from zeroflow.tracking.store import RunIds
from zeroflow.tracking.viewer import links, viewer


def test_links_lead_to_where_the_viewer_was_last_started(monkeypatch, mine, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    RunIds(run_id="r", experiment_id="1", uri="").write(mine.mlflow)
    page = links(mine)["this run"]
    training = "workflowType=machine_learning"
    assert page == f"http://127.0.0.1:5000/#/experiments/1/runs/r?{training}"
    shown = viewer(tmp_path, 5077)
    assert shown.command is not None
    pages = links(mine)
    assert pages["this run"].startswith("http://127.0.0.1:5077/")
    assert pages["loss of all runs"] == shown.charts
    assert shown.runs.startswith("http://127.0.0.1:5077/#/experiments/1/runs?")
    for opened in (*pages.values(), shown.runs):
        assert training in opened, "else MLflow opens its pages about language applications"
    assert all("loss%2Fval_bpb" in opened for opened in (shown.charts, shown.runs))
    (tmp_path / "mlflow" / "address.json").write_text("{")
    assert links(mine)["this run"].startswith("http://127.0.0.1:5000/")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://box:80")
    assert links(mine)["this run"].startswith("http://box:80/#/")


def test_run_that_is_not_in_mlflow_has_no_links(monkeypatch, mine, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    viewer(tmp_path, 5077)
    assert links(mine) == {} and links(Cache(tmp_path).run("other")) == {}


def test_store_of_the_cache_is_shown_on_loopback_and_named_by_environment_only(config, tmp_path):
    shown = viewer(tmp_path, 5077)
    assert shown.command[:4] == [sys.executable, "-m", "mlflow", "server"]
    assert "127.0.0.1" in shown.command and "5077" in shown.command
    assert shown.environment["MLFLOW_BACKEND_STORE_URI"] == config.uri
    assert not any(config.uri in word for word in shown.command), "`ps` would show it"
