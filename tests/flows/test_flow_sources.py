"""Runs on each source of data."""

import gzip
import json
import logging
from pathlib import Path

import pytest
from faults import asking
from hub import TOKEN, Hub, fineweb_edu_repo, llama_tokenizer_repo
from pipeline import SMALL_SHAPE, Flow, mlflow_run
from tiny import SHAPE

from zeroflow import RunConfig, pretrain

TRAINING = {"seq_len": 32, "batch_size": 4, "grad_accum_steps": 1, "max_steps": 12}
TRAINING |= {"validation_tokens": 512, "learning_rate": 1e-2, "sample_tokens": 8}


@pytest.mark.slow  # the readers have tests of their own
def test_own_files_compressed_and_not(flow: Flow, tmp_path: Path) -> None:
    prose = "It was a bright cold day in April, and the clocks were striking thirteen. " * 40
    lines = [json.dumps({"body": f"{i}. {prose}"}) for i in range(60)]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write("\n".join(lines))
    (tmp_path / "b.txt").write_text(prose)
    flags = ["--data-mode=files", "--text-column=body", "--tokenizer-name=train"]
    flow.run(
        "--run-name=own", *flags, "--data-path", f"{tmp_path}/*.gz", f"{tmp_path}/*.txt",
        *SMALL_SHAPE, "--precision=bf16",
    )  # fmt: skip
    assert flow.report("own")["data"]["documents"] == 61
    assert flow.report("own")["preflight"] is None
    page = (flow.folder("own") / "report.md").read_text()
    assert "| skip_preflight | True |" in page and "| Pre-flight | skipped |" in page
    assert mlflow_run(flow, "own").data.params["skip_preflight"] == "True"


def test_fineweb_edu_with_llamas_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Against a hub that serves both, by the libraries' own code."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    caplog.set_level(logging.INFO, logger="zeroflow")
    shape = {"model": SHAPE.model_dump(), "training": TRAINING, "skip_preflight": True}
    run = RunConfig(run_name="edu", cache_dir=tmp_path, device="cpu", **shape)
    with Hub([fineweb_edu_repo(), llama_tokenizer_repo()]) as hub, asking(hub.url) as patch:
        patch.setenv("HF_TOKEN", TOKEN)
        report = pretrain(run)
        assert "fineweb-edu-sample-10BT (the hub answers)" in caplog.text
        assert report.data.revision == hub.repos["dataset", "HuggingFaceFW/fineweb-edu"].sha
        assert report.tokenizer.name == "meta-llama/Llama-3.1-8B"
        assert report.val_loss < report.first_val_loss

        asked = len(hub.requests)
        caplog.clear()
        pretrain(run)
        assert "tokenizer reused" in caplog.text and "shards reused" in caplog.text
        fetched = [path for _, path in hub.requests[asked:] if "resolve" in path]
        assert fetched == [], "nothing is fetched twice"


@pytest.mark.slow  # the messages are tested with the requests
def test_gated_tokenizer_is_one_message_with_remedies(flow: Flow) -> None:
    with Hub([fineweb_edu_repo(), llama_tokenizer_repo()]) as hub:
        flow.environment |= {"HF_ENDPOINT": hub.url}
        output = flow.run("--tokenizer-name=meta-llama/Llama-3.1-8B", "--seq-len=32", expect=1)
    assert "gated" in output and "hf auth login" in output and "--tokenizer-name train" in output
    assert "Traceback" not in output and output.count("error:") == 1


@pytest.mark.slow
def test_fineweb_without_a_hub_fails_with_remedies(flow: Flow) -> None:
    output = flow.run("--data-mode=fineweb", "--seq-len=32", expect=1)
    assert "cannot be reached" in output and "--allow-synthetic-fallback" in output
    assert "Traceback" not in output


@pytest.mark.slow  # its parts have tests of their own
def test_synthetic_fallback_is_loud_and_its_loss_falls_towards_its_entropy(flow: Flow) -> None:
    shape = [flag for flag in SMALL_SHAPE if not flag.startswith(("--max", "--batch-s"))]
    output = flow.run(
        "--run-name=fallback", "--data-mode=fineweb", "--allow-synthetic-fallback",
        "--max-steps=150", "--batch-size=16", *shape, "--skip-preflight",
    )  # fmt: skip
    assert "SYNTHETIC FALLBACK" in output
    assert mlflow_run(flow, "fallback").data.tags["synthetic_fallback"] == "true"
    report = flow.report("fallback")
    assert f"entropy of the data {report['entropy']:.4f}" in output
    # ln 512 = 6.24 at first; below the 5.5 of knowing only which tokens occur, and not under
    # what can be known
    assert report["entropy"] < report["val_loss"] < 5.0
    assert report["val_bpb"] is None
