import logging
import shlex
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from logged import step_record, validation_record
from mlflow_runs import HARD, begun, client, the_run
from mlflow_server import Server
from patience import wait_until

from zeroflow.run_folder import RunFolder
from zeroflow.tracking import store, tracker
from zeroflow.tracking.config import TrackingConfig, database, location
from zeroflow.tracking.delivery import Delivery
from zeroflow.tracking.store import run_ids
from zeroflow.tracking.viewer import links
from zeroflow.training.metrics import METRICS, StepRecord, follow_points, points
from zeroflow.training.recovery import LEDGER, Entry

BEGAN = 1_700_000_000.0


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[Server]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    server = Server(tmp_path / HARD)
    try:
        yield server
    finally:
        server.kill()


def logged(step: int, **values: float | None) -> StepRecord:
    """A step that is trained again has another time and the same loss."""
    again = {"tokens": 128 * step, "time": BEGAN + step}
    return step_record(step, 5.0 - step / 10, **again | values)


def record(folder: RunFolder, steps: range, **values: float | None) -> None:
    for step in steps:
        METRICS.append(folder.metrics, logged(step, **values))


def validate(folder: RunFolder, steps: range, loss: float) -> None:
    for step in steps:
        METRICS.append(folder.metrics, validation_record(step, loss, time=BEGAN + 100))


def follow(config: TrackingConfig, folder: RunFolder, *files: Path) -> Delivery:
    return tracker.follow(config, folder, partial(follow_points, folder.metrics), files)


def finish(config: TrackingConfig, folder: RunFolder, *, succeeded: bool, files=()) -> str | None:
    ending = tracker.RunEnd(
        files=files,
        pages={"page.html": "<p>loss</p>"},
        series={"overfit/loss": [3.0, 2.0, 1.0]},
        succeeded=succeeded,
    )
    return tracker.finish(config, folder, points(METRICS.read(folder.metrics)), ending)


def history(config: TrackingConfig, folder: RunFolder, key: str) -> list[tuple[int, float]]:
    """Step and value of every point, in the order of their times."""
    run = the_run(config, folder)
    found = client(config).get_metric_history(run.info.run_id, key)
    return [(point.step, point.value) for point in found]


def arrived(config: TrackingConfig, folder: RunFolder) -> int:
    return len(history(config, folder, "loss/train")) if run_ids(folder) else 0


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def losses(*steps: int) -> list[tuple[int, float]]:
    return [(step, 5.0 - step / 10) for step in steps]


def assert_serves_only_its_own_pages(server: Server) -> None:
    """And shows nobody the address of its store."""
    asked = "/ajax-api/2.0/mlflow/experiments/get?experiment_id=1"
    changed = "/api/2.0/mlflow/runs/create"
    assert server.status("GET", asked) == 200
    assert server.status("GET", asked, Host="localhost:7000") == 200, "through a tunnel"
    assert server.status("GET", asked, Host="evil.example") == 403
    assert server.status("GET", asked, Host="192.168.0.7") == 403
    assert server.status("POST", changed, Origin="http://evil.example") == 403
    assert server.status("POST", changed) == 400, "as it names no experiment"
    assert "mlflow" in server.command_line() and "sqlite" not in server.command_line()


@contextmanager
def no_connection_of_this_thread() -> Iterator[None]:
    here, connect = threading.current_thread(), socket.socket.connect

    def watched(self: socket.socket, address: Any) -> None:
        assert threading.current_thread() is not here, f"waits for {address}"
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", watched)
        yield


def test_resumed_run_is_one_run_with_every_step_once(config, mine, tmp_path):
    record(mine, range(1, 4), mfu=None)
    follow(config, mine).close("KILLED")
    first = run_ids(mine)
    assert the_run(config, mine).info.status == "KILLED"

    # the killed process was ahead of its checkpoint, and its steps come again later
    METRICS.keep(mine.metrics, lambda record: record.step <= 1)
    delivery = follow(config, mine)
    wait_until(lambda: the_run(config, mine).info.status == "RUNNING")
    record(mine, range(2, 6), time=BEGAN + 100)
    validate(mine, range(2, 6), 2.0)
    delivery.close("FINISHED")

    assert run_ids(mine) == first
    run = the_run(config, mine)
    assert history(config, mine, "loss/train") == losses(1, 2, 3, 4, 5)
    by_tokens = [(128 * step, loss) for step, loss in losses(1, 2, 3, 4, 5)]
    assert history(config, mine, "loss/train_by_tokens") == by_tokens
    assert history(config, mine, "loss/val") == [(step, 2.0) for step in (2, 3, 4, 5)]
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
    recovery = Entry(
        time=BEGAN, process=1, reason="out of memory", step=3, message="", action="halved"
    )
    for _ in range(2):
        LEDGER.append(mine.ledger, recovery)
        done = finish(config, mine, succeeded=False, files=[attached])
        assert done == run.info.run_id
    assert sorted(history(config, mine, "overfit/loss")) == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert history(config, mine, "loss/train") == losses(1, 2, 3, 4, 5)
    assert the_run(config, mine).info.status == "FAILED"
    assert the_run(config, mine).data.tags["recoveries"] == "2"
    files = [file.path for file in client(config).list_artifacts(done)]
    assert sorted(files) == ["ledger.jsonl", "page.html", "report.md"]
    assert (config.folder / "artifacts").exists()


def test_files_are_attached_during_training_and_updated(config, mine):
    def attached(name: str) -> str | None:
        run = the_run(config, mine).info if run_ids(mine) else None
        if run is None or name not in {
            file.path for file in client(config).list_artifacts(run.run_id)
        }:
            return None
        return Path(client(config).download_artifacts(run.run_id, name)).read_text()

    mine.settings.write_text("{}")
    delivery = follow(config, mine, mine.settings, mine.loss_plot)
    wait_until(lambda: attached("run.json") == "{}")
    assert attached("loss.png") is None
    for drawn in ("first", "second, and longer"):
        mine.loss_plot.write_text(drawn)
        wait_until(lambda drawn=drawn: attached("loss.png") == drawn)
    assert the_run(config, mine).info.status == "RUNNING"
    delivery.close("FINISHED")


def test_server_that_was_lost_gets_everything_when_it_is_back(
    config, mine, server, caplog, capsys, tmp_path, monkeypatch
):
    """While the server is unreachable, one run continues and another ends."""
    caplog.set_level("INFO", logger="zeroflow.tracking")

    def told(words: str) -> int:
        return sum(words in message for message in caplog.messages)

    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    uri, folder = location(tmp_path)
    assert (uri, folder) == (server.uri.replace("me:s3cret", "***"), None)
    remote = config.replace(uri=uri, folder=folder)
    ended = begun(tmp_path, "ended")
    assert database(tmp_path / HARD / "mlflow").exists() and not Path("file:").exists()
    server.start()
    assert_serves_only_its_own_pages(server)
    going, ending = follow(remote, mine), follow(remote, ended)
    record(mine, range(1, 4))
    record(ended, range(1, 3))
    wait_until(lambda: arrived(remote, mine) == 3 and arrived(remote, ended) == 2)

    server.kill()
    with no_connection_of_this_thread():
        record(mine, range(4, 8))
        record(ended, range(3, 6))
    # a server that is busy may have made them wait before
    wait_until(lambda: told("failed; training continues") == 2 + told("is back and has all"))
    came_back = told("is back and has all")
    with no_connection_of_this_thread():
        ending.close("FINISHED")
        late = follow(remote, ended)
        late.close("FINISHED")
    assert told("did not accept the last metrics") == 2
    assert finish(remote, ended, succeeded=True) is None

    server.start()
    wait_until(lambda: told("is back and has all") > came_back)
    assert history(remote, mine, "loss/train") == losses(*range(1, 8)), "during the run"
    record(mine, range(8, 10))
    going.close("FINISHED")
    assert history(remote, mine, "loss/train") == losses(*range(1, 10))
    assert the_run(remote, mine).info.status == "FINISHED"

    assert the_run(remote, ended).info.status == "RUNNING", "as nobody could tell it"
    assert finish(remote, ended, succeeded=True) == the_run(remote, ended).info.run_id
    assert history(remote, ended, "loss/train") == losses(*range(1, 6)), "by the next finish"
    assert the_run(remote, ended).info.status == "FINISHED"

    # the password in its address is nowhere
    assert not any("s3cret" in message for message in caplog.messages)
    assert capsys.readouterr() == ("", "")
    assert "s3cret" not in str(links(mine)) and "***" not in str(links(mine))
    kept = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(kept) > 4 and not any(b"s3cret" in content for content in kept)


def test_points_whose_response_was_lost_appear_once(config, mine):
    """Two writers that both believe nothing has arrived."""
    first, second = (tracker.MlflowRun(config, mine) for _ in range(2))
    records = [logged(step) for step in range(1, 1200)]  # several batches
    first.send(points(records[:700]))
    second.send(points(records))
    assert history(config, mine, "loss/train") == losses(*range(1, 1200))
    assert len(history(config, mine, "loss/train_by_tokens")) == 1199


def test_steps_of_less_than_a_gflop_are_one_point(config, mine):
    records = [logged(step, flops=step * 4 * 10**8) for step in range(1, 9)]
    for some in (records[:3], records[2:]):
        tracker.MlflowRun(config, mine).send(points(some))
    found = client(config).get_metric_history(
        the_run(config, mine).info.run_id, "loss/train_by_gflops"
    )
    assert [point.step for point in found] == [0, 1, 2, 3]


def test_truncated_record_of_the_run_does_no_harm(config, mine):
    record(mine, range(1, 4))
    mine.mlflow.write_text('{"run_id": "')
    assert finish(config, mine, succeeded=True)
    assert history(config, mine, "loss/train") == losses(1, 2, 3)


def test_store_that_cannot_be_written_is_a_warning_only(config, mine, caplog):
    blocked = mine.path / "a file"
    blocked.write_text("where a folder should be")
    dead = config.replace(folder=blocked / "mlflow")
    record(mine, range(1, 2))
    follow(dead, mine).close("FINISHED")
    assert finish(dead, mine, succeeded=True) is None
    for words in ("failed; training continues", "could not be added"):
        assert sum(words in message for message in warnings(caplog)) == 1, words
    assert len(warnings(caplog)) == 2
    assert run_ids(mine) is None

    # and the same command, once it can be written
    assert finish(config, mine, succeeded=True) is not None
    assert history(config, mine, "loss/train") == losses(1)


def test_store_that_is_not_a_database_fails_immediately(config, mine, caplog, monkeypatch):
    from mlflow.store.db import utils

    tries: list[str] = []
    create = utils.create_sqlalchemy_engine
    monkeypatch.setattr(
        utils, "create_sqlalchemy_engine", lambda uri: tries.append(uri) or create(uri)
    )
    database(config.folder).write_text("not a database" * 100)
    assert finish(config, mine, succeeded=True) is None
    assert len(tries) < 5, "MLflow's own ten take minutes"
    [told] = warnings(caplog)
    assert "could not be added to MLflow" in told and told.endswith("file is not a database")


def test_server_that_does_not_answer_times_out(config, mine, caplog, monkeypatch):
    monkeypatch.setattr(store, "OPEN_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert finish(config.replace(uri=uri, folder=None), mine, succeeded=True) is None
    [told] = warnings(caplog)
    assert told.endswith("no answer within 0.2 s")


def test_experiment_that_was_deleted_is_restored_by_the_command_that_is_named(config, mine, caplog):
    record(mine, range(1, 4))
    run = finish(config, mine, succeeded=True)
    client(config).delete_experiment("1")
    assert finish(config, mine, succeeded=True) is None
    [told] = warnings(caplog)
    assert "experiment zeroflow is deleted" in told
    variable, *command = shlex.split(told.rpartition("restores it: ")[2])
    assert command == ["mlflow", "experiments", "restore", "--experiment-id", "1"]
    name, _, uri = variable.partition("=")
    assert name == "MLFLOW_TRACKING_URI"
    client(config.replace(uri=uri)).restore_experiment(command[-1])
    assert finish(config, mine, succeeded=True) == run
