"""The pipeline as a notebook calls it, without Prefect."""

import logging

import pytest
from tiny import SHAPE

import zeroflow
from zeroflow import Rows, RunConfig, load, pipeline, pretrain
from zeroflow.settings.run_config import BuildChoice

TRAINING = {"seq_len": 32, "batch_size": 4, "grad_accum_steps": 1, "max_steps": 12}
TRAINING |= {"validation_tokens": 512, "learning_rate": 1e-2, "sample_tokens": 8}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that has been trained."""
    run = RunConfig(
        run_name="mine",
        cache_dir=tmp_path_factory.mktemp("notebook") / "cache",
        device="cpu",
        data={"data_mode": "sample"},
        tokenizer={"vocab_size": 512},
        skip_preflight=True,
        model=SHAPE.model_dump(),
        training=TRAINING,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        pretrain(run)
    return run


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
    with pytest.raises(ValueError, match=r"no run other in .*; there are: mine"):
        load("other", run.cache_dir)


def test_dask_needs_a_flow() -> None:
    with pytest.raises(ValueError, match="--data-runner dask needs a flow"):
        pipeline.View().builders(BuildChoice(data_runner="dask"))


def test_public_names_are_documented() -> None:
    assert all(getattr(zeroflow, name).__doc__ for name in zeroflow.__all__)
