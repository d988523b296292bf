"""README.md of an exported model."""

import shlex

import pytest
import yaml
from left import begun, completed
from tiny import SHAPE, synthetic_rows

from zeroflow.cli.arguments import Parser, add_settings, read_settings
from zeroflow.data.corpus import CorpusConfig
from zeroflow.data.tokenizer import LLAMA_TOKENIZER, TokenizerConfig
from zeroflow.report import model_card as cards
from zeroflow.report.model_card import model_card
from zeroflow.report.records import RunReport
from zeroflow.settings import existing, settle
from zeroflow.settings.run_config import RunConfig
from zeroflow.training.job import TrainingJob
from zeroflow.training.schedule import Earlier


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> TrainingJob:
    """A completed run of 2 steps, whose loss fell from 6 to 4."""
    cache = tmp_path_factory.mktemp("cache")
    shards, tokenizer = synthetic_rows(cache)
    run = RunConfig(
        run_name="mine",
        device="cpu",
        cache_dir=cache,
        seed=3,
        data={"data_mode": "synthetic"},
        tokenizer={"vocab_size": 300},
        model=SHAPE.model_dump(),
        training={"max_steps": 2, "seq_len": 32, "batch_size": 1, "learning_rate": 1e-2},
    )
    found = begun(run, shards, tokenizer)
    completed(found, (6.0, 5.0, 4.0))
    return found


def test_card_has_metadata_for_the_hub_and_the_losses_of_its_step(job):
    last, before = (model_card(job.folder, step=step, format="hf") for step in (2, 1))
    _, metadata, text = last.split("---\n", 2)
    assert yaml.safe_load(metadata) == {
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
        "tags": ["zeroflow"],
    }
    assert text.startswith("\n# mine\n")
    assert "| validation loss | 4.0000 nats per token |" in last
    assert "| validation loss | 5.0000 nats per token |" in before
    assert "2 steps, 1,024 tokens" in last and "1 step, 512 tokens" in before
    assert str(job.run_dir) not in last, "a path of this machine"


def test_card_of_an_extended_run_says_how_it_was_extended(job):
    card = model_card(job.folder, step=2, format="hf")
    assert "This command trains on the same rows" in card
    extended = job.training.schedule.replace(
        before=Earlier(steps=1, schedule=job.training.schedule.replace(steps=1))
    )
    training = job.training.replace(schedule=extended)
    job.replace(training=training).write(job.folder.job)
    try:
        card = model_card(job.folder, step=2, format="hf")
    finally:
        job.write(job.folder.job)
    assert "The run was extended at step 1 from 1 to 2 steps: " in card
    assert "This command trains on the same rows" not in card


def test_card_says_that_the_overfit_check_failed(job):
    assert "The run failed" not in model_card(job.folder, step=2, format="hf")
    report = RunReport.read(job.folder.report)
    report.replace(status="failed").write(job.folder.report)
    try:
        card = model_card(job.folder, step=2, format="hf")
    finally:
        report.write(job.folder.report)
    assert "**The run failed:** the overfit check reached a loss of only 0.1000: " in card


def test_command_in_the_card_has_the_settings_of_the_run(job):
    card = model_card(job.folder, step=2, format="hf")
    [command] = [line for line in card.splitlines() if line.startswith("zeroflow pretrain")]
    parser = Parser()
    add_settings(parser, RunConfig, "run")
    arguments = parser.parse_args(shlex.split(command)[2:])
    again = RunConfig.model_validate(read_settings(RunConfig, arguments))
    cache = job.folder.cache.path
    settled = settle.look_up(again.replace(run_name="again", cache_dir=cache)).run
    first = existing.load(cache, "mine")
    assert settled.replace(run_name="mine", cache_dir=first.cache_dir) == first


def test_card_of_a_gguf_file_has_commands_for_llama_cpp_and_ollama(job):
    card = model_card(job.folder, step=2, format="gguf")
    assert "llama-server --model mine.gguf\n" in card and "library_name" not in card
    modelfile, create = card.split("With Ollama:\n\n```sh\n")[1].splitlines()[:2]
    assert shlex.split(modelfile)[:2] == [
        "printf",
        'FROM ./mine.gguf\\nTEMPLATE "{{ .Prompt }}"\\n',
    ]
    assert create == "ollama create mine -f Modelfile"


@pytest.mark.parametrize(
    ("corpus", "text", "licence"),
    [
        ({"data_mode": "fineweb"}, "HuggingFaceFW/fineweb-edu, sample-10BT", "ODC-By 1.0"),
        ({"data_mode": "sample"}, "Python's standard library", "Python Software Foundation"),
        ({"data_mode": "files", "data_path": ["/home/me/a.txt"]}, "own files: a.txt", "not record"),
        ({"data_mode": "hub", "dataset": "o/n", "dataset_config": "en"}, "o/n, en", "see the page"),
    ],
)
def test_card_names_the_text_without_folders_and_its_licence(corpus, text, licence):
    data = CorpusConfig.model_validate(corpus)
    assert text in cards._text(data) and "/home" not in cards._text(data)
    assert licence in cards._licence(data)


def test_card_names_the_tokenizer_without_folders_and_its_licence():
    llama = TokenizerConfig(tokenizer_name=LLAMA_TOKENIZER, tokenizer_revision="ab")
    assert cards._tokenizer_name(llama) == LLAMA_TOKENIZER
    assert cards._tokenizer_licence(llama) == "Llama 3.1 Community License"
    own = TokenizerConfig(tokenizer_name="/home/me/tokenizer")
    assert cards._tokenizer_name(own) == "tokenizer"
    assert cards._tokenizer_licence(own) == "not recorded"
