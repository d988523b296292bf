"""Parts of the data built as tasks, by threads and by Dask workers, against a real server."""

import subprocess
import sys
import threading
from typing import Any

import pytest
from patience import HANG_SECONDS, wait_until
from pipeline import LOGINS, api, free_port
from tiny import apart_from_reuse, contents

from zeroflow.data import slices
from zeroflow.data.build import build_shards
from zeroflow.data.shards import ShardConfig, ShardSet
from zeroflow.orchestration import gpu_slot as gpu_slot_module
from zeroflow.orchestration import server
from zeroflow.orchestration.access import Api
from zeroflow.orchestration.deployments import set_up
from zeroflow.orchestration.flow_runs import new_flow_run
from zeroflow.orchestration.gpu_slot import gpu_slot
from zeroflow.settings.run_config import RunConfig

BUILD = """
import sys
from pathlib import Path

from prefect import flow

from zeroflow.stages.prepare import part_builders
from zeroflow.data import slices
from zeroflow.data.build import build_shards
from zeroflow.data.corpus import CorpusConfig
from zeroflow.data.shards import ShardConfig
from zeroflow.data.tokenizer import Tokenizer
from zeroflow.orchestration.view import PrefectView
from zeroflow.settings.run_config import BuildChoice

slices.SLICE_BYTES = 15_000


@flow(name="parts")
def build(config, text, tokenizer, cache, choice):
    with part_builders(choice, PrefectView()) as builders:
        return build_shards(config, text, tokenizer, cache, builders=builders)


if __name__ == "__main__":
    config, text, tokenizer, cache, runner = sys.argv[1:]
    built = build(
        ShardConfig.model_validate_json(config),
        CorpusConfig.model_validate_json(text),
        Tokenizer.model_validate_json(tokenizer),
        Path(cache),
        BuildChoice(data_workers=2, data_runner=runner),
    )
    Path(cache, "built.json").write_text(built.model_dump_json())
"""


@pytest.mark.parametrize("runner", ["threads", pytest.param("dask", marks=pytest.mark.slow)])
def test_parts_do_not_depend_on_the_number_of_workers(
    runner, text, prefect_api, base_environment, tmp_path, monkeypatch
):
    monkeypatch.setattr(slices, "SLICE_BYTES", 15_000)
    config = ShardConfig(seq_len=32, train_rows=10**6, validation_rows=10**6)
    alone = build_shards(config, *text[:2], tmp_path / "alone")
    assert alone.parts > 4

    (tmp_path / "build.py").write_text(BUILD)
    cache = tmp_path / runner
    cache.mkdir()
    settings = [part.model_dump_json() for part in (config, *text[:2])]
    done = subprocess.run(
        [sys.executable, str(tmp_path / "build.py"), *settings, str(cache), runner],
        env=base_environment
        | Api(prefect_api, LOGINS[prefect_api]).environment
        | {"HOME": str(tmp_path)},
        cwd=tmp_path,
        text=True,
        capture_output=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    together = ShardSet.model_validate_json((cache / "built.json").read_text())
    assert together == apart_from_reuse(alone).replace(path=together.path)
    for mine, theirs in zip(together.part_paths, alone.part_paths, strict=True):
        assert contents(mine) == contents(theirs)
    [run] = api(prefect_api, "/flow_runs/filter", sort="START_TIME_DESC", limit=1)
    tasks = api(prefect_api, "/task_runs/filter", task_runs={"flow_run_id": {"any_": [run["id"]]}})
    states = {task["name"]: task["state_name"] for task in tasks}
    assert states == {f"build {part.name}": "Completed" for part in alone.part_paths}


def test_named_server_that_does_not_answer_is_reported(monkeypatch):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    url = f"http://127.0.0.1:{free_port()}/api"
    with (
        temporary_settings({PREFECT_API_URL: url}),
        pytest.raises(RuntimeError, match=f"no server answers at PREFECT_API_URL {url}: start"),
        server.server(),
    ):
        pytest.fail("there is no server")


def test_run_continues_without_a_button_if_the_deployment_is_of_another_version(prefect_api):
    """Its schema knows nothing of a setting that is new."""
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    @flow(name="outdated")
    def pretrain(run: RunConfig) -> None: ...

    settings = {"type": "object", "properties": {"cache_dir": {}}, "additionalProperties": False}
    schema = {"type": "object", "properties": {"run": settings}}
    with (
        temporary_settings({PREFECT_API_URL: prefect_api}),
        get_client(sync_client=True) as client,
    ):
        deployment = client.create_deployment(
            flow_id=client.create_flow(pretrain),
            name="tiny",
            parameter_openapi_schema=schema,
            enforce_parameter_schema=True,
        )
        known = new_flow_run(client, pretrain, RunConfig(), "tiny")
        assert known.deployment_id == deployment
        unknown = new_flow_run(client, pretrain, RunConfig(seed=1), "tiny")
    assert unknown.deployment_id is None


def test_only_one_job_at_a_time_uses_the_gpu(prefect_api, monkeypatch):
    from prefect import flow
    from prefect.settings import temporary_settings

    settings = Api(prefect_api, LOGINS[prefect_api]).settings
    entered: list[str] = []
    said: list[str] = []
    # not caplog, which Prefect's own set-up of logging takes away
    monkeypatch.setattr(
        gpu_slot_module.log, "info", lambda text, *values: said.append(text % values)
    )

    @flow(name="uses the GPU")
    def uses() -> None:
        with gpu_slot():
            entered.append("second")

    def second() -> None:
        with temporary_settings(settings):
            uses()

    def shown() -> dict[str, Any]:
        flows = {"name": {"any_": ["uses the GPU"]}}
        [run] = api(prefect_api, "/flow_runs/filter", flows=flows) or [{}]
        return run

    with temporary_settings(settings):
        set_up()
        thread = threading.Thread(target=second)
        with gpu_slot():
            thread.start()
            wait_until(lambda: any("another run uses the GPU" in line for line in said))
            wait_until(lambda: shown()["state_name"] == "Waiting")
            assert "another run uses the GPU" in shown()["state"]["message"]
            assert not entered
        thread.join(HANG_SECONDS)
    assert entered == ["second"]
    assert (shown()["state_name"], shown()["run_count"]) == ("Completed", 1)


def test_gpu_is_used_although_prefect_is_unreachable(caplog):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    url = f"http://127.0.0.1:{free_port()}/api"
    with (
        temporary_settings({PREFECT_API_URL: url}),
        pytest.raises(ZeroDivisionError),
        gpu_slot(),
    ):
        raise ZeroDivisionError
    assert any("cannot reserve the GPU" in m for m in caplog.messages)
