from pathlib import Path

import pytest
import torch
from tiny import SHAPE, contents, jsonl_corpus

from zeroflow import artifacts, pipeline
from zeroflow.data import hub
from zeroflow.data.corpus import list_files
from zeroflow.data.hub import HubError
from zeroflow.data.shards import ShardSet, SplitCounts
from zeroflow.data.tokenizer import Tokenizer
from zeroflow.device import Device, known_gpu
from zeroflow.estimate.memory import largest_micro_batch
from zeroflow.model.sizes import SIZES, with_vocabulary
from zeroflow.settings import settle as settle_module
from zeroflow.settings.existing import load, size_of, unlike_others
from zeroflow.settings.job import training_job
from zeroflow.settings.run_config import RunConfig, leaves
from zeroflow.settings.settle import foresee, settle
from zeroflow.training.failures import RunIsBusy

SYNTHETIC = {"data_mode": "synthetic"}
GPU = known_gpu("H200")


@pytest.fixture
def ask(tmp_path):
    """Settings of a run on a CPU; groups as dictionaries."""

    def make(**settings) -> RunConfig:
        defaults = {"device": "cpu", "data": SYNTHETIC, "cache_dir": tmp_path / "cache"}
        return RunConfig.model_validate(defaults | settings)

    return make


def trained(asked: RunConfig) -> RunConfig:
    """A settled run that has a checkpoint, or seems to."""
    run = settle(asked).run
    (run.run_dir / "checkpoints" / "step-00000001").mkdir(parents=True)
    return run


def unset(run: RunConfig) -> set[str]:
    return {name for name, value in leaves(run) if value is None}


SHAPE_NAMES = {f"model.{name}" for name in type(SHAPE).model_fields}


def test_synthetic_run_has_nothing_left_open(ask):
    settled = settle(ask())
    run = settled.run
    open_ones = {
        "build.dask_address",
        "hosts.min_nodes",
        "hosts.image",
        "hosts.volume_claim",
        "hosts.local_cache",
        "sweep",
        "data.dataset",
        "data.dataset_config",
        "training.keep_every",
        "training.shard_group",
        "training.reshard_group",
        "model.init_from",
        "initial",
    }
    open_ones |= {
        "data.data_revision",
        "data.validation_revision",
        "tokenizer.tokenizer_revision",
        "tokenizer.end_of_text",
    }
    open_ones |= {"sweep", "register_", "evaluation.evaluate_task_path"}
    open_ones |= {"evaluation.evaluate_core_path"}
    assert unset(run) == SHAPE_NAMES | open_ones
    assert run.model.shape == SIZES["tiny"] and run.tokenizer.tokenizer_name == "synthetic"
    assert run.device == settled.device.kind == "cpu"
    assert not settled.resumes
    assert load(run.cache_dir, run.run_name) == run
    # all that follows from the settings can be made
    assert run.schedule.steps == run.training.max_steps
    assert run.shard_config.train_rows == run.training.max_steps * run.batch_rows
    assert run.train_tokens == run.training.max_steps * run.training.batch_tokens
    assert run.cadence.log and run.sampling.tokens


def test_settings_are_readable_only_by_their_user(ask):
    run = settle(ask()).run
    assert {file.stat().st_mode & 0o077 for file in run.run_dir.glob("*.json")} == {0}


def test_sample_run_trains_its_tokenizer_and_is_pinned(ask):
    settled = settle(ask(data={"data_mode": "sample"}))
    assert settled.run.data.data_revision is not None
    assert settled.run.tokenizer.tokenizer_name == "train"
    assert "sample" in settled.tokenizer_reason
    assert settled.run.run_name.startswith("tiny-sample-")


def test_run_on_files_is_pinned_and_refuses_other_files(ask, tmp_path):
    file = tmp_path / "a.jsonl"
    jsonl_corpus(file, ["one"])
    asked = ask(
        run_name="mine",
        data={"data_mode": "files", "data_path": (str(file),)},
        tokenizer={"tokenizer_name": "train"},
    )
    first = settle(asked)
    assert settle(asked).run == first.run and settle(asked).resumes
    jsonl_corpus(file, ["two"])
    with pytest.raises(ValueError, match="files of --data-path have changed"):
        settle(asked)


def test_run_on_relative_paths_is_resumed_and_extended_in_another_folder(
    ask, tmp_path, monkeypatch
):
    jsonl_corpus(tmp_path / "texts" / "a.jsonl", ["one"])
    monkeypatch.chdir(tmp_path / "texts")
    files = {"data_mode": "files", "data_path": ("*.jsonl",)}
    tokenizer = {"tokenizer_name": "train"}
    first = settle(ask(run_name="mine", data=files, tokenizer=tokenizer)).run
    monkeypatch.chdir(tmp_path)
    more = RunConfig(run_name="mine", cache_dir=first.cache_dir, training={"max_steps": 999})
    again = settle(more)
    assert again.resumes and again.run.data == first.data


@pytest.mark.parametrize("written_out", [{}, {"model": {"size": "tiny"}}])
def test_same_settings_give_the_same_name_and_resume(ask, written_out):
    first, again = settle(ask()), settle(ask(**written_out))
    assert again.run == first.run and again.resumes and not first.resumes
    assert again.corpus_reason == "as when the run was started"


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"training": {"max_steps": 7}},
        {"training": {"learning_rate": 0.1}},
        {"model": {"size": "small"}},
        {"model": SHAPE.model_dump()},
        {"optimizer": {"beta1": 0.8}},
        {"tokenizer": {"vocab_size": 999}},
    ],
)
def test_each_setting_that_affects_weights_changes_the_name(ask, change):
    assert settle(ask(**change)).run.run_name != settle(ask()).run.run_name


@pytest.mark.parametrize(
    "change",
    [
        {"training": {"validate_every": 3, "sample_tokens": 5, "keep_checkpoints": 1}},
        {"training": {"batch_size": 1, "grad_accum_steps": 2}},  # still 512 tokens a step
        {"overfit": {"overfit_steps": 3}},
    ],
)
def test_settings_that_do_not_affect_weights_keep_the_name_and_may_change(ask, change):
    first = settle(ask()).run
    assert first.training.batch_tokens == 512
    again = settle(ask(run_name=first.run_name, **change)).run
    assert again.run_name == first.run_name
    [(group, values)] = change.items()
    for name, value in values.items():
        assert getattr(getattr(again, group), name) == value
    assert settle(ask(**change)).run.run_name == first.run_name


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 1}, "--seed 0, now it is 1"),
        ({"training": {"learning_rate": 0.1}}, "--learning-rate 0.001, now it is 0.1"),
        ({"training": {"seq_len": 128}}, "--seq-len 256, now it is 128"),
        ({"training": {"schedule": "wsd"}}, "--schedule cosine, now it is wsd"),
        ({"training": {"precision": "bf16"}}, "--precision fp32, now it is bf16"),
        ({"training": {"fp8": True}}, "--fp8 False, now it is True"),
        ({"training": {"max_steps": 9}}, "--max-steps 10, now it is 9"),
        ({"model": {"size": "small"}}, "--size tiny, now it is small"),
        ({"tokenizer": {"vocab_size": 400}}, "--vocab-size 32768, now it is 400"),
        ({"optimizer": {"weight_decay": 0.0}}, "--weight-decay 0.1, now it is 0.0"),
    ],
)
def test_run_of_the_same_name_refuses_other_settings_and_names_them(ask, change, field):
    start = ask(run_name="mine", training={"max_steps": 10})
    before = trained(start)
    with pytest.raises(ValueError, match=f"run mine was trained with {field}"):
        settle(ask(run_name="mine", **change))
    assert load(before.cache_dir, "mine") == before


def test_run_that_never_trained_starts_over_with_other_settings(ask):
    """So that the remedy of a failure can be tried under the same name."""
    first = settle(ask(run_name="mine", training={"seq_len": 64}))
    ledger = first.run.run_dir / "ledger.jsonl"
    ledger.write_text("{}\n")
    again = settle(ask(run_name="mine", training={"seq_len": 128, "max_steps": 5}))
    assert not again.resumes and not ledger.exists()
    assert (again.run.training.seq_len, again.run.training.max_steps) == (128, 5)
    assert settle(ask(run_name="mine")).run == again.run


def test_refused_change_of_a_run_that_never_trained_leaves_its_settings(ask):
    run = settle(ask(run_name="mine")).run
    before = contents(run.run_dir)
    wrong = ask(run_name="mine", seed=1, training={"max_steps": 10, "warmup_steps": 99})
    with pytest.raises(ValueError, match="--warmup-steps"):
        settle(wrong)
    nowhere = {"data_mode": "files", "data_path": ["/nowhere/*.txt"]}
    with pytest.raises(ValueError, match="nowhere"):
        settle(ask(run_name="mine", data=nowhere))
    assert contents(run.run_dir) == before


def test_setting_that_is_changed_and_changed_back_is_what_was_given_last(ask):
    def logged(interval: int) -> int | None:
        run = settle(ask(run_name="mine", training={"log_interval": interval})).run
        return run.training.log_interval

    assert [logged(interval) for interval in (10, 5, 10)] == [10, 5, 10]


def test_settings_for_another_folder_are_the_same_run_and_only_given_ones(
    ask, tmp_path, monkeypatch
):
    jsonl_corpus(tmp_path / "mine" / "text.jsonl", ["Some words of my own."])
    monkeypatch.chdir(tmp_path / "mine")
    files = {"data_mode": "files", "data_path": ("*.jsonl",)}
    asked = ask(data=files, cache_dir="cache", tokenizer={"tokenizer_name": "train"})
    run = settle(asked).run
    sent = asked.model_copy(update={"run_name": run.run_name}).anywhere
    values = sent.model_dump(mode="json", exclude_unset=True)
    assert values.keys() == {"device", "data", "cache_dir", "tokenizer", "run_name"}

    monkeypatch.chdir(tmp_path)
    again = settle(RunConfig.model_validate(values))
    assert again.resumes and again.run.run_dir == tmp_path / "mine" / run.run_dir
    assert [file.size for file in list_files(again.run.data)]


def test_size_of_a_run_is_what_it_was_started_with(ask):
    run = settle(ask(run_name="mine", model={"size": "small"})).run
    assert size_of(RunConfig(run_name="mine", cache_dir=run.cache_dir)) == "small"
    assert size_of(RunConfig(run_name="other", cache_dir=run.cache_dir)) == "tiny"


def test_run_that_was_extended_refuses_the_steps_it_was_started_with(ask):
    trained(ask(run_name="mine", training={"max_steps": 10}))
    settle(ask(run_name="mine", training={"max_steps": 20}))
    with pytest.raises(ValueError, match=r"--max-steps 20, now it is 10"):
        settle(ask(run_name="mine", training={"max_steps": 10}))


def test_same_command_keeps_the_fallback_of_its_first_call(ask, monkeypatch):
    def unreachable(name, revision):
        raise HubError(name, "the hub cannot be reached", transient=True)

    monkeypatch.setattr(hub, "dataset_revision", unreachable)
    fallback = {"data_mode": "fineweb", "allow_synthetic_fallback": True}
    asked = ask(data=fallback, training={"max_steps": 7})
    first = settle(asked)
    assert first.run.fell_back and first.run.data.data_mode == "synthetic"
    (first.run.run_dir / "checkpoints" / "step-00000001").mkdir(parents=True)
    named = asked.replace(run_name=first.run.run_name)
    assert settle(named).run == first.run == settle(asked).run
    with pytest.raises(ValueError, match="--data-mode synthetic, now it is sample"):
        settle(named.replace(data={"data_mode": "sample"}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"data": {"data_mode": "sample", "fineweb_subset": "x"}},
            "--fineweb-subset has no effect",
        ),
        ({"data": {"data_mode": "sample", "text_column": "x"}}, "--text-column has no effect"),
        (
            {"data": SYNTHETIC | {"allow_synthetic_fallback": True}},
            "--allow-synthetic-fallback has",
        ),
        ({"data": SYNTHETIC | {"deduplicate": True}}, "--deduplicate has no effect"),
        (
            {"data": {}, "tokenizer": {"tokenizer_name": "gpt2", "vocab_size": 9000}},
            "--vocab-size has no effect with --tokenizer-name gpt2",
        ),
        (
            {"data": {}, "tokenizer": {"tokenizer_name": "train", "end_of_text": "x"}},
            "--end-of-text has no effect",
        ),
    ],
)
def test_setting_without_effect_is_refused(ask, settings, message):
    with pytest.raises(ValueError, match=message):
        settle(ask(**settings))


def test_run_of_the_same_name_refuses_another_number_of_tokens_per_step(ask):
    settle(ask(run_name="mine"))
    with pytest.raises(
        ValueError, match=r"--batch-tokens 512 gives 2 rows .* not --batch-size 3 x"
    ):
        settle(ask(run_name="mine", training={"batch_size": 3, "grad_accum_steps": 1}))


def test_run_is_extended_to_more_steps_and_records_them(ask):
    first = trained(ask(run_name="mine", training={"max_steps": 10}))
    more = settle(ask(run_name="mine", training={"max_steps": 20})).run
    assert more.training.max_steps == 20
    changed = {name for name, value in leaves(more) if dict(leaves(first))[name] != value}
    intervals = {"training.validate_every", "training.checkpoint_every"}
    assert changed == {"training.max_steps", *intervals}
    with pytest.raises(ValueError, match=r"--max-steps 20, now it is 15"):
        settle(ask(run_name="mine", training={"max_steps": 15}))


def test_intervals_of_an_extended_run_are_those_of_its_steps_unless_they_were_chosen(ask):
    trained(ask(run_name="mine", training={"max_steps": 100}))

    def intervals(**training: int) -> tuple[int, int]:
        run = settle(ask(run_name="mine", training=training)).run
        return run.training.validate_every, run.training.checkpoint_every

    assert intervals(max_steps=100) == (50, 20)
    assert intervals(max_steps=200) == intervals(max_steps=200) == (100, 40)
    assert intervals(max_steps=400, checkpoint_every=40) == (200, 40)
    assert intervals(max_steps=800, validate_every=7) == (7, 40), "40 was chosen"


def test_setting_that_is_not_given_again_is_taken_from_the_run(ask):
    settle(ask(run_name="mine", seed=5, training={"learning_rate": 0.5, "max_steps": 9}))
    again = settle(ask(run_name="mine")).run
    assert (again.seed, again.training.learning_rate, again.training.max_steps) == (5, 0.5, 9)


def test_unknown_run_is_refused_with_the_existing_ones(ask):
    cache = settle(ask(run_name="mine")).run.cache_dir
    with pytest.raises(ValueError, match=r"no run yours in .* existing runs: mine"):
        load(cache, "yours")
    with pytest.raises(ValueError, match="existing runs: none"):
        load(cache / "elsewhere", "yours")


# seq_len is 100 throughout
@pytest.mark.parametrize(
    ("given", "batch"),
    [
        ({"batch_size": 3, "grad_accum_steps": 5}, (3, 5)),
        ({"batch_tokens": 800, "batch_size": 2}, (2, 4)),
        ({"batch_tokens": 800, "grad_accum_steps": 2}, (4, 2)),
        ({"batch_tokens": 800, "batch_size": 4, "grad_accum_steps": 2}, (4, 2)),
        ({"batch_tokens": 1400}, (2, 7)),  # the largest divisor of 14 rows up to the 4 that fit
        ({}, (1, 5)),  # about 512 tokens: 5 rows, and 4 do not divide them
        ({"batch_size": 2}, (2, 2)),
        ({"grad_accum_steps": 5}, (1, 5)),
    ],
)
def test_batch_follows_from_the_given_settings(ask, given, batch):
    run = settle(ask(training={"seq_len": 100, **given})).run
    assert (run.training.batch_size, run.training.grad_accum_steps) == batch
    assert run.training.batch_tokens == batch[0] * batch[1] * 100 == 100 * run.batch_rows


# The synthetic run of a CPU has steps of two rows
def test_gpus_share_the_rows_of_a_step_and_another_number_resumes_with_the_same_rows(ask):
    two = settle(ask(run_name="mine", training={"gpus": 2, "zero_stage": 3})).run
    assert (two.training.batch_size, two.training.grad_accum_steps) == (1, 1)
    assert two.training.batch_tokens == 512 and two.batch_rows == 2
    assert (two.training.gpus, two.training.zero_stage) == (2, 3)
    trained(ask(run_name="mine"))
    assert settle(ask(run_name="mine")).run == two, "what is not given is as it was"
    one = settle(ask(run_name="mine", training={"gpus": 1})).run
    assert (one.training.gpus, one.training.zero_stage) == (1, 0)
    assert one.batch_rows == 2 and one.training.batch_size == 2
    assert one.shard_config == two.shard_config
    with pytest.raises(ValueError, match="3 GPUs cannot share a step of 2 rows evenly"):
        settle(ask(run_name="mine", training={"gpus": 3}))


def test_runs_on_several_gpus_are_named_after_them_and_one_gpu_is_not_named(ask):
    alone, two, sharded = (
        settle(ask(training={"batch_tokens": 512, **given})).run.run_name
        for given in ({}, {"gpus": 2}, {"gpus": 2, "zero_stage": 3})
    )
    assert two == f"{alone}-2gpus-zero0" and sharded == f"{alone}-2gpus-zero3"
    explicit = ask(training={"batch_tokens": 512, "gpus": 1, "zero_stage": 0})
    assert settle(explicit).run.run_name == alone


def test_run_of_a_version_for_one_gpu_resumes(ask):
    run = trained(ask(run_name="mine"))
    recorded = artifacts.read_json(run.run_dir / "run.json")
    for name in ("gpus", "zero_stage"):
        del recorded["training"][name]
    artifacts.write_json(run.run_dir / "run.json", recorded)
    assert settle(ask(run_name="mine")).run == run


def test_more_gpus_than_exist_are_refused_with_a_remedy(ask, monkeypatch):
    with pytest.raises(ValueError, match="sees none: --device cpu uses 2 processes"):
        settle(ask(device="auto", training={"gpus": 2}))
    monkeypatch.setattr(settle_module, "find_device", lambda wanted: GPU)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert settle(ask(device="auto", training={"gpus": 2})).run.training.gpus == 2
    with pytest.raises(ValueError, match="--gpus 3, but PyTorch sees 2: use fewer"):
        settle(ask(device="auto", training={"gpus": 3}))
    with pytest.raises(ValueError, match="--zero-stage 1 shards state across several GPUs"):
        settle(ask(training={"zero_stage": 1}))


def test_run_that_another_process_owns_is_left_as_it_is(ask):
    def acquire(run_dir: Path) -> None:
        raise RunIsBusy(run_dir.name)

    for asked in (ask(), ask(run_name="mine")):
        with pytest.raises(RunIsBusy):
            settle(asked, acquire)
        assert not (asked.cache_dir / "runs").exists()
    run = settle(ask(run_name="mine")).run
    before = {file: file.read_bytes() for file in run.run_dir.iterdir()}
    with pytest.raises(RunIsBusy, match="mine"):
        settle(ask(run_name="mine", seed=9), acquire)
    assert {file: file.read_bytes() for file in run.run_dir.iterdir()} == before


def test_run_that_another_process_began_meanwhile_is_resumed(ask):
    asked = ask(run_name="mine", seed=3)

    def acquire(run_dir: Path) -> None:
        if not run_dir.exists():
            settle(asked)

    assert settle(ask(run_name="mine"), acquire).run == settle(asked).run


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_tokens": 850}, "850 is not a multiple of --seq-len 100: use 800"),
        ({"batch_tokens": 50}, "50 is not a multiple of --seq-len 100: use 100"),
        (
            {"batch_tokens": 800, "batch_size": 3},
            "8 rows of 100, not --batch-size 3",
        ),
        (
            {"batch_tokens": 800, "batch_size": 16},
            "8 rows of 100, not --batch-size 16",
        ),
        (
            {"batch_tokens": 800, "grad_accum_steps": 3},
            "8 rows of 100, not --grad-accum-steps",
        ),
        (
            {"batch_tokens": 800, "grad_accum_steps": 16},
            "8 rows of 100, not --grad-accum-steps",
        ),
        (
            {"batch_tokens": 800, "batch_size": 4, "grad_accum_steps": 4},
            ", not --batch-size 4 x --grad-accum-steps 4: drop one of them",
        ),
        ({"warmup_steps": 10, "max_steps": 10}, "--warmup-steps 10 leaves none of 10 steps"),
        ({"warmup_steps": 1, "max_steps": 1}, "leaves none of 1 step: lower it or raise"),
        (
            {"batch_tokens": 100, "batch_size": 2},
            "gives 1 row of 100, not --batch-size 2",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused_before_anything_is_recorded(
    ask, given, message
):
    asked = ask(run_name="mine", training={"seq_len": 100, **given})
    with pytest.raises(ValueError, match=message):
        settle(asked)
    assert not asked.run_dir.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_missing_gpu_is_refused(ask):
    with pytest.raises(ValueError, match="--device cuda, but PyTorch sees no GPU"):
        settle(ask(device="cuda"))


def test_preflight_is_skipped_by_a_command_and_not_by_a_run(ask):
    assert settle(ask(run_name="r", skip_preflight=True)).run.skip_preflight
    assert not settle(ask(run_name="r")).run.skip_preflight


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(settle_module, "find_device", lambda wanted: GPU)


@pytest.mark.parametrize(
    ("name", "capability", "compiled"),
    [("Tesla T4", (7, 5), True), ("Tesla P100", (6, 0), False)],
)
def test_older_gpu_trains_in_fp32_and_says_so(ask, monkeypatch, caplog, name, capability, compiled):
    old = Device(kind="cuda", name=name, memory_bytes=15 * 2**30, capability=capability)
    monkeypatch.setattr(settle_module, "find_device", lambda wanted: old)
    with caplog.at_level("INFO", logger="zeroflow"):
        settled = pipeline.plan(ask(device="auto"))
    assert settled.run.training.precision == "fp32"
    assert settled.run.training.compile is compiled
    asked_for = ask(device="auto", run_name="other", training={"precision": "bf16"})
    assert settle(asked_for).run.training.precision == "bf16"
    [line] = [line for line in caplog.messages if line.startswith("device")]
    assert "an older GPU" in line and ("not compiled" in line) is not compiled


@pytest.mark.parametrize("seq_len", [1000, 1450, 1536, 2000, 2048, 3000, 6000])
@pytest.mark.parametrize("size", SIZES)
def test_context_that_leaves_few_divisors_still_fills_the_gpu(ask, gpu, size, seq_len):
    run = settle(ask(device="auto", model={"size": size}, training={"seq_len": seq_len})).run
    choice, nominal = run.training, with_vocabulary(SIZES[size], 128_256)
    fits, _ = largest_micro_batch(run.workload(nominal, GPU), GPU)
    assert min(run.batch_rows, fits / 4) <= choice.batch_size <= fits
    assert choice.batch_tokens == pytest.approx(SIZES[size].batch_tokens, rel=0.02)


@pytest.mark.parametrize(
    ("size", "tokens", "rate"),
    [("tiny", 2**18, 3e-3), ("small", 2**19, 2e-3), ("medium", 2**20, 1e-3)],
)
def test_defaults_on_a_gpu_suit_the_size(ask, gpu, size, tokens, rate):
    run = settle(ask(device="auto", model={"size": size})).run
    choice = run.training
    assert run.device == "cuda"
    assert (choice.seq_len, choice.precision, choice.compile) == (2048, "bf16", True)
    assert (choice.batch_tokens, choice.learning_rate) == (tokens, rate)
    nominal = with_vocabulary(SIZES[size], 128_256).parameters
    assert run.train_tokens / nominal == pytest.approx(20, rel=0.02)  # whole steps
    assert run.train_tokens >= 20 * nominal


def test_unsupported_fp8_is_refused_before_anything_is_fetched(ask, gpu, monkeypatch):
    def fetch(config):
        raise AssertionError("looked up")

    asked = ask(device="auto", training={"fp8": True})
    assert settle(asked).run.training.fp8
    assert not settle(ask(device="auto")).run.training.fp8, "off by default"
    monkeypatch.setattr(settle_module, "resolve_corpus", fetch)
    with pytest.raises(ValueError, match="--precision is fp32: drop one"):
        settle(ask(device="auto", training={"fp8": True, "precision": "fp32"}))
    with pytest.raises(ValueError, match="multiples of 16, but --seq-len is 1000: change it"):
        settle(ask(device="auto", training={"fp8": True, "seq_len": 1000}))
    odd = SHAPE.model_dump() | {"intermediate_size": 72}
    with pytest.raises(ValueError, match="but --intermediate-size is 72: change it"):
        settle(ask(device="auto", model=odd, training={"fp8": True}))
    monkeypatch.setattr(settle_module, "find_device", lambda wanted: known_gpu("RTX 3090"))
    with pytest.raises(ValueError, match=r"8\.9 or more, such as .*RTX 3090 has 8\.6: train on"):
        settle(asked)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"the device is a CPU \(.*CPU.*drop --fp8"):
        settle(ask(training={"fp8": True}))
    with pytest.raises(ValueError, match="the device is a CPU"):
        foresee(ask(training={"fp8": True}))


@pytest.fixture
def rows(tmp_path) -> ShardSet:
    return ShardSet(
        path=tmp_path / "shards" / "synthetic-256-abcdef",
        parts=2,
        reused=False,
        row_tokens=257,
        end_of_text=499,
        train=SplitCounts(rows=100, documents=8, document_tokens=25_000),
        validation=SplitCounts(rows=10, documents=1, document_tokens=2000, text_bytes=9000),
        empty_documents=0,
        duplicates=0,
        bad_lines=0,
        entropy=None,
    )


TOKENS = Tokenizer(name="ids", path=None, vocab_size=500, end_of_text=499, fingerprint="f")


def test_training_job_follows_from_the_settings(ask, rows):
    settled = settle(ask(seed=4, training={"max_steps": 12}))
    model = with_vocabulary(settled.run.model.shape, 500)
    job = training_job(settled, model, rows, TOKENS, tags={"mine": "yes"})
    assert job.model == model and job.shards == rows
    assert (job.training.seed, job.training.steps) == (4, 12)
    assert job.validation_rows == 2**13 // 256
    assert job.tracking.tags["mine"] == "yes" and job.tracking.dataset.digest == "abcdef"
    assert {name for name, _ in leaves(settled.run)} <= set(job.tracking.params)
    assert job.tracking.params["model.parameters"] == str(job.model.parameters)
    again = type(job).model_validate_json(job.model_dump_json())
    assert again == job


def test_password_of_the_tracking_server_is_not_stored(ask, rows, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:s3cret@db.example/mlflow")
    settled = settle(ask())
    model = with_vocabulary(settled.run.model.shape, 500)
    job = training_job(settled, model, rows, TOKENS, tags={})
    assert job.tracking.uri == "postgresql://***@db.example/mlflow"
    assert "s3cret" not in job.model_dump_json()


def test_utilisation_is_shown_only_if_the_peak_is_known(ask, rows, gpu):
    def peak(precision: str) -> float | None:
        settled = settle(ask(device="auto", training={"precision": precision}))
        model = with_vocabulary(settled.run.model.shape, 500)
        return training_job(settled, model, rows, TOKENS, tags={}).peak_flops

    assert peak("bf16") == 989e12
    assert peak("fp32") is None, "the table has bf16 peaks"


def test_record_is_readable_json(ask):
    run = settle(ask(run_name="mine")).run
    recorded = artifacts.read_json(Path(run.run_dir) / "run.json")
    assert recorded["run_name"] == "mine" and recorded["training"]["max_steps"] == 200


def test_new_run_names_its_differences_from_the_most_similar_run(ask):
    first = trained(ask(seed=1))
    assert unlike_others(first) == "none exists yet"
    far = trained(ask(seed=2, training={"max_steps": 9, "learning_rate": 0.5}))
    assert "--max-steps 200 instead of 9" in unlike_others(far)
    assert "--learning-rate 0.001 instead of 0.5" in unlike_others(far)
    third = trained(ask(seed=3))
    told = f"the most similar of 2, {first.run_name}, has --seed 1 instead of 3"
    assert unlike_others(third) == told
    twin = settle(ask(seed=3, run_name="twin")).run
    assert f"{third.run_name}, differs in its name only" in unlike_others(twin)
    for run in (first, far, third):
        (run.run_dir / "run.json").write_text("[]")
    assert "are unknown" in unlike_others(twin)


def test_new_run_is_not_compared_with_what_it_could_not_use(ask, tmp_path, caplog):
    caplog.set_level("INFO", logger="zeroflow")
    useful = trained(ask(seed=2, training={"max_steps": 9}))
    settle(ask(seed=1, run_name="untrained"))  # no checkpoint, but more similar
    files = {"data_mode": "files", "data_path": (str(tmp_path / "a.txt"),)}
    (tmp_path / "a.txt").write_text("a text\n" * 99)
    on_text = ask(seed=1, data=files, tokenizer={"tokenizer_name": "train"})
    assert unlike_others(settle(on_text).run) == "none exists yet for this text"
    trained(on_text)
    new = settle(ask(seed=1)).run
    assert unlike_others(new).startswith(f"the most similar of 2, {useful.run_name}, has --seed 2")
    assert "starts over" not in caplog.text

    assert not settle(ask(seed=3, run_name="untrained")).resumes
    told = "run untrained has no checkpoint yet and starts over: it was begun with "
    assert f"{told}--seed 1, now it is 3" in caplog.text


def test_ranks_are_those_of_all_machines_and_a_check_runs_on_those_of_one(ask, rows):
    asked = ask(training={"nodes": 2, "gpus": 2, "zero_stage": 1, "batch_tokens": 4096})
    settled = settle(asked)
    job = training_job(settled, with_vocabulary(SIZES["tiny"], 500), rows, TOKENS, tags={})
    work = job.training.workload
    assert (work.ranks, work.nodes) == (4, 2)
    assert (
        settled.run.train_tokens
        == settled.run.training.max_steps * 4096
        == work.batch_tokens * (settled.run.training.max_steps)
    )
    alone = job.training.on_one_machine.workload
    assert (alone.ranks, alone.nodes, alone.rank_rows) == (2, 1, work.rank_rows)
    on_one = settle(ask(training={"nodes": 1, "gpus": 4}, run_name=settled.run.run_name))
    assert on_one.resumes and on_one.run.batch_rows == settled.run.batch_rows


def test_fewer_machines_have_to_share_the_rows_of_a_step_evenly(ask):
    training = {"nodes": 4, "gpus": 2, "seq_len": 64, "batch_tokens": 64 * 24}
    run = settle(ask(training=training, hosts={"min_nodes": 3})).run
    assert run.hosts.min_nodes == 3
    with pytest.raises(ValueError, match=r"6 ranks of 3 machines.* 16 rows .*--batch-tokens 1536"):
        settle(ask(training=training | {"batch_tokens": 64 * 16}, hosts={"min_nodes": 2}))
    with pytest.raises(ValueError, match="--min-nodes 4 is not less than --nodes 4"):
        settle(ask(training=training, hosts={"min_nodes": 4}))


def test_launcher_needs_several_machines_and_its_own_settings(ask):
    with pytest.raises(ValueError, match="--launcher slurm needs --nodes 2 or more"):
        settle(ask(hosts={"launcher": "slurm"}))
    with pytest.raises(ValueError, match="also needs --volume-claim"):
        ask(hosts={"launcher": "kubernetes", "image": "a"})
