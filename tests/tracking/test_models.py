"""Models in a real store of MLflow."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow_runs import HARD, begun, client, the_run
from mlflow_server import Server
from tiny import MODEL, lively_model

from zeroflow.inference.export import export
from zeroflow.run_folder import Cache, RunFolder
from zeroflow.tracking.config import Dataset, TrackingConfig, database, location
from zeroflow.tracking.models import (
    Candidate,
    ModelScore,
    RegistrationFailed,
    add_scores,
    register,
    stored_bytes,
)
from zeroflow.training import sampling
from zeroflow.training.sampling import SamplingConfig

HELD_OUT = Dataset(name="sample", digest="abc", source="sample@1")


def candidate(step: int, bpb: float | None, text: str = "one text") -> Candidate:
    return Candidate(
        step=step,
        params={"tokens": str(100 * step)},
        scores=() if bpb is None else (ModelScore("loss/val_bpb", bpb, 1_700_000_000.0, HELD_OUT),),
        held_out=text,
        bpb=bpb,
        sampling={"max_new_tokens": 9, "do_sample": True, "temperature": 0.8, "top_k": 5},
    )


def exported(target: Path) -> Path:
    """Leave a file in place of a model, which is only stored."""
    target.mkdir()
    (target / "config.json").write_text("{}")
    return target


def best(config: TrackingConfig, name: str) -> int | None:
    number = client(config).get_registered_model(name).aliases.get("best")
    return None if number is None else int(number)


def logged_models(config: TrackingConfig, folder):
    run = the_run(config, folder)
    return client(config).search_logged_models([run.info.experiment_id])


WITHOUT_ZEROFLOW = """
import json, sys
sys.modules["zeroflow"] = None  # an import raises an error
import mlflow
model = mlflow.pyfunc.load_model("models:/texts@best")
prompts = json.loads(sys.argv[1])
greedy = {"temperature": 0.0, "max_new_tokens": 12}
print(json.dumps([
    model.predict(prompts, params=greedy),
    model.predict(prompts[0], params={"do_sample": False, "max_new_tokens": 12}),
    model.predict(prompts[0]),
]))
"""


def test_registered_model_writes_the_same_text_in_a_process_without_zeroflow(
    config, mine, text, tmp_path
):
    model, prompts = lively_model(MODEL.replace(vocab_size=512)), ["The river runs", "A"]

    def write(target: Path) -> Path:
        export(model, text.tokenizer, target, context=64)
        return target

    register(config, mine, candidate(3, 1.5), "texts", write)
    assert not mine.registering.exists()
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MLFLOW_RUN_ID")}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_ZEROFLOW, json.dumps(prompts)],
        env=kept | {"MLFLOW_TRACKING_URI": config.uri, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0
    both, first, sampled = json.loads(done.stdout.splitlines()[-1])
    greedy = SamplingConfig(temperature=0, tokens=12)
    ours = [
        sampling.generate(model, text.tokenizer, prompt, greedy, context=64) for prompt in prompts
    ]
    assert both == ours and first == ours[:1]
    assert sampled[0].startswith(prompts[0])


def test_model_is_linked_to_its_run_and_its_figures_to_their_data(config, mine):
    found = register(config, mine, candidate(3, 1.5), "texts", exported)
    assert found == ("texts", "1", True, False) and found.uri == "models:/texts/1"
    run, [model] = the_run(config, mine), logged_models(config, mine)
    assert model.status == "READY" and model.source_run_id == run.info.run_id
    assert model.name == "mine-step-3" and model.params == {"step": "3", "tokens": "300"}
    [output] = run.outputs.model_outputs
    assert (output.model_id, output.step) == (model.model_id, 3)
    assert run.data.metrics["loss/val_bpb"] == 1.5
    [dataset] = [each.dataset for each in run.inputs.dataset_inputs]
    [metric] = model.metrics
    assert (metric.key, metric.value, metric.step) == ("loss/val_bpb", 1.5, 3)
    assert (metric.dataset_name, metric.dataset_digest) == (dataset.name, dataset.digest)
    version = client(config).get_model_version("texts", "1")
    assert version.run_id == run.info.run_id and version.tags["val_bpb"] == "1.5"
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "texts", "version": 1}]

    judged = Dataset(name="news.jsonl", digest="d1", source="news.jsonl")
    for _ in range(2):  # as when the command is repeated
        add_scores(
            config, mine, 3, [ModelScore("scores/news.jsonl/loss", 4.5, 1_700_000_001.0, judged)]
        )
    add_scores(
        config, mine, 2, [ModelScore("scores/news.jsonl/loss", 9.0, 1_700_000_001.0, judged)]
    )
    [model] = logged_models(config, mine)
    [added] = [each for each in model.metrics if each.key == "scores/news.jsonl/loss"]
    assert (added.value, added.dataset_name, added.dataset_digest) == (4.5, "news.jsonl", "d1")


def test_weights_are_stored_once_for_all_names_and_repeated_commands(config, mine):
    first = register(config, mine, candidate(3, 1.5), "texts", exported)
    again = register(config, mine, candidate(3, 1.5), "texts", pytest.fail)
    assert again == first._replace(reused=True)
    other = register(config, mine, candidate(3, 1.5), "other", pytest.fail)
    assert other.version == "1" and not other.reused
    [model] = logged_models(config, mine)
    assert len(json.loads(model.tags["mlflow.modelVersions"])) == 2


def test_stored_weights_of_a_run_are_measured_without_asking_mlflow(config, mine):
    def write(target: Path) -> Path:
        exported(target)
        (target / "model.safetensors").write_bytes(b"x" * 1000)
        return target

    assert stored_bytes(mine) == 0
    for step in (3, 4):
        register(config, mine, candidate(step, 1.5), "texts", write)
    other = RunFolder(mine.path.with_name("other"))
    other.path.mkdir()
    assert (stored_bytes(mine), stored_bytes(other)) == (2000, 0)


def test_alias_names_the_version_with_the_lowest_bits_per_byte_on_the_same_text(
    config, mine, caplog
):
    def add(step: int, bpb: float | None, text: str = "one text") -> bool:
        return register(config, mine, candidate(step, bpb, text), "texts", exported).is_best

    assert not add(0, None) and best(config, "texts") is None
    assert add(1, 1.5) and add(2, 1.2)
    assert not add(3, 1.3) and not add(4, 1.2) and not add(5, None)
    assert best(config, "texts") == 3 and not caplog.messages
    assert not add(6, 0.1, "other text") and best(config, "texts") == 3
    [warning] = caplog.messages
    assert "was validated on other text than version 7: register" in warning
    client(config).delete_model_version("texts", "3")
    assert not add(7, 1.4) and best(config, "texts") == 5


def test_interrupted_delivery_is_repeated_and_leaves_one_model(config, mine, monkeypatch):
    from mlflow.tracking import MlflowClient

    send = MlflowClient.log_model_artifacts
    for lost in (ConnectionError("the server is gone"), KeyboardInterrupt()):

        def fail(*args, lost=lost):
            raise lost

        monkeypatch.setattr(MlflowClient, "log_model_artifacts", fail)
        with pytest.raises((RegistrationFailed, KeyboardInterrupt)) as failed:
            register(config, mine, candidate(3, 1.5), "texts", exported)
        if failed.type is RegistrationFailed:
            assert "(the server is gone): the same command tries again" in str(failed.value)
        assert not mine.registering.exists()
    monkeypatch.setattr(MlflowClient, "log_model_artifacts", send)
    assert register(config, mine, candidate(3, 1.5), "texts", exported).version == "1"
    [model] = logged_models(config, mine)
    assert model.status == "READY"


def test_error_of_the_export_is_not_one_of_mlflow(config, mine):
    def refuse(target: Path) -> Path:
        raise ValueError("it cannot be exported")

    with pytest.raises(ValueError, match=r"^it cannot be exported$"):
        register(config, mine, candidate(3, 1.5), "texts", refuse)
    assert not logged_models(config, mine)


def test_store_that_cannot_be_opened_fails_before_the_export(config, mine):
    database(config.folder).write_text("not a database")
    moved = config.replace(uri="sqlite:////before/it/moved/mlflow.db")
    place = re.escape(str(database(config.folder)))
    with pytest.raises(RegistrationFailed, match=rf"MLflow at sqlite:.*{place} did not register"):
        register(moved, mine, candidate(3, 1.5), "texts", pytest.fail)
    add_scores(config, mine, 3, [ModelScore("scores/a/loss", 1.0, 1.0, HELD_OUT)])


def test_registered_models_follow_a_cache_that_moves(config, tmp_path):
    from mlflow.utils.file_utils import local_file_uri_to_path

    old, new = tmp_path / HARD / "old", tmp_path / HARD / "new"
    begun(old, "mine")
    (old / "mlflow").mkdir()
    shutil.copy(database(config.folder), database(old / "mlflow"))

    def at(cache: Path) -> TrackingConfig:
        uri, folder = location(cache)
        return config.replace(uri=uri, folder=folder)

    register(at(old), Cache(old).run("mine"), candidate(1, 1.5), "texts", exported)
    old.rename(new)
    again = register(at(new), Cache(new).run("mine"), candidate(1, 1.5), "texts", pytest.fail)
    assert again.reused and again.is_best and not old.exists()
    [model] = logged_models(at(new), Cache(new).run("mine"))
    for address in (
        model.artifact_location,
        client(at(new)).get_model_version_download_uri("texts", "1"),
    ):
        assert (local_file_uri_to_path(address) / Path("artifacts/model/config.json")).exists()


@pytest.mark.slow
def test_model_arrives_when_the_server_that_was_lost_is_back(config, mine, tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    server = Server(tmp_path / HARD)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    uri, folder = location(tmp_path)
    served = config.replace(uri=uri, folder=folder)
    with pytest.raises(RegistrationFailed, match=r"MLflow at http://\*\*\*@127") as lost:
        register(served, mine, candidate(3, 1.5), "texts", pytest.fail)
    assert "s3cret" not in str(lost.value)
    try:
        server.start()
        found = register(served, mine, candidate(3, 1.5), "texts", exported)
        assert found == ("texts", "1", True, False)
        assert register(served, mine, candidate(4, 1.2), "texts", exported).is_best
        store = MlflowClient(server.uri)
        version = store.get_model_version_by_alias("texts", "best")
        model = store.get_logged_model(version.tags["model_id"])
        assert str(version.version) == "2" and model.params["step"] == "4"
        assert {metric.value for metric in model.metrics} == {1.2}
        files = store.list_logged_model_artifacts(model.model_id, "artifacts/model")
        assert [file.path for file in files] == ["artifacts/model/config.json"]
    finally:
        server.kill()
