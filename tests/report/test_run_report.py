import json

import pytest
from tiny import training_config

from zeroflow.data.validation_sample import SampleCounts
from zeroflow.report import run_page
from zeroflow.report.pages import Page
from zeroflow.report.records import RunReport
from zeroflow.settings.run_config import RunConfig
from zeroflow.settings.settle import settle

OLD = """{
  "status": "completed", "run": "done", "size": "custom", "parameters": 139584, "steps": 60,
  "tokens": 30720, "train_loss": 6.225158214569092, "first_val_loss": 6.916815385222435,
  "val_loss": 6.2730395048856735, "val_bpb": 3.5889691925245373, "entropy": null,
  "overfit": {"passed": true, "loss": 0.09764818847179413, "steps": 44},
  "tokens_per_second": 28430.212804924948, "mfu": null, "peak_memory_bytes": 480882688,
  "device": "x86_64 CPU, 2 threads", "gpus": 1, "zero_stage": 0, "precision": "fp32",
  "fp8": false, "resume": "bit for bit",
  "recoveries": [{"time": 1.5, "process": 7, "reason": "out of memory", "step": 3, "message": "m",
    "action": "half", "micro_batch_rows": 2, "activation_checkpointing": false, "skip": null}],
  "data": {"mode": "sample", "name": "sample", "revision": "85a67cfcbd6a3d72",
    "synthetic_fallback": false, "documents": 1758, "train_rows": 184424,
    "epochs": 0.0026026981303951765, "path": "/c/shards/sample-64-b015d189a56f"},
  "tokenizer": {"name": "train", "revision": null, "vocab_size": 1024,
    "fingerprint": "79f16cb74e72"},
  "checkpoint": "/c/runs/done/checkpoints/step-00000060", "sample": "def ',in",
  "time": {"wall_seconds": 4.78, "training_seconds": 1.06, "goodput": 0.2,
    "seconds": {"start": 2.75, "data": 0.07}, "shares": {"start": 0.58, "data": 0.01},
    "restarts": 0, "steps_again": 0},
  "expected_loss": {"verdict": "in band (2 earlier runs)", "runs": ["a", "b"], "earlier": 2,
    "tokens": 400, "apart": -0.05, "judged": true, "since": null, "until": null, "miss": -0.01},
  "preflight": {"passed": true, "job": "730929f9df0a", "seconds": 1.8, "checks": [
    {"name": "text", "passed": true, "figure": "100.0%", "sentence": "of 1,040 ids"}]},
  "stages": {"training": {"reused": false, "why": "none exists yet"}},
  "plan": [{"name": "seconds", "predicted": 2.0, "measured": 3.0, "miss": 0.5}],
  "mlflow_run_id": "04ab758a5e424fbdafba0eca6767c890"
}"""
"""A report that a version without a format wrote."""


@pytest.fixture
def report(tmp_path) -> RunReport:
    path = tmp_path / "report.json"
    path.write_text(OLD)
    return RunReport.read(path)


def test_report_of_an_older_version_is_read_and_written_with_the_same_fields(report, tmp_path):
    report.write(tmp_path / "report.json")
    again = json.loads((tmp_path / "report.json").read_text())
    assert again.pop("format") == 1 and again.pop("metrics") == {}
    again["expected_loss"]["miss"] = again["expected_loss"].pop("distance")  # renamed since
    again["plan"][0]["miss"] = again["plan"][0].pop("difference")
    assert again == json.loads(OLD)


def test_report_before_plans_stages_and_bands_is_read(tmp_path):
    path = tmp_path / "report.json"
    later = ("gpus", "zero_stage", "fp8", "expected_loss", "preflight", "stages", "plan")
    old = {name: value for name, value in json.loads(OLD).items() if name not in later}
    path.write_text(json.dumps(old))
    report = RunReport.read(path)
    assert (report.gpus, report.stages, report.plan) == (1, {}, [])
    assert report.expected_loss.verdict.startswith("unknown")


def test_older_name_of_the_skipped_checkpoints_is_read(tmp_path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(json.loads(OLD) | {"thinned_checkpoints": 3}))
    assert RunReport.read(path).skipped_checkpoints == 3


def test_facts_about_the_data_fit_into_the_width_of_prefects_page(report):
    figures = {"name": "fineweb-edu-CC-MAIN-2024-10", "revision": 40 * "f", "documents": 9_876_543}
    figures |= {"covered": 0.986, "repeated": 0.321, "train_rows": 123_456_789, "epochs": 12.34}
    long = report.replace(data=report.data.replace(**figures))
    facts = run_page._facts(long, training_config().workload, {})
    assert facts["Epochs"].startswith("12.34: 98.6% of 123,456,789 training rows were read")
    assert facts["Revision"] == 40 * "f"
    assert max(len(text) for name, text in facts.items() if name != "Checkpoint") <= 90


@pytest.mark.parametrize(
    ("rows", "covered", "repeated", "text"),
    [
        (1, 1.0, 1.0, "12.34: the only training row was read more than once"),
        (1, 1.0, 0.0, "12.34: the only training row was read"),
        (2048, 1.0, 0.25, "12.34: all 2,048 training rows were read, 25.0% more than once"),
        (2048, 0.5, 0.0, "12.34: 50.0% of 2,048 training rows were read, 0.0% more than once"),
    ],
)
def test_coverage_of_the_data_is_a_sentence(report, rows, covered, repeated, text):
    figures = {"covered": covered, "repeated": repeated, "train_rows": rows, "epochs": 12.34}
    known = report.replace(data=report.data.replace(**figures))
    assert run_page._facts(known, training_config().workload, {})["Epochs"] == text


def test_page_shows_the_metrics_of_the_table(report):
    values = {"loss/train": 6.2251, "optim/grad_norm": 0.695336, "perf/tokens_per_second": 25938.4}
    section = Page(run_page.metrics_section(values)).linked
    assert section.splitlines()[4:] == [
        "| training loss | 6.2251 nats per token |",
        "| gradient norm | 0.6953 |",
        "| speed | 25,938 tokens/s |",
    ]


@pytest.mark.parametrize(
    ("unknown", "why"),
    [
        (3, "none: all scored tokens are unknown or end a document"),
        (0, "none: all scored tokens end a document"),
    ],
)
def test_report_says_why_there_are_no_bits_per_byte(report, unknown, why):
    counts = SampleCounts(rows=1, documents=1, tokens=1, text_bytes=0, unknown=unknown)
    found = report.replace(val_bpb=None, validated=counts)
    facts = run_page._facts(found, training_config().workload, {})
    assert facts["Bits per byte"] == why
    assert facts["Validated on"] == "1 token of 1 held-out document, in 1 row"


def test_settings_are_named_like_their_flags(tmp_path):
    synthetic = {"data_mode": "synthetic"}
    run = settle(RunConfig(run_name="x", cache_dir=tmp_path, device="cpu", data=synthetic)).run
    _, table = run_page._settings_section(run)
    names = [name for name, _ in table.rows]
    assert {"register", "training.seq_len"} <= {*names}
    assert not any(name.endswith("_") for name in names)
