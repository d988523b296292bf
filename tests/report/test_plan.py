import json
import math
import re
import sysconfig
from pathlib import Path

import pytest
from tiny import SHAPE

from zeroflow import artifacts, pipeline
from zeroflow.cli import commands
from zeroflow.data.build import build_shards
from zeroflow.data.corpus import CorpusConfig
from zeroflow.data.part_counts import row_bytes
from zeroflow.data.shards import ShardConfig, ShardSet
from zeroflow.data.tokenizer import TokenizerConfig
from zeroflow.data.tokenizer_origins import fetch_tokenizer
from zeroflow.device import Device
from zeroflow.estimate import history
from zeroflow.estimate.history import Figures, Past
from zeroflow.estimate.run_records import RunRecords
from zeroflow.model.sizes import with_vocabulary
from zeroflow.report import plan as plans
from zeroflow.report import plan_page
from zeroflow.report.pages import Page
from zeroflow.report.plan import Compared, Plan
from zeroflow.settings import settle as settles
from zeroflow.settings.job import training_job
from zeroflow.settings.run_config import RunConfig
from zeroflow.settings.settle import settle
from zeroflow.stages import plan as stages_plan
from zeroflow.stages.plan import forecast

H100 = "NVIDIA H100 80GB HBM3"
AS_LLAMA = {"data": {"data_mode": "synthetic"}, "tokenizer": {"vocab_size": 128_256}}
"""Data with the vocabulary of Llama-3.1 that needs no hub."""

TRAINED = {"tokenizer_name": "train", "vocab_size": 400}


@pytest.fixture
def ask(tmp_path):
    """Settings of a small run on a CPU; groups as dictionaries."""

    def make(**settings) -> RunConfig:
        defaults = {
            "device": "cpu",
            "data": {"data_mode": "synthetic"},
            "tokenizer": {"vocab_size": 512},
            "cache_dir": tmp_path / "cache",
            "model": SHAPE.model_dump(),
            "training": {"max_steps": 10},
        }
        return RunConfig.model_validate(defaults | settings)

    return make


def on_gpus(count: int, size: str, tmp_path: Path, **training) -> Plan:
    asked = RunConfig.model_validate(
        {
            "model": {"size": size},
            "training": {"gpus": count, **training},
            "cache_dir": tmp_path / "cache",
            **AS_LLAMA,
        }
    )
    return forecast(asked, gpu=H100)


def test_plan_shows_data_run_model_time_memory_and_disk(ask, caplog):
    asked = ask(tokenizer={"vocab_size": 32_768})
    with caplog.at_level("INFO", logger="zeroflow.stages.plan"):
        run = pipeline.plan(asked).run
    lines = {line.split(":")[0]: line for line in caplog.messages}
    assert list(lines) == [
        "data",
        "tokenizer",
        "run",
        "model",
        "training",
        "device",
        "resume",
        "time",
        "memory",
        "disk",
        "checkpoints",
    ]
    assert lines["resume"] == "resume: bit for bit", "on a CPU"
    assert run.run_name in lines["run"] and "new" in lines["run"]
    assert "10 steps x 512 tokens = 5,120 tokens" in lines["training"]
    assert f"{with_vocabulary(SHAPE, 32_768).parameters / 1e6:.1f}M" in lines["model"]
    assert "are free" in lines["disk"] and "NOT ENOUGH" not in lines["disk"]
    assert "MB every 2 steps, about " in lines["checkpoints"]


def test_lack_of_disk_space_is_reported(ask, monkeypatch):
    monkeypatch.setattr(stages_plan, "free_bytes", lambda folder: 10**6)
    assert "NOT ENOUGH" in plan_page.disk_line(forecast(ask()))


def test_checkpoints_that_are_kept_need_disk_space(ask):
    few, many = (
        forecast(ask(training=training)).disk_bytes
        for training in ({"max_steps": 100}, {"max_steps": 100, "keep_every": 30})
    )
    size = forecast(ask()).predicted.checkpoint_bytes
    assert many - few == size, "that of step 60: a run of 100 steps saves every 20"


def test_models_that_a_run_registers_need_disk_space(ask, text, monkeypatch):
    def asked(**more) -> RunConfig:
        return ask(data=text.corpus.model_dump(), tokenizer=TRAINED, **more)

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    plain, registered = forecast(asked()), forecast(asked(register_="mine"))
    two = 2 * 4 * sum(plain.parameters.values())
    assert registered.disk_bytes - plain.disk_bytes == two
    assert "of models in MLflow; " in plan_page.disk_line(registered)
    assert "MLflow" not in plan_page.disk_line(plain)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere:5000")
    assert forecast(asked(register_="mine")).disk_bytes == plain.disk_bytes


def test_registered_models_of_a_complete_run_exist(ask, text, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = ask(data=text.corpus.model_dump(), tokenizer=TRAINED, register_="mine")
    steps, two = forecast(run).steps, 2 * 4 * sum(forecast(run).parameters.values())
    for stored, there in ((two, two), (two // 2, two // 2), (9 * two, two)):
        found = RunRecords([], None, None, steps, there_bytes=7, registered_bytes=stored)
        monkeypatch.setattr(stages_plan, "read_records", lambda folder, found=found: found)
        assert forecast(run).there_bytes == 7 + there
    found = RunRecords([], None, None, steps - 1, there_bytes=7, registered_bytes=two)
    monkeypatch.setattr(stages_plan, "read_records", lambda folder: found)
    assert forecast(run).there_bytes == 7, "the models of its last step are new ones"


def test_plan_in_fp32_on_a_gpu_does_not_use_the_speed_of_bf16(tmp_path):
    assert on_gpus(1, "small", tmp_path, precision="fp32").predicted.tokens_per_second is None


def test_parts_add_up_to_the_model_and_to_the_memory(tmp_path):
    planned = on_gpus(4, "medium", tmp_path)
    assert sum(planned.parameters.values()) == 1_344_899_072
    assert [sum(stage.memory.values()) for stage in planned.stages] == [
        stage.total for stage in planned.stages
    ]
    assert planned.tokens == planned.steps * planned.batch_tokens
    work = planned.workload
    assert 4 * work.micro_batch_rows * work.accumulate * work.seq_len == planned.batch_tokens


def test_more_gpus_are_faster_and_need_less_memory_each(tmp_path):
    one, four = (on_gpus(count, "medium", tmp_path) for count in (1, 4))
    rates = [planned.predicted.tokens_per_second for planned in (one, four)]
    assert rates[1] == pytest.approx(4 * rates[0])
    assert "times 4, not counting communication" in four.rate_source
    assert one.tokens == four.tokens, "a run is the same on any number of GPUs"
    assert four.stages[3].total < four.stages[0].total
    assert len({stage.total for stage in one.stages}) == 1


def test_what_does_not_fit_on_one_gpu_fits_on_eight(tmp_path):
    asked = RunConfig.model_validate(
        {
            "model": {
                "hidden_size": 4096,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "intermediate_size": 14336,
            },
            "training": {"gpus": 8},
            "cache_dir": tmp_path,
            **AS_LLAMA,
        }
    )
    planned = forecast(asked, gpu=H100)
    fits = [stage.fits for stage in planned.stages]
    assert fits[0] == "no" and fits[3] == "yes", "Llama-3.1's 8B"


def test_rows_that_gpus_cannot_share_are_refused(tmp_path):
    with pytest.raises(ValueError, match="3 GPUs cannot share a step of 128 rows evenly"):
        on_gpus(3, "tiny", tmp_path, batch_tokens=2**18)


def test_command_prints_a_plan_and_starts_nothing(tmp_path, capsys, console):
    cache = tmp_path / "cache"
    flags = ["plan", "--size=medium", "--gpus=4", "--gpu=H100", f"--cache-dir={cache}"]
    flags += ["--data-mode=synthetic", "--vocab-size=128256"]
    assert commands.main(flags) == 0
    page = capsys.readouterr().out
    for expected in (
        "plan of medium on 4 x NVIDIA H100 80GB HBM3, ZeRO stage 0, with 80.00 GiB each",
        "--gpu H100 means NVIDIA H100 80GB HBM3; other known GPUs: NVIDIA H100 NVL, ",
        " on each of 4 (computed, sum of its parts)",
        "feed-forward    830,472,192  61.7%",
        "assuming 52% MFU",
        "stage 3",
    ):
        assert expected in page
    assert commands.main([*flags, "--json"]) == 0
    assert Plan.model_validate(json.loads(capsys.readouterr().out)).workload.ranks == 4
    assert not cache.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpu=RTX 9090"], "give its memory too, as in --memory-gb 48"),
        (["--memory-gb=48"], "--memory-gb 48 is that of a GPU: name it with --gpu"),
        (["--gpu=RTX 9090", "--memory-gb=0"], "--memory-gb 0: give the memory of the GPU in GB"),
        (["--max-steps=5", "--warmup-steps=9"], "--warmup-steps 9 leaves none of 5 steps"),
        (["--gpus=0"], "--gpus: must be greater than 0"),
        (["--gpus=2"], "this machine has none: name one with --gpu"),
        (["--zero-stage=2"], "--zero-stage 2 shards state across several GPUs, but the run"),
        (["--gpu=NVIDIA L4", "--device=cpu"], "--gpu and --device cpu: drop one of them"),
    ],
)
def test_command_refuses_impossible_settings(flags, message, tmp_path, capsys, console):
    common = ["plan", f"--cache-dir={tmp_path}", "--data-mode=synthetic"]
    assert commands.main([*common, *flags]) == 1
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    config = TokenizerConfig(tokenizer_name="synthetic", vocab_size=512)
    corpus, cache = CorpusConfig(data_mode="synthetic"), tmp_path_factory.mktemp("rows")
    wanted = ShardConfig(seq_len=256, train_rows=20, validation_rows=32)
    return build_shards(wanted, corpus, fetch_tokenizer(config, corpus, cache), cache)


@pytest.fixture
def finish(ask, shards):
    """Plan a run, and hold it to its plan as if it had trained."""

    def make(name: str, *, rate: float, save_seconds: float = 0.001) -> list[Compared]:
        settled = pipeline.plan(ask(run_name=name))
        run = settled.run
        tokenizer = fetch_tokenizer(run.tokenizer, run.data, run.cache_dir)
        model = with_vocabulary(run.model.shape, tokenizer.vocab_size)
        job = training_job(settled, model, shards, tokenizer, tags={})
        artifacts.write_json(run.folder.job, job.model_dump(mode="json"))
        planned = plans.load(run.folder)
        assert planned is not None
        measured = Figures(
            tokens_per_second=rate,
            seconds=run.train_tokens / rate,
            memory_bytes=600 * 2**20,
            shard_bytes=row_bytes(shards),
            checkpoint_bytes=12 * model.parameters,
            checkpoint_seconds=save_seconds,
        )
        past = Past(
            run=name,
            steps=10,
            workload=job.training.workload,
            predicted=planned.predicted,
            measured=measured,
        )
        history.append(run.cache_dir, past)
        return plans.compared(planned.predicted, measured)

    return make


@pytest.mark.parametrize(
    ("training", "told"),
    [
        (
            {"checkpoint_every": 500},
            "--checkpoint-every 500 (saved are only the last step and those",
        ),
        ({"validate_every": 11}, "--validate-every 11 (the model is validated only at the begin"),
        ({"log_interval": 99}, "--log-interval 99 (training losses are logged only at the first"),
        ({"keep_every": 99}, "--keep-every 99 (no further checkpoints are kept)"),
        ({"checkpoint_every": 10, "validate_every": 10, "log_interval": 10}, ""),
        ({"max_steps": 3}, ""),
    ],
)
def test_interval_that_is_longer_than_the_run_is_remarked(ask, caplog, training, told):
    caplog.set_level("INFO", logger="zeroflow")
    asked = ask(training={"max_steps": 10, **training})
    page = plan_page.text(forecast(asked))
    assert page.count("longer than the run of 10 steps: ") == bool(told) and told in page
    pipeline.plan(asked)
    assert caplog.text.count("longer than the run of 10 steps: ") == bool(told)
    assert told in caplog.text


def test_default_interval_that_is_longer_than_the_run_is_not_remarked(ask):
    plan = forecast(ask(device="auto", training={"max_steps": 5}), gpu=H100)
    assert plan.notes == ()


def test_next_run_is_predicted_from_what_was_measured(ask, finish):
    first = {row.name: row for row in finish("one", rate=1000.0)}
    assert first["checkpoint_bytes"].difference == pytest.approx(0)
    assert first["shard_bytes"].difference == pytest.approx(0, abs=0.1)
    assert first["seconds"].measured == pytest.approx(5.12)

    planned = forecast(ask(run_name="two", seed=1))
    assert planned.memory_source == "measured, from 1 earlier run here"
    page = plan_page.text(planned)
    assert page.count("was measured in earlier runs") == 1 and "computed memory by part" in page
    assert planned.predicted.memory_bytes != planned.stage.total, "both are on the page"
    assert planned.rate_source.startswith("from 1 earlier run here; "), "and a measurement now"
    assert planned.rate.low < 1000 < planned.rate.high
    second = {row.name: row for row in finish("two", rate=1000.0)}
    for name in ("tokens_per_second", "seconds", "memory_bytes"):
        assert second[name].difference == pytest.approx(0)
    line = plan_page.time_line(planned)
    assert "(from 1 earlier run here; " in line and "; load average now " in line

    larger = ask(run_name="three", model=SHAPE.replace(num_hidden_layers=4).model_dump())
    planned = forecast(larger)
    assert "TFLOP/s, as in 2 earlier runs here" in planned.rate_source
    assert planned.memory_source == "computed, sum of its parts"
    assert "was measured in earlier runs" not in plan_page.text(planned)


def test_plan_says_when_a_checkpoint_takes_longer_than_the_training_between_two(ask, finish):
    finish("one", rate=1000.0)
    line = plan_page.checkpoints_line(forecast(ask(run_name="two")))
    assert re.search(r"a write takes about 0\.0 s \(.*/s, as in 1 earlier run here\)$", line)

    finish("slow", rate=1000.0, save_seconds=60.0)
    planned = forecast(ask(run_name="two"))
    interval = planned.checkpoint_interval_seconds
    assert interval == pytest.approx(2 * 512 / planned.rate.expected)
    line = plan_page.checkpoints_line(planned)
    assert "; a write takes about 30 s" in line, "the median of both"
    saved = 2 * math.ceil(planned.predicted.checkpoint_seconds / interval)
    assert ": LONGER than training, which does not wait" in line
    assert f"so one is saved about every {saved} steps." in line
    assert line in plan_page.text(planned)


def test_plan_for_another_machine_gives_the_disk_speed_that_it_needs(tmp_path):
    line = plan_page.checkpoints_line(on_gpus(1, "small", tmp_path, checkpoint_every=10))
    assert re.search(r"plan is for another machine: below \d+ MB/s, some are skipped\)$", line)


def test_plan_is_unchanged_when_a_run_resumes(ask, finish):
    asked = ask(run_name="one")
    finish("before", rate=1000.0)
    pipeline.plan(asked)
    before = plans.load(asked.folder)
    finish("between", rate=4000.0)
    pipeline.plan(asked)
    now = plans.load(asked.folder)
    assert before is not None and now is not None
    assert now.predicted == before.predicted, "a run is held to the plan that it began with"
    pipeline.plan(ask(run_name="one", training={"max_steps": 20}))
    longer = plans.load(asked.folder)
    assert longer is not None and longer.rate_source.startswith("from 2 earlier runs here")


def test_plan_of_an_older_version_is_kept_and_shown(ask, finish):
    asked = ask(run_name="one")
    held = finish("one", rate=1000.0)
    older = artifacts.read_json(asked.folder.plan)
    for name in ("notes", "load", "data", "tokenizer", "vocabulary_source", "steps_done", "rate"):
        del older[name]
    artifacts.write_json(asked.folder.plan, older)
    pipeline.plan(asked)
    planned = plans.load(asked.folder)
    assert planned is not None and planned.rate is None
    assert planned.predicted.model_dump(mode="json") == older["predicted"]
    assert planned.rate_source in Page(plan_page.section(planned, held)).linked
    assert "vocabulary     512\n" in plan_page.text(planned)


def test_repeated_run_does_not_predict_itself(ask, finish):
    held = finish("one", rate=1000.0)
    again = finish("one", rate=1000.0)
    assert again == held
    assert len(history.read(ask().cache_dir)) == 1


def test_report_has_what_was_predicted_and_measured(ask, finish):
    held = finish("one", rate=1000.0)
    planned = plans.load(ask(run_name="one").folder)
    assert planned is not None
    page = Page(plan_page.section(planned, held)).linked
    assert "| speed |" in page and "| 1,000 tokens/s |" in page and "| training |" in page


def test_miss_is_known_only_if_both_figures_are():
    seconds = Compared(name="seconds", predicted=10.0, measured=11.0)
    assert seconds.difference == pytest.approx(0.1)
    assert seconds.replace(predicted=None).difference is None
    memory = Compared(name="memory_bytes", predicted=None, measured=2**30)
    assert plan_page.cells(memory)[1:] == ("unknown", "1.00 GiB", "")


def test_memory_is_unknown_for_code_that_was_not_measured(ask):
    planned = forecast(ask(training={"max_steps": 10, "document_mask": True}))
    assert planned.predicted.memory_bytes is None
    assert plan_page.memory_line(planned).startswith("unknown for such code on a CPU")


def test_unknown_gpu_gives_no_time(ask, monkeypatch):
    unknown = Device(kind="cuda", name="Some New GPU", memory_bytes=2**36)
    monkeypatch.setattr(settles, "find_device", lambda wanted: unknown)
    planned = forecast(ask(device="auto"))
    assert plan_page.time_line(planned) == "unknown, the peak of Some New GPU is not known"
    assert "unknown" in plan_page.text(planned)


def test_plan_in_fp8_says_so_and_is_predicted_from_others_in_fp8_only(ask):
    asked = ask(device="auto", training={"fp8": True}, model={"size": "medium"}, **AS_LLAMA)
    planned = forecast(asked, gpu="H100 80GB")
    assert "bf16 with products in fp8, compiled" in plan_page.text(planned)
    assert "with fp8 and 52% without; " in planned.rate_source
    work = planned.workload.replace(fp8=False)
    measured = planned.predicted.replace(tokens_per_second=123.0)
    past = history.Past(
        run="bf16", steps=1, workload=work, predicted=planned.predicted, measured=measured
    )
    asked.cache_dir.mkdir()
    history.append(asked.cache_dir, past)
    assert forecast(asked, gpu="H100 80GB").predicted == planned.predicted
    history.append(asked.cache_dir, past.replace(run="fp8", workload=planned.workload))
    again = forecast(asked, gpu="H100 80GB")
    assert again.predicted.tokens_per_second == 123.0


@pytest.mark.parametrize(("vocab_size", "usual"), [(512, 2.1), (2048, 3.1)])
def test_plan_of_shards_is_near_those_that_are_built(ask, vocab_size, usual):
    """Of the sample's top folder, which has the same bytes per token as the whole sample."""
    files = {"data_mode": "files", "data_path": [f"{sysconfig.get_path('stdlib')}/*.py"]}
    tokenizer = {"tokenizer_name": "train", "vocab_size": vocab_size}
    asked = ask(data=files, tokenizer=tokenizer, training={"max_steps": 5000})
    planned = forecast(asked)
    run = settle(asked).run
    trained = fetch_tokenizer(run.tokenizer, run.data, run.cache_dir)
    shards = build_shards(run.shard_config, run.data, trained, run.cache_dir)
    facts = shards.train + shards.validation
    assert facts.text_bytes / facts.document_tokens == pytest.approx(usual, rel=0.1)
    assert planned.predicted.shard_bytes == pytest.approx(row_bytes(shards), rel=0.15)
    line = plan_page.disk_line(planned)
    assert re.search(r"about .* of shards \(from a sample of the text at \d+ places\) and", line)


def test_validation_files_are_part_of_the_planned_shards(ask, text, tmp_path):
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("\n".join(text.texts) * 10)
    data = text.corpus.model_dump()
    alone, both = (
        forecast(ask(data=data | more, tokenizer=TRAINED)).predicted.shard_bytes
        for more in ({}, {"validation_path": [str(held_out)]})
    )
    assert both - alone == pytest.approx(10 * alone, rel=0.1)


def test_existing_files_of_a_run_need_no_more_space(ask, finish, monkeypatch):
    finish("one", rate=1000.0)
    planned = forecast(ask(run_name="one"))
    rows, checkpoint = (planned.predicted.shard_bytes, planned.predicted.checkpoint_bytes)
    assert planned.there_bytes == pytest.approx(rows + checkpoint, rel=0.1)
    lacking = planned.disk_bytes - planned.there_bytes
    for free, enough in ((lacking, True), (lacking - 1, False)):
        monkeypatch.setattr(stages_plan, "free_bytes", lambda folder, free=free: free)
        line = plan_page.disk_line(forecast(ask(run_name="one")))
        assert ("NOT ENOUGH" not in line) is enough and " exist" in line
    assert forecast(ask(run_name="two")).there_bytes == 0
