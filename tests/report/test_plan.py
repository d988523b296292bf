import json
from pathlib import Path

import pytest
from tiny import SHAPE

from zeroflow import artifacts, pipeline
from zeroflow.cli import commands
from zeroflow.data.build import build_shards
from zeroflow.data.corpus import CorpusConfig
from zeroflow.data.part_counts import row_bytes
from zeroflow.data.shards import ShardConfig, ShardSet
from zeroflow.data.tokenizer import TokenizerConfig, fetch_tokenizer
from zeroflow.device import Device
from zeroflow.estimate import history
from zeroflow.estimate.history import Figures, Past
from zeroflow.model.sizes import with_vocabulary
from zeroflow.report import plan as plans
from zeroflow.report import plan_page
from zeroflow.report.plan import Compared, Plan
from zeroflow.settings.job import training_job
from zeroflow.settings.run_config import RunConfig

H100 = "NVIDIA H100 80GB HBM3"


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
        }
    )
    return plans.offline(asked, gpu=H100)


def test_plan_tells_data_run_model_time_memory_and_disk(ask, caplog):
    asked = ask(tokenizer={"vocab_size": 32_768})
    with caplog.at_level("INFO", logger="zeroflow.pipeline"):
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
    ]
    assert lines["resume"] == "resume: bit for bit", "on a CPU"
    assert run.run_name in lines["run"] and "new" in lines["run"]
    assert "10 steps x 512 tokens = 5,120 tokens" in lines["training"]
    assert f"{with_vocabulary(SHAPE, 32_768).parameters / 1e6:.1f}M" in lines["model"]
    assert "are free" in lines["disk"] and "NOT ENOUGH" not in lines["disk"]


def test_too_little_room_is_said(ask, monkeypatch):
    monkeypatch.setattr(plans, "free_bytes", lambda folder: 10**6)
    assert "NOT ENOUGH" in plan_page.disk_line(plans.offline(ask(), gpu=None))


def test_checkpoints_that_are_kept_for_good_need_room(ask):
    few, many = (
        plans.offline(ask(training=training), gpu=None).disk_bytes
        for training in ({"max_steps": 100}, {"max_steps": 100, "keep_every": 30})
    )
    size = plans.offline(ask(), gpu=None).predicted.checkpoint_bytes
    assert many - few == size, "that of step 60: a run of 100 steps saves every 20"


def test_plan_in_fp32_on_a_gpu_tells_no_speed_of_bf16(tmp_path):
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


def test_more_gpus_are_faster_and_hold_less(tmp_path):
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
        }
    )
    planned = plans.offline(asked, gpu=H100)
    fits = [stage.fits for stage in planned.stages]
    assert fits[0] == "no" and fits[3] == "yes", "Llama-3.1's 8B"


def test_rows_that_gpus_cannot_share_are_refused(tmp_path):
    with pytest.raises(ValueError, match="3 GPUs cannot share a step of 128 rows evenly"):
        on_gpus(3, "tiny", tmp_path, batch_tokens=2**18)


def test_command_prints_a_plan_and_starts_nothing(tmp_path, capsys, console):
    cache = tmp_path / "cache"
    flags = ["plan", "--size=medium", "--gpus=4", f"--gpu={H100}", f"--cache-dir={cache}"]
    assert commands.main(flags) == 0
    page = capsys.readouterr().out
    for expected in (
        "plan of medium on 4 x NVIDIA H100 80GB HBM3, ZeRO stage 0, with 80.00 GiB each",
        " on each of 4 (sum of its parts)",
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
        (["--gpu=H100"], "--gpu H100 is ambiguous, choose from: "),
        (["--gpus=0"], "--gpus: Input should be greater than 0"),
        (["--gpus=2"], "this machine has none: name one with --gpu"),
        (["--zero-stage=2"], "--zero-stage 2 shards state across several GPUs, but the run"),
        (["--gpu=NVIDIA L4", "--device=cpu"], "--gpu and --device cpu: drop one of them"),
    ],
)
def test_command_refuses_what_cannot_be(flags, message, tmp_path, capsys, console):
    assert commands.main(["plan", f"--cache-dir={tmp_path}", *flags]) == 1
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

    def make(name: str, *, rate: float) -> list[Compared]:
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


def test_next_run_is_predicted_from_what_was_measured(ask, finish):
    first = {row.name: row for row in finish("one", rate=1000.0)}
    assert first["checkpoint_bytes"].miss == pytest.approx(0)
    assert first["shard_bytes"].miss == pytest.approx(0, abs=0.1)
    assert first["seconds"].measured == pytest.approx(5.12)

    planned = plans.offline(ask(run_name="two", seed=1), gpu=None)
    assert planned.rate_source == planned.memory_source == "from 1 earlier run here"
    second = {row.name: row for row in finish("two", rate=1000.0)}
    for name in ("tokens_per_second", "seconds", "memory_bytes"):
        assert second[name].miss == pytest.approx(0)
    assert "(from 1 earlier run here)" in plan_page.time_line(planned)

    larger = ask(run_name="three", model=SHAPE.replace(num_hidden_layers=4).model_dump())
    planned = plans.offline(larger, gpu=None)
    assert "TFLOP/s, as in 2 earlier runs here" in planned.rate_source
    assert planned.memory_source == "sum of its parts"


def test_plan_stays_as_it_was_made_when_a_run_goes_on(ask, finish):
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
    assert longer is not None and longer.rate_source == "from 2 earlier runs here"


def test_run_again_is_not_its_own_prediction(ask, finish):
    held = finish("one", rate=1000.0)
    again = finish("one", rate=1000.0)
    assert again == held
    assert len(history.read(ask().cache_dir)) == 1


def test_report_has_what_was_predicted_and_measured(ask, finish):
    held = finish("one", rate=1000.0)
    planned = plans.load(ask(run_name="one").folder)
    assert planned is not None
    page = plan_page.section(planned, held)
    assert "| speed |" in page and "| 1,000 tokens/s |" in page and "| training |" in page


def test_miss_is_known_only_where_both_are():
    seconds = Compared(name="seconds", predicted=10.0, measured=11.0)
    assert seconds.miss == pytest.approx(0.1)
    assert seconds.replace(predicted=None).miss is None
    memory = Compared(name="memory_bytes", predicted=None, measured=2**30)
    assert plan_page.cells(memory)[1:] == ("unknown", "1.00 GiB", "")


def test_memory_of_code_that_the_formula_is_not_for_is_left_open(ask):
    planned = plans.offline(ask(training={"max_steps": 10, "document_mask": True}), gpu=None)
    assert planned.predicted.memory_bytes is None
    assert plan_page.memory_line(planned).startswith("unknown for such code on a CPU")


def test_unknown_gpu_gives_no_time(ask, monkeypatch):
    unknown = Device(kind="cuda", name="Some New GPU", memory_bytes=2**36)
    monkeypatch.setattr(plans, "find_device", lambda wanted: unknown)
    planned = plans.offline(ask(device="auto"), gpu=None)
    assert plan_page.time_line(planned) == "unknown, the peak of Some New GPU is not known"
    assert "unknown" in plan_page.text(planned)


def test_plan_in_fp8_says_so_and_is_predicted_from_others_in_fp8_only(ask):
    asked = ask(device="auto", training={"fp8": True}, model={"size": "medium"})
    planned = plans.offline(asked, gpu="H100 80GB")
    assert "bf16 with products in fp8, compiled" in plan_page.text(planned)
    assert planned.rate_source.endswith("with fp8 and 51% without")
    work = planned.workload.replace(fp8=False)
    measured = planned.predicted.replace(tokens_per_second=123.0)
    past = history.Past(
        run="bf16", steps=1, workload=work, predicted=planned.predicted, measured=measured
    )
    asked.cache_dir.mkdir()
    history.append(asked.cache_dir, past)
    assert plans.offline(asked, gpu="H100 80GB").predicted == planned.predicted
    history.append(asked.cache_dir, past.replace(run="fp8", workload=planned.workload))
    again = plans.offline(asked, gpu="H100 80GB")
    assert again.predicted.tokens_per_second == 123.0


def test_shards_hold_no_more_than_the_files_do(ask, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Not much of it. " * 1000)
    data = {"data_mode": "files", "data_path": [str(text)]}
    tokens = text.stat().st_size / 4  # characters a token
    small = plans.offline(ask(data=data), gpu=None)
    assert small.predicted.shard_bytes == pytest.approx(4 * tokens), "of int32"


def test_what_a_run_has_already_needs_no_room(ask, finish, monkeypatch):
    finish("one", rate=1000.0)
    planned = plans.offline(ask(run_name="one"), gpu=None)
    rows, checkpoint = (planned.predicted.shard_bytes, planned.predicted.checkpoint_bytes)
    assert planned.there_bytes == pytest.approx(rows + checkpoint, rel=0.1)
    lacking = planned.disk_bytes - planned.there_bytes
    for free, enough in ((lacking, True), (lacking - 1, False)):
        monkeypatch.setattr(plans, "free_bytes", lambda folder, free=free: free)
        line = plan_page.disk_line(plans.offline(ask(run_name="one"), gpu=None))
        assert ("NOT ENOUGH" not in line) is enough and " exist" in line
    assert plans.offline(ask(run_name="two"), gpu=None).there_bytes == 0
