"""`zeroflow plan` and the run that the same flags start: one decision, one workload."""

import re
import shutil
from typing import Any

import pytest
from faults import NOBODY, asking
from hub import Hub, fineweb_edu_repo, llama_tokenizer_repo
from tiny import SHAPE, contents

from zeroflow.data.tokenizer import LLAMA_TOKENIZER
from zeroflow.data.tokenizer_origins import fetch_tokenizer
from zeroflow.model.sizes import with_vocabulary
from zeroflow.report import plan_page
from zeroflow.report.plan import Plan
from zeroflow.settings.run_config import RunConfig
from zeroflow.settings.settle import settle
from zeroflow.settings.settled import Settled
from zeroflow.stages.plan import forecast, predict
from zeroflow.training.workload import Workload

SYNTHETIC = {"data": {"data_mode": "synthetic"}, "tokenizer": {"vocab_size": 512}}
TRAINED = {"tokenizer": {"tokenizer_name": "train", "vocab_size": 400}}


@pytest.fixture
def ask(tmp_path):
    def make(**settings: Any) -> RunConfig:
        usual = {"device": "cpu", "cache_dir": tmp_path / "cache", "model": SHAPE.model_dump()}
        return RunConfig.model_validate(usual | settings)

    return make


def trains(asked: RunConfig) -> tuple[Settled, Workload]:
    """The run of `asked` until its model is built."""
    settlement = settle(asked)
    run = settlement.run
    tokenizer = fetch_tokenizer(run.tokenizer, run.data, run.cache_dir)
    model = with_vocabulary(run.model.shape, tokenizer.vocab_size)
    return run, run.training_config(model, settlement.device).workload


def differs(planned: Plan, run: Settled, work: Workload) -> dict[str, tuple[object, object]]:
    """Facts in which a plan differs from the run."""
    facts = {
        "workload": (planned.workload, work),
        "parameters": (sum(planned.parameters.values()), work.model.parameters),
        "run": (planned.run, run.run_name),
        "data": (planned.data and planned.data.name, run.data.name),
        "tokenizer": (planned.tokenizer and planned.tokenizer.name, run.tokenizer.tokenizer_name),
        "steps": (planned.steps, run.training.max_steps),
        "tokens": (planned.tokens, run.train_tokens),
        "batch": (planned.batch_tokens, run.training.batch_tokens),
    }
    return {name: pair for name, pair in facts.items() if pair[0] != pair[1]}


def agree(asked: RunConfig) -> Plan:
    """Check that a plan leaves no trace, and is that of the run, also once the run has started."""
    before = contents(asked.cache_dir)
    planned = forecast(asked)
    assert contents(asked.cache_dir) == before, "a plan writes nothing"
    run, work = trains(asked)
    assert not differs(planned, run, work)
    assert not differs(forecast(asked), run, work)
    return planned


@pytest.mark.parametrize(
    "settings",
    [
        SYNTHETIC,
        SYNTHETIC | {"model": {"size": "small"}},
        SYNTHETIC | {"training": {"seq_len": 100, "batch_tokens": 1400, "max_steps": 30}},
        SYNTHETIC | {"training": {"batch_size": 3, "grad_accum_steps": 5, "document_mask": True}},
        SYNTHETIC | {"training": {"gpus": 2, "zero_stage": 3, "batch_tokens": 4096}},
        SYNTHETIC | {"training": {"nodes": 2, "gpus": 2, "zero_stage": 1, "batch_tokens": 4096}},
        SYNTHETIC | {"training": {"precision": "bf16", "compile": True, "deterministic": True}},
        SYNTHETIC | {"training": {"activation_checkpointing": "full", "token_type": "uint16"}},
        SYNTHETIC | {"run_name": "mine", "seed": 3},
    ],
)
def test_plan_equals_that_of_the_run(ask, settings):
    planned = agree(ask(**settings))
    assert planned.vocabulary_is_certain


@pytest.mark.parametrize("vocab_size", [400, 32_768])
def test_vocabulary_of_a_tokenizer_that_is_trained_is_planned_as_the_text_gives_it(
    ask, text, vocab_size
):
    trained = {"tokenizer_name": "train", "vocab_size": vocab_size}
    planned = agree(ask(data=text.corpus.model_dump(), tokenizer=trained))
    size = planned.workload.model.vocab_size
    assert (size < vocab_size) == (vocab_size > 400), "of sixty documents"
    assert f"{planned.vocabulary_tokens:,} padded to {size:,}, " in plan_page.text(planned)


def test_size_of_a_vocabulary_that_repetitive_text_may_not_reach_is_planned_as_a_limit(
    ask, tmp_path
):
    templates = tmp_path / "templates.txt"
    templates.write_text("Question: 1 + 2? Answer: 3\n" * 10_000)
    data = {"data_mode": "files", "data_path": (str(templates),)}
    asked = ask(data=data, tokenizer={"tokenizer_name": "train", "vocab_size": 2000})
    shown = plan_page.text(forecast(asked))
    assert re.search(r"parameters +at most [\d,]+", shown)
    assert "at most 2,000 padded to 2,048, as asked for: the tokenizer is trained first" in shown


def test_vocabulary_size_without_effect_is_named_in_the_plan(ask):
    with Hub([fineweb_edu_repo(40), llama_tokenizer_repo()]) as hub, asking(hub.url) as patch:
        patch.setenv("HF_TOKEN", "hf_test")
        planned = forecast(ask(tokenizer={"vocab_size": 5000}))
    [note] = planned.notes
    assert note.startswith(
        f"--vocab-size 5000 has no effect, because {LLAMA_TOKENIZER} has its own"
    )
    assert note in plan_page.text(planned)


def test_local_tokenizer_is_read(ask, text, tmp_path):
    folder, file = tmp_path / "mine", tmp_path / "any-name.json"
    shutil.copytree(text.tokenizer.path, folder)
    shutil.copy(text.tokenizer.file, file)
    for name in (folder, file):
        local = {"tokenizer_name": str(name)}
        planned = agree(ask(data=text.corpus.model_dump(), tokenizer=local))
        assert planned.vocabulary_is_certain and planned.vocabulary_source == f"as in {name}"
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"any-name.json: tokenizer.json is not a valid tokenizer"):
        forecast(ask(data=text.corpus.model_dump(), tokenizer={"tokenizer_name": str(file)}))


def test_offline_plan_is_that_of_the_sample(ask):
    """As the sample's tokenizer takes long to train, its vocabulary is compared as it is asked."""
    with asking(NOBODY):
        asked = ask(tokenizer={"vocab_size": 5000})
        planned = forecast(asked)
        run = settle(asked).run
    assert run.data.data_mode == "sample" and planned.data.name == "sample"
    assert "cannot be reached" in planned.data.reason
    model = with_vocabulary(run.model.shape, 5000)
    assert not differs(planned, run, run.workload(model, planned.device))
    assert not planned.vocabulary_is_certain and planned.vocabulary_is_limit


def test_plan_with_a_hub_reads_its_tokenizer(ask):
    with Hub([fineweb_edu_repo(40), llama_tokenizer_repo()]) as hub, asking(hub.url) as patch:
        patch.setenv("HF_TOKEN", "hf_test")
        planned = agree(ask())
        assert planned.data.name.startswith("fineweb-edu")
        assert planned.tokenizer.name == LLAMA_TOKENIZER
        assert planned.workload.model.vocab_size < 128_256, "of the small tokenizer of the tests"


def test_tokenizer_that_a_plan_has_read_is_not_downloaded_again(ask):
    with Hub([fineweb_edu_repo(40), llama_tokenizer_repo()]) as hub, asking(hub.url) as patch:
        patch.setenv("HF_TOKEN", "hf_test")
        settlement = settle(ask(run_name="mine"))
        planned, run = predict(settlement), settlement.run
        tokenizer = fetch_tokenizer(run.tokenizer, run.data, run.cache_dir)
    asked = [path for _, path in hub.requests if path.endswith("/tokenizer_config.json")]
    assert len(asked) == 1
    assert planned.workload.model.vocab_size == tokenizer.vocab_size


def test_plan_assumes_what_the_hub_does_not_answer_and_says_why(ask):
    with asking(NOBODY):
        dataset = {"data_mode": "hub", "dataset": "someone/texts"}
        planned = forecast(ask(data=dataset, tokenizer={"tokenizer_name": "some/tokenizer"}))
        for choice in (planned.data, planned.tokenizer):
            assert "assumed to be available; here, the hub cannot be reached" in choice.reason
        assert not planned.vocabulary_is_certain and planned.workload.model.vocab_size == 128_256
        elsewhere = forecast(ask(device="auto"), gpu="H100")
        assert elsewhere.data.name.startswith("fineweb-edu")
        assert elsewhere.tokenizer.name == LLAMA_TOKENIZER
        for choice in (elsewhere.data, elsewhere.tokenizer):
            assert "assumed for another machine" in choice.reason
        assert "assumed, as Llama-3.1's" in plan_page.text(elsewhere)


def test_plan_of_an_existing_run_accepts_and_refuses_the_same_settings(ask):
    asked = ask(**SYNTHETIC, training={"max_steps": 10, "seq_len": 64})
    run = settle(asked).run
    checkpoints = run.folder.checkpoints / "step-00000006"
    checkpoints.mkdir(parents=True)
    same = [asked, RunConfig(run_name=run.run_name, cache_dir=run.cache_dir)]
    for again in same:
        planned = forecast(again)
        assert (planned.run, planned.workload.seq_len, planned.steps_done) == (run.run_name, 64, 6)
        assert " for steps 7 to 10, " in plan_page.time_line(planned)
    other = asked.replace(run_name=run.run_name, seed=5)
    for decide in (forecast, settle):
        with pytest.raises(ValueError, match="was trained with --seed 0, now it is 5"):
            decide(other)
    checkpoints.rename(checkpoints.with_name("step-00000010"))
    assert plan_page.time_line(forecast(asked)) == "none, because all 10 steps are trained"


def test_gpu_that_is_not_known_is_planned_with_its_memory(ask):
    asked = ask(device="auto", **SYNTHETIC | {"model": {"size": "small"}})
    few, many = (forecast(asked, gpu="RTX 9090", memory_gb=gb) for gb in (24, 48))
    assert few.workload.micro_batch_rows < many.workload.micro_batch_rows
    assert many.notes == ("RTX 9090 is not a known GPU: compute capability 9.0 is assumed",)
    assert plan_page.time_line(many) == "unknown, the peak of RTX 9090 is not known"
    small = forecast(asked, gpu="L4", memory_gb=12)
    assert small.device.memory_bytes == 12 * 2**30 and not small.notes
