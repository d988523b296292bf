"""The pipeline as a notebook calls it, without Prefect."""

import logging
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from tiny import SHAPE, jsonl_corpus

import zeroflow
from zeroflow import Rows, RunConfig, load, pipeline, pretrain
from zeroflow.report.pages import Page
from zeroflow.settings.run_config import BuildChoice

TRAINING = {"seq_len": 32, "batch_size": 4, "grad_accum_steps": 1, "max_steps": 12}
TRAINING |= {"validation_tokens": 512, "learning_rate": 1e-2, "sample_tokens": 8}


QUOTES = (
    "![logo](logo.png) A project's readme.",
    "| a | b |\n|---|---|\n| ``` | x |",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "\x1b[31mred\x1b[0m \x1b]0;title\x07 bell",
    "```\n![x](../../secret.png)\n```\n# heading",
)


class Broken(pipeline.View):
    """Shows pages nowhere: each of them fails."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def page(self, page: Page, subject: str, run_name: str) -> None:
        assert page.embedded
        self.asked.append(subject)
        raise ConnectionError("nobody is there")


@pytest.fixture(scope="module")
def view() -> Broken:
    return Broken()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, view: Broken) -> RunConfig:
    """A run that has been trained on documents that quote markup."""
    folder = tmp_path_factory.mktemp("notebook")
    texts = [f"def {QUOTES[i % len(QUOTES)]} " + "some more words. " * (i % 17) for i in range(600)]
    jsonl_corpus(folder / "quotes.jsonl", texts)
    run = RunConfig(
        run_name="mine",
        cache_dir=folder / "cache",
        device="cpu",
        data={"data_mode": "files", "data_path": [str(folder / "quotes.jsonl")]},
        tokenizer={"tokenizer_name": "train", "vocab_size": 512},
        skip_preflight=True,
        model=SHAPE.model_dump(),
        training=TRAINING,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        pipeline.pretrain(run, view=view)
    return run


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
    pictures = [c.attrs["src"] for t in tokens for c in t.children or () if c.type == "image"]
    assert pictures == ["lengths.png"]


def test_page_that_cannot_be_shown_ends_no_run(run: RunConfig, view: Broken) -> None:
    assert view.asked == ["data", "overfit", "report"]
    assert (run.run_dir / "report.md").exists()


def test_finished_run_returns_at_once_with_its_report(
    run: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="zeroflow"):
        report = pretrain(run)
    assert report.status == "completed" and report.steps == 12
    assert report.val_loss < report.first_val_loss
    assert not any("training the model" in message for message in caplog.messages)


def test_loaded_model_writes_text_and_its_rows_can_be_read(run: RunConfig) -> None:
    trained = load("mine", run.cache_dir)
    assert trained.generate("def f", tokens=4).startswith("def f")
    rows = trained.rows("train")
    assert isinstance(rows, Rows) and len(rows) > 0
    assert rows[[0, 1]].shape == (2, 33)
    with pytest.raises(ValueError, match=r"no run other in .*; existing runs: mine"):
        load("other", run.cache_dir)


def test_dask_needs_a_flow() -> None:
    with pytest.raises(ValueError, match="--data-runner dask needs a flow"):
        pipeline.View().builders(BuildChoice(data_runner="dask"))


def test_public_names_are_documented() -> None:
    assert all(getattr(zeroflow, name).__doc__ for name in zeroflow.__all__)
