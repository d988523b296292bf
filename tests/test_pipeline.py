"""The pipeline as a notebook calls it, without Prefect."""

import logging
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from contextvars import ContextVar
from io import StringIO
from pathlib import Path

import pytest
from faults import asking
from hub import TOKEN, Hub, llama_tokenizer_repo
from markdown_it import MarkdownIt
from public_tokenizers import of_bytes, save
from tiny import SHAPE, contents, jsonl_corpus

import zeroflow
from zeroflow import Rows, RunConfig, artifacts, load, pipeline, pretrain
from zeroflow.checks.check import Check
from zeroflow.checks.overfit import OverfitFailed, OverfitResult
from zeroflow.checks.preflight import PreflightFailed, PreflightResult
from zeroflow.cli import commands
from zeroflow.inference import evaluation, trained
from zeroflow.inference.export import export
from zeroflow.report.pages import Page
from zeroflow.settings.settle import settle
from zeroflow.stages.prepare import build_together
from zeroflow.training import checkpoint, tracked
from zeroflow.training.failures import TrainingFailed
from zeroflow.training.metrics import METRICS, ValidationRecord

TRAINING = {"seq_len": 32, "batch_size": 4, "grad_accum_steps": 1, "max_steps": 12}
TRAINING |= {"validation_tokens": 512, "learning_rate": 1e-2, "sample_tokens": 8}


QUOTES = (
    "![logo](logo.png) A project's readme.",
    "| a | b |\n|---|---|\n| ``` | x |",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "\x1b[31mred\x1b[0m \x1b]0;title\x07 bell",
    "```\n![x](../../secret.png)\n```\n# heading",
)


FAILED = {"name": "a check", "passed": False, "figure": "0", "sentence": "Change this"}


def preflight_failed(*checks: Check) -> PreflightFailed:
    return PreflightFailed(PreflightResult(passed=False, seconds=1, checks=[*checks]))


class Broken(pipeline.View):
    """Shows pages nowhere: each of them fails."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.alerts: list[tuple[str, str]] = []

    def alert(self, condition: str, message: str) -> None:
        self.alerts.append((condition, message))

    def page(self, page: Page, subject: str) -> None:
        assert page.embedded
        self.asked.append(subject)
        raise ConnectionError("nobody is there")


@pytest.fixture(scope="module")
def view() -> Broken:
    return Broken()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, view: Broken) -> RunConfig:
    """A run trained on documents that quote markup, with a tokenizer in a folder of its own."""
    folder = tmp_path_factory.mktemp("notebook")
    texts = [f"def {QUOTES[i % len(QUOTES)]} " + "some more words. " * (i % 17) for i in range(600)]
    jsonl_corpus(folder / "quotes.jsonl", texts)
    jsonl_corpus(folder / "judged.jsonl", texts[:9])
    (folder / "tokenizer").mkdir()
    for name, content in llama_tokenizer_repo(vocab_size=512).contents.items():
        (folder / "tokenizer" / name).write_bytes(content)
    run = RunConfig(
        run_name="mine",
        cache_dir=folder / "cache",
        device="cpu",
        data={"data_mode": "files", "data_path": [str(folder / "quotes.jsonl")]},
        tokenizer={"tokenizer_name": str(folder / "tokenizer")},
        skip_preflight=True,
        model=SHAPE.model_dump(),
        training=TRAINING,
        evaluation={"evaluate_path": [str(folder / "judged.jsonl")]},
        register_="texts",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        pipeline.pretrain(run, view=view)
    return run


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_work_in_the_background_ends_with_its_block_and_has_its_context(error) -> None:
    name, begun, seen = ContextVar("name", default=""), threading.Event(), list[str]()

    def work() -> None:
        begun.wait()
        seen.append(name.get())

    name.set("a flow run")
    with suppress(KeyboardInterrupt), pipeline.in_background(work) as wait:
        assert seen == []
        begun.set()
        if error:
            raise error
        wait()
        assert seen == ["a flow run"]
    assert seen == ["a flow run"]


def test_run_on_documents_that_quote_markup_shows_them_as_text(run: RunConfig) -> None:
    """Also where no page can be shown."""
    data, report = (
        (Path(run.run_dir) / name).read_text(encoding="utf-8") for name in ("data.md", "report.md")
    )
    for page in (data, report):
        assert not set(page) & set("\x1b\x07"), "a terminal would obey it"
    tokens = MarkdownIt("commonmark").enable("table").parse(data)
    samples = [token.content for token in tokens if token.type == "fence"]
    assert len(samples) == 3 and any("![logo](logo.png)" in sample for sample in samples)
    plots = [c.attrs["src"] for t in tokens for c in t.children or () if c.type == "image"]
    assert plots == ["lengths.png"]


def test_page_that_cannot_be_shown_does_not_end_a_run(run: RunConfig, view: Broken) -> None:
    assert view.asked == ["data", "overfit", "report", "evaluation"]
    assert (run.run_dir / "report.md").exists()


def test_people_are_told_once_that_a_run_is_complete(run: RunConfig, view: Broken) -> None:
    [(condition, message)] = view.alerts
    assert condition == "done" and message.startswith("validation loss ")
    assert message.endswith(" bits per byte after 12 steps")
    again = Broken()
    pipeline.pretrain(run, view=again)
    assert again.asked and not again.alerts


def test_finished_run_returns_at_once_with_its_report(
    run: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="zeroflow"):
        report = pretrain(run)
    assert report.status == "completed" and report.steps == 12
    assert report.val_loss < report.first_val_loss
    assert not any("training the model" in message for message in caplog.messages)


def test_loaded_model_writes_text_and_its_rows_can_be_read(run: RunConfig) -> None:
    loaded = load("mine", run.cache_dir)
    assert loaded.generate("def f", tokens=4).startswith("def f")
    with pytest.raises(ValueError, match=r"the prompt def .udcff is not UTF-8"):
        loaded.generate("def \udcff")
    rows = loaded.rows("train")
    assert isinstance(rows, Rows) and len(rows) > 0
    assert rows[[0, 1]].shape == (2, 33)
    assert loaded.step == 12
    for wrong, message in (
        ([0, len(rows)], f"there is no row {len(rows)}: rows are numbered from 0 to "),
        ([0, -1], "there is no row -1: "),
        (0, "rows are read by a list of their numbers"),
    ):
        with pytest.raises(IndexError, match=message):
            rows[wrong]


def test_wrong_uses_in_python_are_refused_in_a_sentence(run: RunConfig) -> None:
    loaded = load("mine", run.cache_dir)
    with pytest.raises(ValueError, match=r"^tokens: must be greater than 0 \(found -1\)$"):
        loaded.generate("a", tokens=-1)
    with pytest.raises(ValueError, match=r"^foo: there is no such setting \(found 1\)$"):
        loaded.generate("a", foo=1)
    with pytest.raises(ValueError, match="a prompt is a text, not None"):
        loaded.generate(None)
    with pytest.raises(ValueError, match="there is no split 'test': use train or validation"):
        loaded.rows("test")
    with pytest.raises(ValueError, match=r"settings are a RunConfig, not {.*}: use"):
        pretrain({"run_name": "mine"})
    with pytest.raises(ValueError, match=r"has no checkpoint of step 7, only of steps (\d+, )*12"):
        load("mine", run.cache_dir, step=7)
    with pytest.raises(ValueError, match=r"no run other in .*; existing runs: mine"):
        load("other", run.cache_dir)


def test_generate_prints_texts_of_a_run_a_checkpoint_and_a_folder(
    run: RunConfig, console, capsys, monkeypatch, tmp_path: Path
) -> None:
    def printed(*flags: str) -> str:
        assert commands.main(["generate", *flags, "--tokens=9"]) == 0
        return capsys.readouterr().out

    of_run = ["--run=mine", f"--cache-dir={run.cache_dir}"]
    loaded = load("mine", run.cache_dir)
    greedy = loaded.generate("def f", tokens=9, temperature=0)
    newest = printed(*of_run, "--prompt=def f", "--temperature=0")
    assert newest == greedy + "\n"
    assert printed(*of_run, "--step=12", "--prompt=def f", "--temperature=0") == newest

    first, second = (loaded.generate("def f", tokens=9, seed=seed) for seed in (7, 8))
    several = printed(*of_run, "--prompt=def f", "--seed=7", "--samples=2")
    assert several == (f"--- text 1 of 2, seed 7\n{first}\n--- text 2 of 2, seed 8\n{second}\n")
    letter = first[len("def f") + 1]
    stopped = printed(*of_run, "--prompt=def f", "--seed=7", f"--stop={letter}")
    assert stopped == "def f" + first[len("def f") :].split(letter)[0] + "\n"

    monkeypatch.setattr("sys.stdin", StringIO("def f\n\n"))
    lines = printed(*of_run, "--interactive", "--temperature=0")
    assert lines == newest + loaded.generate("", tokens=9, temperature=0) + "\n"

    export(loaded.model, loaded.tokenizer, tmp_path / "hf", context=loaded.context)
    capsys.readouterr()
    assert printed(f"--from={tmp_path / 'hf'}", "--prompt=def f", "--temperature=0") == newest


@pytest.fixture
def source(run: RunConfig, tmp_path: Path) -> Iterator[Path]:
    """The folder that the run's tokenizer was copied from; put back as it was."""
    folder = Path(run.tokenizer.tokenizer_name)
    shutil.copytree(folder, tmp_path / "kept")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tmp_path / "kept", folder)


def test_other_tokenizer_in_the_same_folder_is_refused_and_nothing_is_written(
    run: RunConfig, source: Path
) -> None:
    before = contents(run.run_dir)
    text = load("mine", run.cache_dir).generate("def f", tokens=4, temperature=0)
    save(source, of_bytes(), {"eos_token": "<|endoftext|>"})
    longer = run.model_dump(exclude_unset=True) | {"training": TRAINING | {"max_steps": 99}}
    with pytest.raises(ValueError, match=r"other files in the tokenizer .* \(tokenizer.json, .*\)"):
        pretrain(RunConfig.model_validate(longer))
    assert contents(run.run_dir) == before
    assert load("mine", run.cache_dir).generate("def f", tokens=4, temperature=0) == text


def test_run_keeps_its_copy_of_a_tokenizer_that_has_changed_or_is_missing(
    run: RunConfig, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = load("mine", run.cache_dir).tokenizer
    save(source, of_bytes(), {"eos_token": "<|endoftext|>"})
    resumed = RunConfig(run_name="mine", cache_dir=run.cache_dir)
    assert pretrain(resumed).steps == 12
    assert "has changed (tokenizer.json, tokenizer_config.json" in caplog.text
    shutil.rmtree(source)
    for again in (resumed, run):
        assert pipeline.fetch_tokenizer(settle(again).run).path == copy.path
    unnamed = run.model_copy(update={"run_name": None})
    assert settle(unnamed).run.tokenizer == run.tokenizer, "without asking the hub"


def test_missing_copy_is_made_again_only_from_the_same_files(
    run: RunConfig, source: Path, tmp_path: Path
) -> None:
    copy = load("mine", run.cache_dir).tokenizer
    assert copy.path is not None
    kept = tmp_path / "copy"
    copy.path.rename(kept)
    with pytest.raises(ValueError, match=r"is missing or damaged: run the command of the run"):
        load("mine", run.cache_dir)
    before = contents(run.run_dir)
    resumed = RunConfig(run_name="mine", cache_dir=run.cache_dir, training={"max_steps": 99})
    (source / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=r"has changed since \(.*\): restore one of them"):
        pretrain(resumed)
    source.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="is gone: restore one of them"):
        pretrain(resumed)
    assert contents(run.run_dir) == before
    kept.rename(copy.path)


def test_checkpoints_of_another_tokenizer_are_refused_before_the_job_is_replaced(
    run: RunConfig,
) -> None:
    job = trained.job(run.cache_dir, "mine")
    before = contents(run.run_dir)
    other = job.replace(tokenizer=job.tokenizer.replace(fingerprint="other"))
    with pytest.raises(ValueError, match="was trained on ids of tokenizer"):
        tracked.train(other)
    assert contents(run.run_dir) == before

    other.write(job.folder.job)  # as an earlier version did
    with pytest.raises(ValueError, match="restore the earlier files of the tokenizer"):
        load("mine", run.cache_dir)
    job.write(job.folder.job)


def test_complete_run_is_shown_without_its_text_and_is_not_rebuilt_from_other_text(
    run: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    [text] = map(Path, run.data.data_path)
    content = text.read_bytes()
    for change, problem in (
        (text.unlink, "matches no file"),
        (lambda: jsonl_corpus(text, ["x"]), "changed"),
    ):
        change()
        with caplog.at_level(logging.WARNING, logger="zeroflow"):
            assert pretrain(run).steps == 12
        assert f"{problem}" in caplog.messages[0] and "Run mine is complete" in caplog.messages[0]
        caplog.clear()
    more = run.replace(training=TRAINING | {"max_steps": 13})
    with pytest.raises(ValueError, match="files of --data-path have changed"):
        pretrain(more)
    [part] = load("mine", run.cache_dir).shards.part_paths
    rows = next(part.glob("*.arrow"))
    sound = rows.read_bytes()
    rows.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="files of --data-path have changed"):
        pretrain(run)
    rows.write_bytes(sound)
    text.write_bytes(content)
    assert pretrain(run).steps == 12


def test_complete_run_of_a_gpu_is_shown_on_a_machine_without_one(
    run: RunConfig, tmp_path: Path
) -> None:
    """Its records say that it was trained on a GPU; only what is left to do needs one."""
    cache = tmp_path / "elsewhere"
    shutil.copytree(run.cache_dir, cache)
    here = run.replace(cache_dir=cache, device="auto")
    folder, place = here.folder, {"device": "cuda", "device_name": "NVIDIA L4"}
    settings, job, overfit = map(artifacts.read_json, (folder.settings, folder.job, folder.overfit))
    artifacts.write_json(folder.settings, settings | {"device": "cuda"})
    job["training"]["workload"] |= place
    artifacts.write_json(folder.job, job)
    overfit["identity"]["training"]["compute"]["device"] = "cuda"
    overfit["job"] = artifacts.fingerprint(list(overfit["identity"].values()))
    artifacts.write_json(folder.overfit, overfit)
    for device in ("cuda", "cpu"):
        assert settle(here.replace(device=device)).run.device == "cuda"
    report = pretrain(here)
    assert (report.status, report.device) == ("completed", "NVIDIA L4")
    assert artifacts.read_json(folder.settings)["device"] == "cuda"

    more = here.replace(training=TRAINING | {"max_steps": 13})
    with pytest.raises(ValueError, match="--device cuda, but PyTorch sees no GPU"):
        pretrain(more)
    shutil.rmtree(folder.checkpoints)
    with pytest.raises(ValueError, match="--device cuda, but PyTorch sees no GPU"):
        pretrain(here)


@pytest.mark.parametrize(
    ("expected", "error"),
    [
        (True, TrainingFailed("a rank was killed", "killed")),
        (True, OSError("the disk is full")),
        (True, preflight_failed(Check(**FAILED, may_pass_again=True))),
        (True, pipeline.SweepFailed("1 run failed", may_succeed=True)),
        (False, ValueError("a wrong setting")),
        (False, TrainingFailed("use another learning rate", "diverged")),
        (False, TrainingFailed("use a smaller size", "out of memory")),
        (False, preflight_failed(Check(**FAILED, may_pass_again=True), Check(**FAILED))),
        (False, OverfitFailed(OverfitResult(passed=False, loss=1, steps=1, reason="", curve=[1]))),
        (False, pipeline.SweepFailed("1 run failed", may_succeed=False)),
    ],
)
def test_retry_is_offered_only_where_the_same_command_may_succeed(expected, error) -> None:
    assert pipeline.may_succeed(error) is expected


def test_public_names_are_documented() -> None:
    assert all(getattr(zeroflow, name).__doc__ for name in zeroflow.__all__)


def test_run_reads_the_shards_that_the_shards_command_built(run, tmp_path):
    """Also for a GPU that this machine does not have."""
    there = load("mine", run.cache_dir).shards
    elsewhere = run.replace(cache_dir=tmp_path)
    done = build_together(elsewhere)
    assert (done.path.name, done.built, done.parts) == (there.path.name, there.parts, there.parts)
    for number in range(there.parts):
        assert contents(done.path / f"part-{number:05d}") == contents(there.part(number))
    assert not (tmp_path / "runs").exists(), "nothing of the run is recorded"
    assert build_together(elsewhere).built == 0
    for_gpu = elsewhere.replace(device="auto", data=run.data, run_name=None)
    assert build_together(for_gpu, gpu="H100").path == done.path


def test_run_is_evaluated_in_the_end_as_asked_for(run: RunConfig) -> None:
    [found] = evaluation.read(run.folder).steps
    [score] = found.texts
    assert found.step == 12 and score.text == run.evaluation.evaluate_path[0]
    assert f"| {score.loss:.4f} ± " in (run.run_dir / "report.md").read_text(encoding="utf-8")


def test_export_command_writes_a_model_with_its_card_and_uploads_it(
    run: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], console: None
) -> None:
    of_run = ["export", "--run=mine", f"--cache-dir={run.cache_dir}"]
    with Hub([]) as hub, asking(hub.url) as patch:
        assert commands.main([*of_run, f"--out={tmp_path / 'a'}", "--push=me/mine"]) == 1
        assert "an upload needs a login" in capsys.readouterr().err
        assert not (tmp_path / "a").exists(), "nothing is exported before the login is checked"
        patch.setenv("HF_TOKEN", "wrong")
        assert commands.main([*of_run, f"--out={tmp_path / 'a'}", "--push=me/mine"]) == 1
        assert "does not accept an upload with this login (401)" in capsys.readouterr().err

        patch.setenv("HF_TOKEN", TOKEN)
        assert commands.main([*of_run, f"--out={tmp_path / 'b'}", "--push=me/mine"]) == 0
        said = capsys.readouterr().out.splitlines()
        assert said[-1] == f"{hub.url}/me/mine" and str(tmp_path / "b") in said
        assert hub.repos["model", "me/mine"].contents == contents(tmp_path / "b")
        assert hub.created["me/mine"]["visibility"] == "private"
    assert (tmp_path / "b" / "README.md").read_text().count("\n# mine\n") == 1
    assert contents(tmp_path / "a").keys() == contents(tmp_path / "b").keys()


def test_run_registers_its_models_with_their_losses_and_scores(
    run: RunConfig, capsys: pytest.CaptureFixture[str], console: None
) -> None:
    from mlflow.tracking import MlflowClient

    store = MlflowClient(f"sqlite:///{run.cache_dir / 'mlflow' / 'mlflow.db'}")
    best = checkpoint.best(run.folder.checkpoints)
    assert best is not None
    steps = {12, checkpoint.step_of(best)}
    [experiment] = store.search_experiments(filter_string="name = 'zeroflow'")
    found = store.search_logged_models([experiment.experiment_id])
    models = {model.params["step"]: model for model in found}
    assert models.keys() == {str(step) for step in steps}
    records = METRICS.read(run.folder.metrics)
    last = [record for record in records if isinstance(record, ValidationRecord)][-1]
    [score] = evaluation.read(run.folder).steps[0].texts
    figures = {(metric.key, metric.dataset_name): metric.value for metric in models["12"].metrics}
    assert figures["loss/val_bpb", "files"] == last.val_bpb
    key = re.sub(r"[^\w.-]+", "_", score.text)
    assert figures[f"scores/{key}/bpb", score.text] == score.bpb
    again = pipeline.register(settle(run).run)
    assert again.reused and len(again.versions) == len(steps)
    assert [version.is_best for version in again.versions].count(True) == 1

    argv = ["export", "--run=mine", f"--cache-dir={run.cache_dir}", "--register=other"]
    assert commands.main(argv) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == "registered as models:/other/1, which is also other@best"


def test_mlflow_that_fails_does_not_end_a_run_whose_model_is_registered(
    run: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(run.cache_dir, tmp_path / "cache")
    (tmp_path / "cache" / "mlflow" / "mlflow.db").write_text("not a database")
    settled = settle(run.replace(cache_dir=tmp_path / "cache")).run
    found = pipeline.register(settled)
    assert found.versions == () and not found.reused
    [warning] = [each for each in caplog.messages if "did not register the model" in each]
    assert "the same command tries again" in warning


def test_runs_are_compared_only_on_the_same_text_for_validation(run: RunConfig) -> None:
    settled = settle(run).run
    same = settled.replace(data=settled.data.replace(data_path=("elsewhere.jsonl",)), seed=5)
    assert same.held_out == settled.held_out
    own = {"validation_path": ("v.jsonl",), "validation_revision": "v"}
    with_own = settled.replace(data=settled.data.replace(**own))
    other = {
        "text": settled.replace(data=settled.data.replace(data_revision="0")),
        "fraction": settled.replace(training=settled.training.replace(validation_fraction=0.1)),
        "tokens": settled.replace(training=settled.training.replace(validation_tokens=1024)),
        "own": with_own,
    }
    assert len({settled.held_out, *(each.held_out for each in other.values())}) == 5
    # The text to train on does not matter if validation has its own
    trained_on_more = with_own.replace(data=with_own.data.replace(data_revision="1"))
    assert trained_on_more.held_out == with_own.held_out
