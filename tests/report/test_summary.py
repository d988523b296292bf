"""The last lines of a run's command."""

import shlex
from pathlib import Path

import pytest

from zeroflow.data.validation_sample import SampleCounts
from zeroflow.report.records import (
    CorpusFigures,
    ExpectedLoss,
    OverfitFigures,
    RunReport,
    TimeFigures,
    TokenizerFigures,
)
from zeroflow.report.summary import summary
from zeroflow.run_folder import DEFAULT_CACHE, RunFolder
from zeroflow.training.goodput import PHASES

SECONDS = dict.fromkeys(PHASES, 0.0) | {"forward_backward": 90.0, "start": 10.0}


def report(**changes) -> RunReport:
    made = RunReport(
        device="a CPU",
        precision="fp32",
        status="completed",
        run="mine",
        size="tiny",
        parameters=15_403_840,
        steps=1_200,
        tokens=614_400,
        train_loss=6.9,
        first_val_loss=10.41512,
        val_loss=7.28312,
        val_bpb=2.3884,
        entropy=None,
        overfit=OverfitFigures(passed=True, loss=0.0859, steps=32),
        tokens_per_second=1077.4,
        mfu=None,
        peak_memory_bytes=2**30,
        resume="bit for bit",
        data=CorpusFigures(
            mode="sample",
            name="sample",
            revision=None,
            synthetic_fallback=False,
            documents=10,
            train_rows=100,
            epochs=0.5,
            path="shards",
        ),
        tokenizer=TokenizerFigures(name="train", revision=None, vocab_size=300, fingerprint="f"),
        checkpoint="runs/mine/checkpoints/step-00001200",
        sample="def",
        time=TimeFigures(
            wall_seconds=100.0,
            training_seconds=90.0,
            goodput=0.9,
            seconds=SECONDS,
            shares={phase: seconds / 100 for phase, seconds in SECONDS.items()},
            restarts=0,
            steps_again=0,
        ),
    )
    return made.replace(**changes)


def lines(cache: Path, found: RunReport) -> dict[str, str]:
    """The lines of the summary of a run in `cache`, by their first column."""
    file = RunFolder(cache / "runs" / "mine").report
    found.write(file)
    text = summary(file, cache)
    return {line[2:18].strip(): line[19:] for line in text.splitlines() if line.startswith("  ")}


def test_figures_are_those_of_the_report(tmp_path):
    found = lines(tmp_path, report())
    assert found["validation loss"] == "10.4151 -> 7.2831, 2.388 bits per byte"
    assert found["trained"] == "1,200 steps, 614,400 tokens, 1,077 tokens/s"
    assert found["overfit check"] == "passed: loss 0.0859 after 32 steps"
    assert found["time"].startswith("1 min 40 s: forward/backward 90.0%, start 10.0%")
    assert found["report"] == f"{tmp_path}/runs/mine/report.md"
    assert "expected loss" not in found, "there were no earlier runs"


def test_share_of_unknown_tokens_is_next_to_the_bits_per_byte(tmp_path):
    counts = SampleCounts(rows=8, documents=9, tokens=1000, text_bytes=4000, unknown=26)
    for validated, remark in (
        (counts, " (unknown tokens, 2.60%, count no bytes)"),
        (counts.replace(unknown=0), ""),
        (counts.replace(unknown=None), ""),
    ):
        found = lines(tmp_path, report(validated=validated))
        assert found["validation loss"] == f"10.4151 -> 7.2831, 2.388 bits per byte{remark}"


def test_optional_figures_are_shown_if_they_are_known(tmp_path):
    expected = ExpectedLoss(
        earlier=2,
        tokens=614_400,
        apart=0.0,
        judged=True,
        since=None,
        until=None,
        distance=0.0,
        verdict="in band (2 earlier runs)",
        runs=("a", "b"),
    )
    some = report(mfu=0.476, entropy=1.25061, val_bpb=None, expected_loss=expected)
    found = lines(tmp_path, some)
    assert found["trained"].endswith("tokens/s, MFU 47.6%")
    assert found["validation loss"] == "10.4151 -> 7.2831 (entropy of the data 1.2506)"
    assert found["expected loss"] == "in band (2 earlier runs)"
    assert lines(tmp_path, report(tokens_per_second=None))["trained"].endswith("unknown")


@pytest.mark.parametrize("folder", ["cache", "a folder"])
def test_commands_can_be_pasted_into_a_shell(tmp_path, folder):
    cache = tmp_path / folder
    found = lines(cache, report())
    generate = shlex.split(found["text"])
    assert generate[-7:] == [
        *("generate", "--run", "mine", "--cache-dir", str(cache)),
        *("--prompt", "..."),
    ]
    assert shlex.split(found["transformers"])[-7:-2] == [
        *("export", "--run", "mine", "--cache-dir", str(cache))
    ]


def test_text_generation_is_not_offered_for_a_model_of_token_ids(tmp_path):
    data = report().data.replace(mode="synthetic", name="synthetic")
    found = lines(tmp_path, report(data=data))
    assert "text" not in found and "transformers" in found


def test_default_folder_is_not_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = lines(DEFAULT_CACHE, report())
    assert not any("--cache-dir" in text for text in found.values())
