"""Settings as flags of a command line, and back."""

import argparse
import os
from pathlib import Path

import pytest
from pydantic import ValidationError
from tiny import SHAPE

from zeroflow.cli import arguments
from zeroflow.inference.evaluation import EvaluationConfig
from zeroflow.settings import flags
from zeroflow.settings.flags import error_message
from zeroflow.settings.proof import ProofRun
from zeroflow.settings.run_config import RunConfig, leaves
from zeroflow.settings.sweep import SweepConfig
from zeroflow.settings.zero_lab import ZeroLabRun
from zeroflow.training.sampling import SamplingConfig


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="program")
    arguments.add_settings(made, RunConfig, "run")
    return made


def read(*argv: str) -> RunConfig:
    return RunConfig.model_validate(arguments.read_settings(RunConfig, parser().parse_args(argv)))


RUNS = [
    RunConfig(),
    RunConfig(
        sweep="ours",
        run_name="mine.1",
        cache_dir="/some/where",
        device="cpu",
        seed=7,
        model=SHAPE.model_dump(),
        data={
            "data_mode": "files",
            "data_path": ("a/*.txt", "b.jsonl"),
            "text_column": "body",
            "bad_lines_limit": 3,
            "deduplicate": True,
            "data_revision": "abc",
            "validation_path": ("c.txt",),
            "validation_revision": "fed",
        },
        tokenizer={
            "tokenizer_name": "train",
            "vocab_size": 1234,
            "tokenizer_revision": "def",
            "end_of_text": "<end>",
        },
        training={
            "gpus": 4,
            "zero_stage": 3,
            "shard_group": 4,
            "reshard_group": 2,
            "offload": "optimizer",
            "seq_len": 64,
            "batch_size": 2,
            "grad_accum_steps": 3,
            "batch_tokens": 384,
            "max_steps": 50,
            "nodes": 2,
            "learning_rate": 1.5e-4,
            "warmup_steps": 4,
            "schedule": "wsd",
            "precision": "bf16",
            "fp8": True,
            "compile": True,
            "document_mask": True,
            "z_loss": 1e-5,
            "validation_tokens": 640,
            "validation_fraction": 0.25,
            "token_type": "uint16",
            "packing": "concat",
            "validate_every": 11,
            "checkpoint_every": 12,
            "keep_checkpoints": 3,
            "keep_every": 24,
            "deterministic": True,
            "activation_checkpointing": "full",
            "on_spike": "roll-back",
            "hang_seconds": 600,
            "log_interval": 13,
            "sample_prompt": "Once upon - a time",
            "sample_tokens": 5,
        },
        optimizer={
            "beta1": 0.85,
            "beta2": 0.99,
            "epsilon": 1e-7,
            "weight_decay": 0.0,
            "max_grad_norm": 0.5,
        },
        build={"data_workers": 3, "data_runner": "dask", "dask_address": "tcp://a:1"},
        hosts={
            "min_nodes": 1,
            "local_cache": "/scratch",
            "launcher": "kubernetes",
            "sbatch_options": "--time=1:00 --x=y",
            "image": "a/b:1",
            "volume_claim": "c",
            "namespace": "d",
        },
        overfit={"overfit_steps": 33, "overfit_loss": 0.2},
        evaluation={
            "evaluate_path": ("a.txt", "b/*.jsonl"),
            "evaluate_tasks": ("piqa",),
            "evaluate_task_path": "own",
            "evaluate_core_path": Path("bundle"),
        },
        log_to=("tensorboard",),
        skip_preflight=True,
        register_="texts",
    ),
    RunConfig(
        model={"init_from": "run:ours@20"},
        data={"data_mode": "hub", "dataset": "a/b", "dataset_config": "c"},
    ),
    RunConfig(
        model={"size": "small"},
        data={"fineweb_subset": "sample-100BT", "allow_synthetic_fallback": True},
        training={"compile": False},
    ),
]


@pytest.mark.parametrize("run", RUNS)
def test_flags_of_a_run_reproduce_the_run(run):
    assert read(*flags.flags(run)) == run


def test_the_runs_above_change_every_setting():
    defaults = dict(leaves(RunConfig()))
    changed = {name for run in RUNS for name, value in leaves(run) if value != defaults[name]}
    assert changed == set(defaults) - {"optimizer.name"}  # the runs are of the default's


def test_every_setting_has_its_own_flag():
    found = [setting.flag for setting in flags.settings(RunConfig)]
    named = {".".join(setting.path) for setting in flags.settings(RunConfig)}
    assert named >= {name for name, _ in leaves(RunConfig())}
    assert len(set(found)) == len(found)
    for setting in flags.settings(RunConfig):
        assert setting.field.description, setting.flag


def test_only_what_is_given_is_set():
    run = read("--max-steps", "9", "--model-size", "small")
    assert run.model_fields_set == {"training", "model"}
    assert run.training.model_fields_set == {"max_steps"}
    assert run.model.size == "small"
    assert read() == RunConfig() and not read().model_fields_set


def test_value_of_the_wrong_kind_is_refused_by_its_flag(capsys):
    for setting in flags.settings(RunConfig):
        kind = setting.field.annotation
        if (
            kind in (str, str | None, Path, Path | None)
            or kind == tuple[str, ...]
            or "bool" in str(kind)
        ):
            continue
        try:
            read(setting.flag, "banana")
        except ValidationError as error:
            message = error_message(error)
            found = f"{setting.flag}: " in message and "'banana'" in message
            assert found or f"{setting.flag} has no effect with" in message
        except SystemExit:
            assert f"{setting.flag}: invalid choice: 'banana'" in capsys.readouterr().err.replace(
                "--size/--model-size", "--size"
            )
        else:
            pytest.fail(f"{setting.flag} banana was taken")


def test_pattern_that_the_shell_expanded_is_refused_in_one_line():
    names = [f"texts/part-{number:05}.jsonl" for number in range(5000)]
    with pytest.raises(
        ValueError, match=r"5,000 files.*quote it, as in .* 'texts/\*\.jsonl'"
    ) as no:
        read("--data-mode=files", "--data-path", *names)
    assert len(str(no.value)) < 300
    assert len(read("--data-mode=files", "--data-path", *names[:1000]).data.data_path) == 1000


@pytest.mark.parametrize("flag", ["--sample-prompt", "--data-path", "--cache-dir", "--end-of-text"])
def test_argument_that_is_not_utf8_is_refused_by_its_flag(flag):
    with pytest.raises(ValueError, match=rf"^{flag} a.udcffb is not UTF-8"):
        read(flag, os.fsdecode(b"a\xffb"))


def test_unknown_flag_is_refused(capsys):
    with pytest.raises(SystemExit):
        read("--max-stepps", "9")
    assert "--max-stepps" in capsys.readouterr().err


def test_help_lists_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for setting in flags.settings(RunConfig):
        assert setting.flag in text
    assert "Default: 0.95." in text


CONFIGS = (RunConfig, SweepConfig, ProofRun, ZeroLabRun, SamplingConfig, EvaluationConfig)


@pytest.mark.parametrize("config", CONFIGS)
def test_whole_numbers_beyond_64_bits_are_refused_for_every_flag(config):
    whole = [one for one in flags.settings(config) if int in arguments._kinds(one.field.annotation)]
    seeds = [one for one in flags.settings(config) if one.path[-1] == "seeds"]
    assert whole
    for setting in [*whole, *seeds]:
        value = str(2**63)
        nested: dict[str, object] = {}
        arguments._put(nested, setting.path, [value] if setting in seeds else value)
        with pytest.raises(ValidationError) as refused:
            config.model_validate(nested)
        found = error_message(refused.value)
        assert found.startswith(f"{setting.flag}: must be at most "), found


def test_value_that_begins_with_a_dash_is_refused_with_the_way_to_write_it(capsys):
    made = arguments.Parser(prog="program")
    arguments.add_settings(made, RunConfig, "run")
    with pytest.raises(SystemExit):
        made.parse_args(["--seed=1", "--sbatch-options", "--time=1"])
    assert (
        "error: --sbatch-options: expected one argument. Write a value that begins with a dash as "
        "--sbatch-options=--time=1\n"
    ) in capsys.readouterr().err
    assert made.parse_args(["--sbatch-options=--time=1"]).setting_hosts_sbatch_options == "--time=1"


@pytest.mark.parametrize("flag", ["--cache-dir", "--data-path", "--end-of-text", "--dataset"])
def test_value_of_a_variable_that_is_not_set_is_refused(flag):
    with pytest.raises(ValueError, match=f"^{flag} is empty: give a value, or drop it$"):
        read(flag, "")
    assert read("--sample-prompt", "").training.sample_prompt == ""
    assert read("--sbatch-options", "").hosts.sbatch_options == ""
