"""The whole flow as a user runs it."""

import json
import logging
import os
import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from patience import HANG_SECONDS
from pipeline import CHECKED_SHAPE, SMALL_SHAPE, Flow, api, mlflow_client, mlflow_run
from wheel import build_wheel, install

from zeroflow import RunConfig, pretrain
from zeroflow.checks.overfit import OverfitFailed
from zeroflow.cli import commands
from zeroflow.data.order import Skip
from zeroflow.pipeline import may_succeed
from zeroflow.run_folder import RunFolder
from zeroflow.training import goodput
from zeroflow.training.recovery import LEDGER, Entry

TASKS = [
    "plan",
    "fetch tokenizer",
    "build shards",
    "build part-00000",
    "build model",
    "pre-flight",
    "train",
    "overfit check",
    "report",
]


@pytest.fixture(scope="module")
def sample(
    tmp_path_factory: pytest.TempPathFactory, base_environment: dict[str, str], prefect_api: str
) -> tuple[Flow, str]:
    """A finished run on the sample, and what it printed.

    It was trained by the wheel of the package, in an environment and a folder of its own.
    """
    folder = tmp_path_factory.mktemp("sample")
    environment = base_environment | {"PREFECT_API_URL": prefect_api}
    flow = Flow(folder / "cache", environment)
    programs = install(build_wheel(folder / "wheel"), folder / "environment")
    elsewhere = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
    program = (str(programs / "zeroflow"), "pretrain")
    (folder / "empty").mkdir()
    installed = Flow(flow.cache, elsewhere, program, folder / "empty")
    prompt = "--sample-prompt=def a\n```\n| b"
    output = installed.run("--run-name=first", "--log-interval=4", prompt, *CHECKED_SHAPE)
    assert "part-00000: " in output
    assert not list((folder / "empty").iterdir())
    return flow, output


def test_sample_run_writes_all_documented_files(sample: tuple[Flow, str]) -> None:
    flow, output = sample
    report = flow.report("first")
    assert report["status"] == "completed"
    assert report["overfit"]["passed"] and report["overfit"]["loss"] < 0.1
    assert report["preflight"]["passed"] and len(report["preflight"]["checks"]) > 5
    assert report["val_loss"] < report["first_val_loss"]
    assert report["val_bpb"] > 0
    assert report["data"]["mode"] == "sample"
    said = "sample (instead of FineWeb-Edu: the hub cannot be reached"
    assert said in output.split("\n")[2], "said first"
    made = {p.name for p in flow.cache.iterdir()}
    made.discard("compile")  # PyTorch makes it, compiled or not
    assert made == {"tokenizers", "shards", "runs", "mlflow", "plans.jsonl"}
    assert (flow.folder("first") / "run.json").exists()


def test_no_text_of_a_run_breaks_its_report(sample: tuple[Flow, str]) -> None:
    flow, _ = sample
    page = (flow.folder("first") / "report.md").read_text()
    assert page.count("\n````") == 2, "the sample's block"
    assert "| training.sample_prompt | def a \\`\\`\\` \\| b |" in page


def test_metrics_have_the_promised_fields_at_the_promised_steps(sample: tuple[Flow, str]) -> None:
    flow, _ = sample
    lines = flow.metrics("first")
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == [1, 4, 8, 12]
    fields = {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "time"}
    assert all(fields | {"peak_memory_mib"} <= set(line) for line in trained)
    assert all(line["tokens"] == line["step"] * 4 * 32 for line in lines)
    validations = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in validations] == [0, 6, 12]


def test_every_task_is_in_prefect_by_name(sample: tuple[Flow, str], prefect_api: str) -> None:
    flow, _ = sample
    run_id = mlflow_run(flow, "first").data.tags["prefect.flow_run_id"]
    runs = api(prefect_api, "/task_runs/filter", task_runs={"flow_run_id": {"any_": [run_id]}})
    names = {run["name"]: run["state_name"] for run in runs}
    assert names == dict.fromkeys(TASKS, "Completed")
    logs = api(prefect_api, "/logs/filter", logs={"flow_run_id": {"any_": [run_id]}}, limit=200)
    text = "\n".join(line["message"] for line in logs)
    assert "step 12/12" in text and "saved" in text, "training's output is in the run's log"


def test_mlflow_has_settings_curves_dataset_and_report(sample: tuple[Flow, str]) -> None:
    flow, _ = sample
    run = mlflow_run(flow, "first")
    assert run.info.status == "FINISHED"
    assert run.data.params["training.max_steps"] == "12"
    assert run.data.tags["size"] == "custom" and run.data.tags["source"] == "sample"
    assert run.inputs.dataset_inputs[0].dataset.name == "sample"
    client = mlflow_client(flow)
    logged = {line["step"]: line["loss"] for line in flow.metrics("first") if "loss" in line}
    history = client.get_metric_history(run.info.run_id, "loss/train")
    assert {point.step: point.value for point in history} == logged
    by_tokens = client.get_metric_history(run.info.run_id, "loss/train_by_tokens")
    assert [point.step for point in by_tokens] == [128 * step for step in logged]
    wanted = {"loss/val", "loss/val_bpb", "optim/learning_rate", "optim/grad_norm"}
    assert wanted | {"perf/tokens_per_second", "perf/peak_memory_mib", "overfit/loss"} <= set(
        run.data.metrics
    )
    shares = [v for key, v in run.data.metrics.items() if key.startswith("time/")]
    assert len(shares) == len(goodput.PHASES) and sum(shares) == pytest.approx(1)
    assert "perf/mfu" not in run.data.metrics, "the peak of a CPU is not known"
    # The FLOPs of these twelve steps are less than one GFLOP
    others = ("system/", "loss/val_by_gflops", "loss/val_bpb_by_gflops", "loss/train_by_gflops")
    curves = [key for key in run.data.metrics if not key.startswith(others)]
    points = {key: len(client.get_metric_history(run.info.run_id, key)) for key in curves}
    assert min(points.values()) > 1, f"a chart of one point: {points}"
    shape = {"parameters": "34976", "num_hidden_layers": "2", "hidden_size": "32"}
    assert {f"model.{name}": number for name, number in shape.items()}.items() <= dict(
        run.data.params
    ).items()
    assert run.data.tags["version.torch"] == torch.__version__
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    plots = {"loss.png", "time.png", "overfit.png", "lengths.png"}
    assert plots | {"report.html", "data.html", "run.json"} <= files
    for name, count in (("report.html", 3), ("data.html", 1)):
        page = Path(client.download_artifacts(run.info.run_id, name)).read_text()
        assert page.count('src="data:image/png;base64,') == count, name


def test_seconds_of_the_report_add_up_and_times_tokens_per_second_are_the_tokens(
    sample: tuple[Flow, str],
) -> None:
    flow, output = sample
    report = flow.report("first")
    spent = report["time"]
    assert sum(spent["seconds"].values()) == pytest.approx(spent["wall_seconds"])
    seconds = spent["training_seconds"]
    assert report["tokens_per_second"] * seconds == pytest.approx(128 * 11), "12 but the first"
    assert spent["seconds"]["first_step"] > 0
    first, *trained = [line for line in flow.metrics("first") if "loss" in line]
    assert first["tokens_per_second"] is None
    steps = [b["step"] - a["step"] for a, b in pairwise([first, *trained])]
    taken = [128 * n / line["tokens_per_second"] for n, line in zip(steps, trained, strict=True)]
    # the logging of the last step comes after its line
    last = spent["seconds"]["logging"]
    assert seconds - last <= sum(taken) * (1 + 1e-6) and sum(taken) <= seconds
    assert (
        "time of training: " in output
        and "![share of the wall time" in (flow.folder("first") / "report.md").read_text()
    )


def test_checks_before_training_are_logged_and_reported(sample: tuple[Flow, str]) -> None:
    flow, output = sample
    number = len(flow.report("first")["preflight"]["checks"])
    assert output.index(f"pre-flight passed: {number} checks") < output.index("step 0: validation")
    assert "pre-flight: gradients: 20 of 20 parameters. They get" in output
    page = (flow.folder("first") / "report.md").read_text()
    assert f"| Pre-flight | passed: {number} checks |" in page
    assert "| causality | passed | earlier logits change by 0 | " in page


def test_counts_of_one_are_singular_in_all_output(sample: tuple[Flow, str]) -> None:
    flow, output = sample
    pages = [path.read_text() for path in flow.folder("first").glob("*.md")]
    things = "checks|documents|duplicates|epochs|files|micro-batches|parts|rows|runs|steps"
    assert " 1 part " in output and len(pages) >= 2
    for text in (output, *pages):
        assert re.findall(rf"(?<![\d.,])1 (?:{things})\b", text) == []


def test_why_each_stage_ran_is_logged_and_reported(sample: tuple[Flow, str]) -> None:
    flow, output = sample
    stages = flow.report("first")["stages"]
    assert not any(stage["reused"] for stage in stages.values())
    nothing, first = "none exists yet", "the run has no earlier one"
    assert {name: stage["why"] for name, stage in stages.items()} == {
        **dict.fromkeys(["tokenizer", "shards", "training"], nothing),
        **dict.fromkeys(["pre-flight", "overfit check"], first),
    }
    assert (output.count(nothing), output.count(first)) == (3, 2)
    page = (flow.folder("first") / "report.md").read_text()
    assert "| training | ran | none exists yet |" in page


def test_failed_check_before_training_ends_the_run_in_one_message(
    flow: Flow, tmp_path: Path
) -> None:
    """With attention that sees what comes later, in every process of the flow."""
    (tmp_path / "sitecustomize.py").write_text(BLIND_ATTENTION)
    before = flow.environment.get("PYTHONPATH", "")
    flow.environment |= {"PYTHONPATH": f"{tmp_path}{os.pathsep}{before}"}
    output = flow.run("--run-name=blind", "--data-mode=synthetic", *CHECKED_SHAPE, expect=1)
    assert re.search(r"error: pre-flight: 1 of \d+ checks failed, so nothing was trained", output)
    assert "causality: earlier logits change by " in output
    assert "look at the mask of `attend`" in output
    assert "--skip-preflight" in output and "Traceback" not in output
    assert "retry:" not in output, "it would fail again"
    assert output.count("pre-flight: causality: FAILED") == 1, "it is not tried again"
    url = flow.environment["PREFECT_API_URL"]
    runs = api(url, "/flow_runs/filter", flow_runs={"state": {"type": {"any_": ["FAILED"]}}})
    [run] = [run for run in runs if run["name"].endswith(" · blind")]
    assert run["state"]["message"].startswith("pre-flight: 1 of ")
    lines = api(url, "/logs/filter", logs={"flow_run_id": {"any_": [run["id"]]}})
    [error] = [line["message"] for line in lines if line["level"] >= logging.ERROR]
    assert error == run["state"]["message"], "one paragraph, without a traceback"
    assert not (flow.folder("blind") / "training.json").exists()
    assert not (flow.folder("blind") / "checkpoints").exists()


BLIND_ATTENTION = """
import torch.nn.functional as F

attend = F.scaled_dot_product_attention
F.scaled_dot_product_attention = lambda *qkv, is_causal=False, **rest: attend(*qkv, **rest)
"""


def test_run_is_compared_with_its_plan_and_the_next_plan_uses_its_measurements(
    sample: tuple[Flow, str], capsys: pytest.CaptureFixture[str], console: None
) -> None:
    flow, output = sample
    report = flow.report("first")
    held = {row["name"]: row for row in report["plan"]}
    assert held["tokens_per_second"]["measured"] == report["tokens_per_second"]
    assert held["memory_bytes"]["measured"] == report["peak_memory_bytes"]
    assert abs(held["memory_bytes"]["difference"]) < 0.2, "mostly what Python and PyTorch take"
    assert "plan of peak memory: " in output
    page = (flow.folder("first") / "report.md").read_text()
    assert "## Predicted and measured" in page
    threads, torch_threads = int(flow.environment["OMP_NUM_THREADS"]), torch.get_num_threads()
    torch.set_num_threads(threads)  # they are part of a CPU's name
    another = ["--seed=1", "--data-mode=sample", f"--cache-dir={flow.cache}", *SMALL_SHAPE]
    assert commands.main(["plan", *another]) == 0
    torch.set_num_threads(torch_threads)
    assert capsys.readouterr().out.count("from 1 earlier run here") == 2, "speed and memory"


def test_second_run_builds_nothing_and_trains_nothing(
    sample: tuple[Flow, str], prefect_api: str
) -> None:
    flow, _ = sample
    before = {p: p.stat().st_mtime_ns for p in built_files(flow.cache)}
    output = flow.run("--run-name=first", *CHECKED_SHAPE, "--log-interval=4")
    assert "tokenizer reused" in output and "shards reused" in output
    assert "(resumed)" in output
    assert {p: p.stat().st_mtime_ns for p in built_files(flow.cache)} == before
    newest = api(prefect_api, "/flow_runs/filter", sort="EXPECTED_START_TIME_DESC", limit=1)[0]
    runs = api(
        prefect_api, "/task_runs/filter", task_runs={"flow_run_id": {"any_": [newest["id"]]}}
    )
    states = {run["name"]: run["state_name"] for run in runs}
    reused = {name for name, state in states.items() if state == "Reused"}
    stages = {"fetch tokenizer", "build shards", "pre-flight", "train", "overfit check"}
    assert reused == stages and " to run: " not in output
    assert all(
        stage["reused"] and stage["why"] for stage in flow.report("first")["stages"].values()
    )


@pytest.mark.slow
def test_run_is_compared_with_earlier_ones_of_other_seeds(sample: tuple[Flow, str]) -> None:
    flow, output = sample
    assert "expected loss" not in output, "the first run has nothing to be compared with"
    page = (flow.folder("first") / "report.md").read_text()
    assert "| Expected loss | unknown: no earlier run" in page
    for seed, apart in ((7, 2.0), (8, -2.0)):
        other = shutil.copytree(flow.folder("first"), flow.folder(f"seed {seed}"))
        job = json.loads((other / "job.json").read_text())
        job["training"]["seed"] = seed
        (other / "job.json").write_text(json.dumps(job))
        lines = [m | {"loss": m["loss"] + apart} for m in flow.metrics("first") if "loss" in m]
        (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = flow.run("--run-name=another", "--seed=1", "--log-interval=4", *SMALL_SHAPE)
    assert "comparing the loss with earlier runs: first, seed 7, seed 8" in output
    assert "expected loss    in band (3 earlier runs)" in output
    page = (flow.folder("another") / "report.md").read_text()
    assert "| Expected loss | in band (3 earlier runs) |" in page
    assert flow.report("another")["expected_loss"]["runs"] == ["first", "seed 7", "seed 8"]
    assert mlflow_run(flow, "another").data.tags["expected_loss"] == "in band (3 earlier runs)"


def test_run_is_extended_by_more_steps_and_a_failed_check_fails_it(
    sample: tuple[Flow, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flow, _ = sample
    shutil.copytree(flow.folder("first"), flow.folder("longer"))
    settings = json.loads((flow.folder("longer") / "run.json").read_text())
    (flow.folder("longer") / "run.json").write_text(json.dumps(settings | {"run_name": "longer"}))
    for made in ("mlflow.json", "overfit.json"):
        (flow.folder("longer") / made).unlink()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    caplog.set_level(logging.INFO, logger="zeroflow")
    more = {"training": {"max_steps": 16}, "overfit": {"overfit_steps": 3}, "skip_preflight": True}
    with pytest.raises(OverfitFailed, match="the loss of one fixed batch went from") as failed:
        pretrain(RunConfig(run_name="longer", cache_dir=flow.cache, **more))
    assert "loss by step:" in str(failed.value)
    assert "for 3 steps (--overfit-steps)" in str(failed.value) and not may_succeed(failed.value)
    assert "resumed at step 12" in caplog.text
    why = flow.report("longer")["stages"]["training"]["why"]
    assert why.startswith("it was trained to step 12, and more steps are requested")
    assert f"training the model: {why}" in caplog.text
    assert flow.report("longer")["steps"] == 16
    assert "plan of training of steps 13 to 16: " in caplog.text
    [seconds] = [row for row in flow.report("longer")["plan"] if row["name"] == "seconds"]
    assert seconds["measured"] < flow.report("longer")["time"]["training_seconds"]
    page = (flow.folder("longer") / "report.md").read_text()
    number = len(flow.report("longer")["preflight"]["checks"])
    assert f"| Pre-flight | passed: {number} checks |" in page, "by the command before"
    assert flow.report("longer")["status"] == "failed"
    tracked = mlflow_run(flow, "longer")
    assert tracked.info.status == "FAILED"
    assert "; extended at step 12 from 12 to 16 steps: " in tracked.data.tags["mlflow.note.content"]


def test_generate_prints_text_and_export_opens_in_transformers(
    sample: tuple[Flow, str], tmp_path: Path, console: None, capsys: pytest.CaptureFixture[str]
) -> None:
    flow, _ = sample

    def zeroflow(*arguments: str) -> str:
        assert commands.main([*arguments, "--run=first", f"--cache-dir={flow.cache}"]) == 0
        return capsys.readouterr().out

    out = tmp_path / "exported"
    page = zeroflow("data")
    assert page.startswith("Data: sample-32-") and "def " in page and "padding" in page
    text = zeroflow("generate", "--prompt=def f", "--tokens=8")
    assert text.startswith("def f") and len(text) > len("def f\n")
    zeroflow("export", f"--out={out}")

    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    from zeroflow.inference import trained

    theirs, words = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ours = trained.load(flow.cache, "first")
    ids = torch.tensor([words.encode("def f(x):\n    return x\n")])
    with torch.no_grad():
        # fp32 on both sides; the order of additions differs
        torch.testing.assert_close(theirs(ids).logits, ours.model(ids), atol=1e-5, rtol=0)
    [answer] = pipeline("text-generation", str(out))("def f", do_sample=False, max_new_tokens=8)
    greedy = zeroflow("generate", "--prompt=def f", "--tokens=8", "--temperature=0")
    assert greedy == answer["generated_text"] + "\n"


@pytest.mark.slow
def test_training_without_a_remedy_left_ends_in_one_message(flow: Flow) -> None:
    """After three windows of data were skipped, two of which are in its ledger at the beginning."""
    before = {"time": 0, "process": 1, "reason": "diverged", "step": 0, "message": "it diverged"}
    ledger = RunFolder(flow.folder("mad")).ledger
    flow.folder("mad").mkdir(parents=True)
    for _ in range(2):
        entry = Entry(**before, action="left out", skip=Skip(step=0, batches=1))
        LEDGER.append(ledger, entry)
    mad = ["--learning-rate=1e30", "--warmup-steps=0", "--log-interval=1"]
    flags = ["--run-name=mad", "--data-mode=synthetic", *SMALL_SHAPE]
    output = flow.run(*flags, *mad, expect=1)
    assert "has loss" in output and "lower --learning-rate" in output
    assert "Traceback" not in output and output.count("error:") == 1
    assert [entry.skip.step for entry in LEDGER.read(ledger)] == [0, 0, 0]
    assert "3 windows of data were skipped without success" in output


@pytest.mark.slow
def test_closed_output_does_not_end_a_run(sample: tuple[Flow, str]) -> None:
    flow, _ = sample
    process = flow.start("--run-name=first")
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(HANG_SECONDS) == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data-mode=files"], "needs --data-path"),
        (["--hidden-size=32"], "needs --num-hidden-layers"),
        (["--seq-len=1"], "--seq-len: must be at least 2"),
        (["--max-steps=ten"], "--max-steps"),
        (["--data-mode=synthetic", "--tokenizer-name=gpt2"], "needs no tokenizer"),
    ],
)
def test_contradictory_settings_fail_before_anything_is_built(
    tmp_path: Path, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        commands.main(["pretrain", f"--cache-dir={tmp_path / 'cache'}", *flags])
    assert ended.value.code == 2
    complaint = capsys.readouterr().err
    assert words in complaint and "Traceback" not in complaint
    assert not (tmp_path / "cache").exists()


def built_files(cache: Path) -> list[Path]:
    built = [*(cache / "tokenizers").rglob("*"), *(cache / "shards").rglob("*")]
    built += (cache / "runs" / "first" / "checkpoints").rglob("*")
    return [path for path in built if path.is_file() and not path.name.endswith(".lock")]
