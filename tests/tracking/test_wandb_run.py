"""Runs in Weights & Biases, with wandb itself and a server on loopback in place of theirs."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from logged import step_record, validation_record
from wandb_server import WandbServer, wandb_server

from zeroflow.run_folder import RunFolder
from zeroflow.tracking import delivery, others, wandb_run
from zeroflow.tracking.config import TrackingConfig
from zeroflow.training.metrics import METRICS, MetricsRecord, follow_points, points

wandb = pytest.importorskip("wandb")

KEY = "s3cret" + 34 * "0"


@pytest.fixture
def ours(config: TrackingConfig, tmp_path: Path, monkeypatch) -> TrackingConfig:
    """Without an account, as the home has no login."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    params = {"seed": "7", "options": "--token=s3cret"}
    return config.replace(log_to=("wandb",), params=params)


@pytest.fixture
def server(ours: TrackingConfig, monkeypatch) -> Iterator[WandbServer]:
    with wandb_server() as found:
        monkeypatch.setenv("WANDB_BASE_URL", found.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield found
        wandb.teardown()


@pytest.fixture
def away(server: WandbServer, monkeypatch) -> WandbServer:
    """A server for `wandb sync`, which a run without an account does not know."""
    monkeypatch.delenv("WANDB_API_KEY")
    return server


def add(folder: RunFolder, *records: MetricsRecord) -> None:
    for record in records:
        METRICS.append(folder.metrics, record)


def deliver(config: TrackingConfig, folder: RunFolder, status: str = "FINISHED") -> None:
    [following] = others.follow(config, folder, partial(follow_points, folder.metrics))
    following.close(status)


def finish(config: TrackingConfig, folder: RunFolder) -> None:
    others.finish(config, folder, [*points(METRICS.read(folder.metrics))])


def sync(folder: RunFolder, server: WandbServer) -> None:
    """As `wandb sync --sync-all` does it."""
    for found in sorted((folder.path / "wandb").glob("offline-run-*")):
        if list(found.glob("*.synced")):
            continue
        subprocess.run(
            [sys.executable, "-m", "wandb", "sync", str(found)],
            cwd=folder.path,
            env=os.environ | {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url},
            check=True,
            capture_output=True,
        )


def steps(server: WandbServer) -> list[int]:
    return [step for step, _ in server.curve("loss/train")]


def test_run_that_was_killed_and_resumed_has_every_step_once(ours, mine, server, capfd, caplog):
    caplog.set_level("INFO", logger="zeroflow.tracking")
    add(mine, validation_record(0, 6.0), *map(step_record, (1, 2, 3)), validation_record(3, 5.5))
    deliver(ours, mine, "KILLED")
    METRICS.keep(mine.metrics, lambda record: record.step <= 2)
    add(mine, *map(step_record, (3, 4, 5)), validation_record(5, 4.5, val_bpb=1.5))
    deliver(ours, mine)
    finish(ours, mine)
    assert steps(server) == [1, 2, 3, 4, 5]
    assert server.curve("loss/val") == [(0, 6.0), (3, 5.5), (5, 4.5)]
    assert server.rows[-1]["tokens"] == 320 and server.rows[-1]["_timestamp"] == 5.0
    assert server.exit_codes == [1, 0], "and the report opened nothing"
    assert server.created["project"] == "zeroflow" and server.created["displayName"] == "mine"
    config = json.loads(server.created["config"])
    assert config["seed"] == {"value": "7"} and config["options"] == {"value": "--token=***"}
    assert (mine.path / "wandb").stat().st_mode & 0o077 == 0, "it contains settings"
    said = f"{capfd.readouterr()}{caplog.text}"
    assert f"curves in Weights & Biases: {server.url}/me/zeroflow/runs/" in said
    assert "s3cret" not in said and "wandb:" not in said


def test_server_that_does_not_answer_delays_nothing_and_gets_all_by_the_next_command(
    ours, mine, server, caplog, monkeypatch
):
    monkeypatch.setattr(wandb_run, "OPEN_SECONDS", 1.0)
    monkeypatch.setattr(delivery, "CLOSE_SECONDS", 30.0)
    add(mine, *map(step_record, (1, 2, 3)))
    server.sleeps.set()
    deliver(ours, mine)
    finish(ours, mine)
    assert "Weights & Biases failed; training continues" in caplog.text
    assert "could not be added to Weights & Biases" in caplog.text
    server.sleeps.clear()
    finish(ours, mine)
    assert steps(server) == [1, 2, 3]


def test_upload_that_does_not_end_is_repeated_by_the_next_command(ours, mine, server, monkeypatch):
    monkeypatch.setattr(wandb_run, "UPLOAD_SECONDS", 1.0)
    add(mine, *map(step_record, (1, 2, 3)))
    run, look = wandb_run.WandbRun(ours, mine), follow_points(mine.metrics)
    server.sleeps.set()
    run.send(look())
    with pytest.raises(TimeoutError):
        run.end("FINISHED")
    server.sleeps.clear()
    finish(ours, mine)
    assert steps(server) == [1, 2, 3]


def test_without_an_account_the_run_is_in_files_that_can_be_uploaded(
    ours, mine, away, capfd, caplog
):
    caplog.set_level("INFO", logger="zeroflow.tracking")
    add(mine, *map(step_record, (1, 2, 3)))
    deliver(ours, mine, "KILLED")
    METRICS.keep(mine.metrics, lambda record: record.step <= 2)
    add(mine, *(step_record(step, 4.0) for step in (3, 4)))
    deliver(ours, mine)
    finish(ours, mine)
    wandb.teardown()
    assert away.requests == [], "nothing leaves the machine"
    assert capfd.readouterr() == ("", "")
    assert "wandb sync" in caplog.text and "offline-run-" in caplog.text
    sync(mine, away)
    assert away.curve("loss/train") == [(1, 5.0), (2, 5.0), (3, 4.0), (4, 4.0)]


def test_run_continues_after_the_steps_that_were_uploaded(ours, mine, away):
    add(mine, *map(step_record, (1, 2, 3)))
    deliver(ours, mine, "KILLED")
    sync(mine, away)
    METRICS.keep(mine.metrics, lambda record: record.step <= 2)
    add(mine, *(step_record(step, 4.0) for step in (3, 4)))
    deliver(ours, mine)
    sync(mine, away)
    assert away.curve("loss/train") == [(1, 5.0), (2, 5.0), (3, 5.0), (4, 4.0)]


def test_records_that_are_dropped_during_a_run_are_dropped_from_the_files(ours, mine, away):
    add(mine, *map(step_record, (1, 2, 3)))
    run, look = wandb_run.WandbRun(ours, mine), follow_points(mine.metrics)
    run.send(look())
    METRICS.keep(mine.metrics, lambda record: record.step <= 1)
    add(mine, step_record(2, 4.0))
    run.send(look())
    run.end("FINISHED")
    sync(mine, away)
    assert away.curve("loss/train") == [(1, 5.0), (2, 4.0)]
