"""Runs that start from a trained model, as the pipeline trains them, in this process."""

import gc
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from faults import asking
from hub import Hub, Repo, english, llama_tokenizer_repo
from tiny import SHAPE, contents, jsonl_corpus

from zeroflow import RunConfig, pipeline
from zeroflow.data.batches import IGNORED, to_micro_batch
from zeroflow.data.hub_errors import HubError
from zeroflow.data.rows import Rows
from zeroflow.data.validation_sample import validation_rows
from zeroflow.report import plan_page
from zeroflow.report.model_card import model_card
from zeroflow.settings import resuming
from zeroflow.settings.settle import foresee, settle
from zeroflow.stages.plan import predict
from zeroflow.training import initial
from zeroflow.training.__main__ import work
from zeroflow.training.job import TrainingJob
from zeroflow.training.metrics import METRICS, ValidationRecord

TRAINING = {"seq_len": 32, "batch_size": 4, "grad_accum_steps": 1, "max_steps": 6}
TRAINING |= {"validation_tokens": 512, "learning_rate": 1e-2, "sample_tokens": 2}
TRAINING |= {"checkpoint_every": 2, "validate_every": 2, "keep_checkpoints": 9}


OTHER_SHAPE = SHAPE.replace(intermediate_size=32).model_dump()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("init_from")
    for number, name in enumerate(("first", "second")):
        texts = [english(random.Random(100 * number + seed)) for seed in range(60)]
        jsonl_corpus(folder / f"{name}.jsonl", texts)
    return folder


def asked(folder: Path, name: str, text: str = "first", **settings: Any) -> RunConfig:
    corpus = {"data_mode": "files", "data_path": [str(folder / f"{text}.jsonl")]}
    given = {"run_name": name, "cache_dir": folder / "cache", "device": "cpu", "data": corpus}
    return RunConfig.model_validate(given | {"training": TRAINING} | settings)


def train(run: RunConfig) -> TrainingJob:
    """Train `run`; without its checks, whose weights are random."""
    job = pipeline.prepare(run, lambda run_dir: None, pipeline.PLAIN, pipeline.LOG_ONLY).job
    job.write(job.folder.job)
    try:
        work(job, lambda: False)
    finally:
        gc.enable()  # a training process runs without it
    return job


def losses(job: TrainingJob) -> dict[int, float]:
    """Return the validation losses by step."""
    records = METRICS.read(job.folder.metrics)
    return {each.step: each.val_loss for each in records if isinstance(each, ValidationRecord)}


@pytest.fixture(scope="module")
def base(folder: Path) -> TrainingJob:
    tokenizer = {"tokenizer_name": "train", "vocab_size": 400}
    return train(asked(folder, "base", model=SHAPE.model_dump(), tokenizer=tokenizer))


def test_run_starts_at_the_exact_loss_of_a_checkpoint_and_keeps_its_step(folder, base):
    before = losses(base)
    for source, step in (("run:base", 6), ("run:base@4", 4)):
        run = asked(folder, f"from-{step}", model={"init_from": source})
        job = train(run)
        assert losses(job)[0] == before[step] != before[0]
        settled = settle(run).run
        assert settled.model.init_from == f"run:base@{step}" and settled.model.shape == SHAPE
        assert job.tokenizer.fingerprint == base.tokenizer.fingerprint
        assert job.model == base.model
    assert losses(job)[6] < losses(job)[0], "it is trained further"


def llama(folder: Path, dtype: torch.dtype, **changes: Any) -> Path:
    """Save a small model with a tokenizer as transformers does, in several files."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 520}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    rope = {"rope_type": "default", "rope_theta": 9000.0}
    settings = {**shape, **heads, "rms_norm_eps": 2e-4, "initializer_range": 0.3}
    settings |= {"model_type": "llama", "rope_parameters": rope} | changes
    config = AutoConfig.for_model(**settings)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.uniform_(weight, 0.5, 2.0)
    model.to(dtype).save_pretrained(folder, max_shard_size="30KB")
    for name, content in llama_tokenizer_repo(vocab_size=512).contents.items():
        if name.startswith("tokenizer"):
            (folder / name).write_bytes(content)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def loss_in_transformers(model: Path, job: TrainingJob) -> float:
    """Return the loss of a model in fp32 on the held-out rows of `job`."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    rows = Rows(job.shards, "validation")
    chosen = rows[validation_rows(job.shards, job.validation_rows)]
    batch = to_micro_batch(chosen, end_of_text=rows.end_of_text)
    with torch.no_grad():
        logits = network(batch.inputs).logits
    return float(
        F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED)
    )


@pytest.mark.parametrize(
    ("dtype", "tied"),
    [
        pytest.param(torch.float32, True, id="fp32", marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, False, id="bf16-untied"),
        pytest.param(torch.float16, True, id="fp16"),
    ],
)
def test_run_starts_at_the_loss_of_a_model_of_hugging_face_on_its_own_text(folder, dtype, tied):
    kind = str(dtype).rsplit(".", 1)[-1]
    source = llama(folder / kind, dtype, tie_word_embeddings=tied)
    job = train(asked(folder, kind, "second", model={"init_from": str(source)}))
    expected = loss_in_transformers(source, job)
    # the same sums in another order: fp32 rounding at a loss of about 10
    assert losses(job)[0] == pytest.approx(expected, abs=1e-5) and expected > 6
    model = job.model
    assert model.tie_word_embeddings == tied
    assert (model.vocab_size, model.rms_norm_eps, model.rope_theta) == (520, 2e-4, 9000.0)


def test_run_starts_at_the_loss_of_a_qwen3_model(folder):
    changes = {"model_type": "qwen3", "head_dim": 12, "layer_types": ["full_attention"] * 2}
    source = llama(folder / "qwen3", torch.bfloat16, **changes)
    job = train(asked(folder, "qwen3", "second", model={"init_from": str(source)}))
    expected = loss_in_transformers(source, job)
    # the same sums in another order: fp32 rounding at a loss of about 10
    assert losses(job)[0] == pytest.approx(expected, abs=1e-5) and expected > 6
    assert job.model.qk_norm and job.model.head_dim == 12
    card = model_card(job.folder, step=6, format="hf")
    assert "parameters of the Qwen3 architecture" in card and "and values, 12 features each" in card
    assert losses(job)[6] < losses(job)[0], "it is trained further"


@pytest.fixture
def started(folder: Path, tmp_path: Path) -> RunConfig:
    """A run that was trained from a model in a folder of its own."""
    run = asked(
        folder, tmp_path.name, model={"init_from": str(llama(tmp_path / "m", torch.float32))}
    )
    train(run)
    return run


def longer(run: RunConfig) -> RunConfig:
    return run.replace(training=run.training.replace(max_steps=8))


def test_started_run_resumes_without_its_source(folder, started, tmp_path):
    shutil.rmtree(tmp_path / "m")
    shutil.rmtree(folder / "cache" / "models")
    job = train(longer(started))
    assert 8 in losses(job)
    assert not (folder / "cache" / "models").exists()


def test_resume_with_other_weights_in_the_source_is_refused_and_changes_nothing(started, tmp_path):
    before = contents(started.run_dir)
    llama(tmp_path / "m", torch.float32, initializer_range=0.2)
    for run in (started, longer(started)):
        with pytest.raises(ValueError, match=r"was trained with other files in --init-from .*/m"):
            settle(run)
    assert contents(started.run_dir) == before
    # Without the flag, the source is not read
    assert settle(started.replace(model={})).run.model.init_from == str(tmp_path / "m")


def test_plan_report_and_description_say_where_the_run_began(folder, base):
    settlement = foresee(asked(folder, "planned", model={"init_from": "run:base"}))
    planned = predict(settlement)
    assert "start: the weights of run:base@6" in list(plan_page.log_lines(settlement, planned))
    assert "the weights of run:base@6" in plan_page.text(planned)
    assert settlement.tokenizer_reason == "that of --init-from"
    named = foresee(asked(folder, "x", model={"init_from": "run:base"}).replace(run_name=None))
    assert named.run.run_name.startswith("base-6-")


def test_card_names_the_start_its_digest_and_no_licence_where_there_is_none(folder, base, started):
    for run, start in (
        (asked(folder, "from-6", model={"init_from": "run:base"}), "run:base@6"),
        (started, f"m, digest {settle(started).run.initial.digest}"),
    ):
        train(run)  # at once, if a test before this one has trained it
        card = model_card(settle(run).run.folder, step=6, format="hf").replace("\\", "")
        assert f"| Start | the weights of {start} |" in card
        assert "| Licence of the start | not recorded; it also" in card
        assert "random weights" not in card
    assert str(folder) not in card


@pytest.mark.parametrize(
    ("card", "config", "expected"),
    [
        ("---\nlicense: mit\ntags: [a]\n---\ntext", {}, "mit"),
        ("---\nlicense: other\nlicense_name: llama3\n---\n", {}, "llama3"),
        ("---\ntags: [a]\n---\n", {"license": "cc-by-4.0"}, "cc-by-4.0"),
        ("---\nlicense: [mit]\n---\n", {}, None),
        ("---\nlicense: {\n---\n", {}, None),
        ("# license: mit", {}, None),
        (None, {}, None),
    ],
)
def test_licence_is_read_from_the_card_or_the_configuration(card, config, expected, tmp_path):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert initial._licence(tmp_path / "README.md", config) == expected


def test_licence_passes_on_to_runs_and_does_not_change_what_is_the_same(folder, hub, tmp_path):
    first = asked(folder, "licensed", model={"init_from": "somebody/small"})
    train(first)
    found = settle(asked(folder, "second", model={"init_from": "run:licensed"})).run.initial
    assert found.licence == "apache-2.0"
    run = settle(first).run
    other = run.replace(initial=run.initial.replace(licence=None))
    assert resuming.default_name(run) == resuming.default_name(other)
    folders = {initial.directory("a", each.initial, folder) for each in (run, other)}
    assert len(folders) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": {"init_from": "run:nobody"}}, "no run nobody in .*; existing runs: base"),
        ({"model": {"init_from": "run:base@5"}}, "no checkpoint of step 5, only of steps 2, 4, 6"),
        ({"model": {"init_from": "run:base@x"}}, "@ must be followed by a step or best"),
        ({"model": {"init_from": "./nowhere"}}, "--init-from ./nowhere: no such folder"),
        ({"model": {"init_from": "tests"}}, "the folder has no config.json"),
        ({"model": {"init_from": "run:base", "size": "tiny"}}, "--size tiny and --init-from run"),
        (
            {
                "model": {
                    "init_from": "run:base",
                    **SHAPE.replace(intermediate_size=32).model_dump(),
                }
            },
            "--intermediate-size 32, but --init-from run:base@6 has 64",
        ),
        (
            {"model": {"init_from": "run:base"}, "tokenizer": {"vocab_size": 500}},
            "--init-from run:base@6 has its own tokenizer: drop",
        ),
        (
            {"model": {"init_from": "run:base"}, "data": {"data_mode": "synthetic"}},
            "run:base@6 was trained on text, but --data-mode is synthetic",
        ),
    ],
)
def test_source_that_cannot_be_used_is_refused_with_its_reason(folder, base, settings, message):
    with pytest.raises(ValueError, match=message):
        settle(asked(folder, "refused", **settings))
    assert not (folder / "cache" / "runs" / "refused").exists()


def test_file_with_other_tensors_is_refused_by_their_names(folder, tmp_path):
    source = llama(tmp_path / "m", torch.float32)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    run = asked(folder, "tensors", model={"init_from": str(source)})
    before = {*(folder / "cache").glob("models/[!.]*")}
    with pytest.raises(ValueError, match=r"it also has model.layers.1.input_layernorm.weight, "):
        train(run)
    assert {*(folder / "cache").glob("models/[!.]*")} == before
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"it lacks model.layers.2.input_layernorm.weight, "):
        train(run)


@pytest.fixture
def hub(folder: Path, tmp_path: Path) -> Iterator[Hub]:
    model = llama(tmp_path / "m", torch.bfloat16)
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Small\n")
    repo = Repo("model", "somebody/small", model)
    with Hub([repo]) as hub, asking(hub.url):
        yield hub


def test_model_of_the_hub_is_pinned_and_read_once(folder, hub, tmp_path):
    run = asked(folder, "hub", model={"init_from": "somebody/small"})
    job = train(run)
    [repo] = hub.repos.values()
    settled = settle(run).run
    assert settled.model.init_from == f"somebody/small@{repo.sha}"
    assert settled.tokenizer.tokenizer_revision == repo.sha
    assert losses(job)[0] == pytest.approx(loss_in_transformers(tmp_path / "m", job), abs=1e-5)
    card = model_card(job.folder, step=6, format="hf")
    assert "base_model: somebody/small\n" in card
    assert f"trained from the weights of somebody/small@{repo.sha}" in card.replace("\\", "")
    assert f"| Start | the weights of somebody/small@{repo.sha} |" in card.replace("\\", "")
    assert "| Licence of the start | apache-2.0; it also applies to this model |" in card
    [command] = [line for line in card.splitlines() if line.startswith("zeroflow pretrain")]
    assert f"--init-from=somebody/small@{repo.sha}" in command
    assert "--hidden-size" not in command and "--tokenizer-name" not in command
    asked_before = len(hub.requests)
    train(longer(run))
    assert len(hub.requests) == asked_before
    with pytest.raises(HubError, match="somebody/none: does not exist on the hub"):
        settle(asked(folder, "none", model={"init_from": "somebody/none"}))
