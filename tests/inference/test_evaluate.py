"""Scores of a checkpoint on texts and tasks, and where they are shown."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from left import begun, completed
from public_tokenizers import save
from tiny import SHAPE, jsonl_corpus, lively_model
from tokenizers import decoders, models, normalizers, pre_tokenizers
from torch.nn.functional import cross_entropy

from zeroflow.cli import commands
from zeroflow.data.build import build_shards
from zeroflow.data.rows import Rows
from zeroflow.data.tokenizer_origins import fetch_tokenizer
from zeroflow.data.validation_sample import draw_sample, target_bytes
from zeroflow.inference import core_tasks, evaluation, scoring, trained
from zeroflow.inference.evaluate import (
    EvaluationFailed,
    EvaluationJob,
    evaluate,
    evaluate_apart,
    is_known,
    require_tasks,
)
from zeroflow.inference.evaluation import (
    DEFAULT_TASKS,
    Evaluation,
    EvaluationConfig,
    TaskMetric,
    TaskScore,
)
from zeroflow.inference.export import export
from zeroflow.inference.scoring import Request
from zeroflow.inference.text_scores import _windows
from zeroflow.report.comparison import compare
from zeroflow.report.comparison_page import page
from zeroflow.report.model_card import model_card
from zeroflow.report.outcome import outcome
from zeroflow.settings.run_config import RunConfig
from zeroflow.settings.settle import settle
from zeroflow.training.job import TrainingJob
from zeroflow.training.retention import Retention
from zeroflow.training.saver import Saver
from zeroflow.training.state import new_state
from zeroflow.training.validation import bits_per_byte, validation_loss

STEP = 2


@pytest.fixture(scope="module")
def job(text, tmp_path_factory) -> TrainingJob:
    """A completed run, whose checkpoint has lively weights."""
    cache = tmp_path_factory.mktemp("evaluated")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        run = RunConfig(
            run_name="mine",
            device="cpu",
            cache_dir=cache,
            data={"data_mode": "files", "data_path": text.corpus.data_path},
            tokenizer={"tokenizer_name": "train", "vocab_size": 400},
            model=SHAPE.model_dump(),
            training={
                "max_steps": STEP,
                "seq_len": 32,
                "batch_size": 1,
                "validation_fraction": 0.3,
            },
        )
        settled = settle(run).run
        tokenizer = fetch_tokenizer(settled.tokenizer, settled.data, cache)
        shards = build_shards(settled.shard_config, settled.data, tokenizer, cache)
        job = begun(run, shards, tokenizer)
    completed(job, (6.0, 5.0, 4.0))
    state = new_state(job.training)
    state.model.load_state_dict(lively_model(job.model).state_dict())
    state.step = STEP
    saver = Saver(job.folder.checkpoints, Retention(keep=1), tokenizer=tokenizer.fingerprint)
    saver.save(state, val_loss=4.0)
    saver.wait()
    return job


def asked(job: TrainingJob, **config: object) -> EvaluationJob:
    settings = EvaluationConfig(device="cpu", **config)
    return EvaluationJob(cache=job.folder.cache.path, run="mine", config=settings)


def test_held_out_rows_are_scored_as_in_training(job):
    [score] = evaluate(asked(job)).texts
    rows = Rows(job.shards, "validation")
    sample = draw_sample(job.shards, job.validation_rows)
    documents, workload = sample.documents[:, 1:], job.training.workload
    expected = validation_loss(lively_model(job.model), rows, sample.rows, workload, documents)
    assert (score.loss, score.loss_error) == (expected.mean, expected.standard_error)
    # Bytes per token differ between documents, so the errors are not proportional
    sizes = target_bytes(job.shards, job.tokenizer, sample)
    scored = documents >= 0
    in_bytes = np.bincount(documents[scored], sizes[scored])
    residuals = expected.nats / math.log(2) - score.bpb * in_bytes
    units = len(residuals)
    spread = math.sqrt((residuals**2).sum() * units / (units - 1)) / in_bytes.sum()
    assert score.bpb_error == pytest.approx(spread, rel=1e-6)
    assert score.bpb == bits_per_byte(score.loss, score.text_bytes / score.tokens)
    assert score.perplexity == math.exp(score.loss)


def test_spaces_that_decoding_adds_are_not_bytes_of_a_text(text, tmp_path):
    words = ["<|endoftext|>", "[UNK]", *"天地玄黄"]
    model = models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    wordpiece = tokenizers.Tokenizer(model)
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wordpiece.normalizer = normalizers.BertNormalizer()
    wordpiece.decoder = decoders.WordPiece()
    folder = save(tmp_path / "tokenizer", wordpiece)
    tokenizer = text.tokenizer.replace(path=folder, end_of_text=0, encoder="tokenizers")
    for line in ("天地玄黄", "天 地"):
        ids = np.array(wordpiece.encode(line).ids)
        windows = _windows(line, ids, tokenizer, context=3, most=100)
        assert sum(size for _, size, _ in windows) == pytest.approx(len(line.encode()))


def test_text_is_scored_document_by_document_with_its_end(job, text, tmp_path):
    texts = [*text.texts[:3], "é", "a"]
    jsonl_corpus(tmp_path / "a.jsonl", texts)
    [score] = evaluate(asked(job, data_path=(str(tmp_path / "a.jsonl"),))).texts
    model, end = lively_model(job.model), job.tokenizer.end_of_text
    nats, tokens = [0.0] * len(texts), [0] * len(texts)
    for number, one in enumerate(texts):
        ids = job.tokenizer.load().encode(one, add_special_tokens=False).ids
        whole = torch.tensor([end, *ids, end])
        for start in range(0, len(whole) - 1, 32):  # the context
            window = whole[None, start : start + 33]
            with torch.no_grad():
                logits = model(window[:, :-1])[0]
            nats[number] += cross_entropy(logits, window[0, 1:], reduction="sum").item()
            tokens[number] += window.shape[1] - 1
    assert score.tokens == sum(tokens) and score.documents == len(texts)
    assert score.text_bytes == sum(len(one.encode()) for one in texts)
    # the same sums in fp32, in another order
    assert score.loss == pytest.approx(sum(nats) / sum(tokens), rel=1e-5)
    assert score.bpb == pytest.approx(sum(nats) / math.log(2) / score.text_bytes, rel=1e-5)
    residuals = np.array(nats) - score.loss * np.array(tokens)
    units = len(tokens)
    spread = math.sqrt((residuals**2).sum() * units / (units - 1)) / sum(tokens)
    assert score.loss_error == pytest.approx(spread, rel=1e-3)


def test_each_path_has_a_score_of_its_first_tokens(job, text, tmp_path):
    for name, part in (("a", text.texts[:2]), ("b", text.texts[2:4]), ("c", text.texts[4:6])):
        jsonl_corpus(tmp_path / f"{name}.jsonl", part)
    paths = (str(tmp_path / "[ab].jsonl"), str(tmp_path / "c.jsonl"))
    both, last = evaluate(asked(job, data_path=paths, text_tokens=50)).texts
    assert (both.text, last.text) == paths
    assert both.tokens == last.tokens == 50 and both.documents == last.documents == 1
    assert both.revision != last.revision


@pytest.mark.parametrize("blank", [" \n\t" * 200, "\u00a0\u3000\n"])
def test_text_of_only_white_space_is_refused(job, tmp_path, blank):
    file = tmp_path / "blank.txt"
    file.write_text(blank, encoding="utf-8")
    with pytest.raises(ValueError, match=r"blank\.txt contains only white space: name files with"):
        evaluate(asked(job, data_path=(str(file),)))


def test_score_is_kept_if_the_next_text_is_empty(job, text, tmp_path):
    sound, empty = tmp_path / "sound.txt", tmp_path / "empty.txt"
    sound.write_text(text.texts[5])
    empty.touch()
    with pytest.raises(ValueError, match=r"empty\.txt"):
        evaluate(asked(job, data_path=(str(sound), str(empty))))
    step = trained.load(job.folder.cache.path, job.folder.name).step
    kept = evaluation.read(job.folder).of(step)
    assert kept and [score.text for score in kept.texts].count(str(sound)) == 1


def test_scores_do_not_depend_on_the_other_texts_of_a_batch():
    model = lively_model()
    generator = torch.Generator().manual_seed(0)
    requests = [
        Request(torch.randint(256, (length,), generator=generator).tolist(), scored)
        for length, scored in ((9, 3), (40, 39), (2, 1), (17, 5))
    ]
    together = scoring.score(model, requests)
    for request, found in zip(requests, together, strict=True):
        [alone] = scoring.score(model, [request])
        assert found.nats == pytest.approx(alone.nats, rel=1e-5) and found.greedy == alone.greedy
    with torch.no_grad():
        best = model(torch.tensor([requests[0].ids[:-1]]))[0, -3:].argmax(-1).tolist()
    greedy = Request([*requests[0].ids[:-3], best[0]], 1)
    assert [found.greedy for found in scoring.score(model, [greedy])] == [True]


def test_new_scores_replace_older_ones_of_the_same_text_and_step(tmp_path, job):
    folder = job.folder.inner("records")
    folder.path.mkdir()

    def scored(step: int, task: str, value: float) -> Evaluation:
        metrics = {"acc": TaskMetric(value=value, error=0.1)}
        score = TaskScore(task=task, version="1", examples=1, few_shot=0, metrics=metrics)
        return evaluation.begun(step).replace(tasks=[score], harness="0.4.13")

    for step, task, value in ((2, "a", 0.1), (1, "a", 0.2), (2, "b", 0.3), (2, "a", 0.4)):
        evaluation.add(folder, scored(step, task, value))
    found = evaluation.read(folder)
    assert [one.step for one in found.steps] == [1, 2]
    assert found.newest is not None
    assert {f.of: f.value for f in found.newest.main_figures()} == {"a": 0.4, "b": 0.3}


def test_evaluation_is_shown_by_the_command_in_the_report_the_card_mlflow_and_a_sweep(
    job, text, tmp_path, capsys, console, monkeypatch
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    job.folder.evaluation.unlink(missing_ok=True)
    jsonl_corpus(tmp_path / "a.jsonl", text.texts[:3])
    cache = job.folder.cache
    command = ["evaluate", "--run=mine", f"--cache-dir={cache.path}", "--device=cpu", "--json"]
    assert commands.main([*command, f"--data-path={tmp_path / 'a.jsonl'}"]) == 0
    said = capsys.readouterr().out
    [score] = json.loads(said[said.index("{") :])["texts"]
    shown = f"{score['bpb']:.4f} ± {score['bpb_error']:.4f}"
    assert score["perplexity"] == math.exp(score["loss"])
    assert f"| {shown} |" in job.folder.report_page.read_text()
    card = model_card(job.folder, step=STEP, format="hf")
    assert f"| a.jsonl | bpb | {shown} |" in card and str(tmp_path) not in card
    found = outcome(cache.path, "mine")
    assert found is not None
    compared = page("s", compare([found]), plots=[], unfinished={}, reasons={}).linked
    assert "## Evaluation" in compared and shown in compared

    from mlflow.tracking import MlflowClient

    ids = json.loads(job.folder.mlflow.read_text())
    client = MlflowClient(f"sqlite:///{cache.mlflow / 'mlflow.db'}")
    metrics = client.get_run(ids["run_id"]).data.metrics
    [key] = [key for key in metrics if key.endswith("a.jsonl/bpb")]
    assert metrics[key] == score["bpb"] and metrics[f"{key}_stderr"] == score["bpb_error"]


def test_evaluation_in_its_own_process_is_recorded_and_then_known(job, text, tmp_path):
    jsonl_corpus(tmp_path / "a.jsonl", text.texts[:2])
    work = asked(job, data_path=(str(tmp_path / "a.jsonl"),))
    assert not is_known(work, STEP)
    evaluate_apart(work)
    assert is_known(work, STEP)
    jsonl_corpus(tmp_path / "a.jsonl", text.texts[:3])
    assert not is_known(work, STEP), "the file has changed"
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(EvaluationFailed, match=r"could not be evaluated: .*a\.jsonl"):
        evaluate_apart(work)


def test_score_of_a_part_is_not_known_for_the_whole(job, text, tmp_path):
    jsonl_corpus(tmp_path / "b.jsonl", text.texts[:3])
    name = str(tmp_path / "b.jsonl")
    [part] = evaluate(asked(job, data_path=(name,), text_tokens=9)).texts
    assert part.tokens == 9
    assert is_known(asked(job, data_path=(name,), text_tokens=9), STEP)
    assert not is_known(asked(job, data_path=(name,)), STEP)
    [whole] = evaluate(asked(job, data_path=(name,), text_tokens=10_000)).texts
    assert 9 < whole.tokens < 10_000
    assert is_known(asked(job, data_path=(name,)), STEP), "the text has fewer tokens than both"
    assert is_known(asked(job, data_path=(name,), text_tokens=9), STEP), "the part is kept"
    newest = evaluation.read(job.folder).newest
    assert newest is not None
    kept = {f.of: f.value for f in newest.main_figures() if f.of.startswith(name)}
    assert kept == {name: whole.bpb, f"{name}, first 9 tokens": part.bpb}, "compared apart"


def test_part_of_a_task_has_a_name_of_its_own():
    whole = TaskScore(
        task="a",
        version="1",
        examples=10,
        few_shot=0,
        metrics={"acc": TaskMetric(value=0.5, error=0.1)},
    )
    part, all_ = whole.replace(examples=3, most=3), whole.replace(most=20)
    assert [one.title for one in (whole, part, all_)] == ["a", "a, 3 examples", "a"]
    both = (
        evaluation.begun(1)
        .replace(tasks=[whole])
        .updated(evaluation.begun(1).replace(tasks=[part]))
    )
    assert [figure.of for figure in both.main_figures()] == ["a", "a, 3 examples"]


def test_text_has_one_name_wherever_the_command_runs(job, text, tmp_path, monkeypatch):
    jsonl_corpus(tmp_path / "c.jsonl", text.texts[:1])
    monkeypatch.chdir(tmp_path)
    [score] = evaluate(asked(job, data_path=("c.jsonl",), text_tokens=9)).texts
    assert score.text == str(tmp_path / "c.jsonl")
    assert is_known(asked(job, data_path=(str(tmp_path / "c.jsonl"),), text_tokens=9), STEP)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_tokens": 50}, "--text-tokens has no effect without --data-path or --dataset"),
        ({"text_column": "body"}, "--text-column has no effect without --data-path or --dataset"),
        ({"dataset_config": "en"}, "--dataset-config has no effect without --dataset: add it"),
        ({"task_path": "mine"}, "--task-path has no effect without --tasks: add it"),
        ({"task_examples": 3}, "--task-examples has no effect without --tasks or --core-path"),
    ],
    ids=str,
)
def test_settings_of_texts_and_tasks_that_are_not_named_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(**settings).refuse_what_does_nothing()


def test_default_stands_for_tasks_that_suit_small_models():
    assert EvaluationConfig(tasks=("mine", "default", "piqa")).task_names == [
        "mine",
        *DEFAULT_TASKS,
    ]


TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
{rest}
metadata:
  version: 1.0
"""
CHOICES = """
doc_to_choice: "{{choices}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""
GENERATED = """
generation_kwargs:
  until: ["."]
  max_gen_toks: 12
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def tasks(text, tmp_path) -> Path:
    """Three tasks in local files: choices, the likelihood of texts, and generated answers."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    sentences = [one.split(". ") for one in text.texts[:12]]
    questions = [
        {
            "question": f"{first}." if number else "",
            "choices": [second, f"{second} é", "x"],
            "answer": number % 3,
            "text": f"{first}. {second}",
        }
        for number, (first, second, *_) in enumerate(sentences)
    ]
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))
    kinds = {
        "choices": ("multiple_choice", "answer", CHOICES),
        "texts": ("loglikelihood_rolling", '"{{text}}"', ""),
        "answers": ("generate_until", '"{{choices[0]}}"', GENERATED),
    }
    for name, (kind, target, rest) in kinds.items():
        file = folder / "q.jsonl"
        content = TASK.format(name=name, file=file, kind=kind, target=target, rest=rest)
        if name == "texts":
            content = content.replace('"{{question}}"', '""')
        (folder / f"{name}.yaml").write_text(content)
    return folder


def test_local_tasks_have_the_scores_that_the_harness_gives_the_exported_model(
    job, tasks, tmp_path, monkeypatch
):
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate", reason="the harness's own hf model needs it")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from zeroflow.inference.harness_model import HarnessModel

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    found = evaluate(asked(job, tasks=("choices", "texts", "answers"), task_path=str(tasks)))
    scores = {score.task: score for score in found.tasks}
    assert {score.examples for score in scores.values()} == {12}
    assert found.harness == "0.4.13" and scores["choices"].main == "acc_norm"

    model = trained.load(job.folder.cache.path, "mine")
    export(model.model, model.tokenizer, tmp_path / "hf", context=model.context)
    theirs = HFLM(str(tmp_path / "hf"), device="cpu", dtype="float32", batch_size=4)
    index = TaskManager(include_path=str(tasks), include_defaults=False)

    def results(lm, *names: str):
        return lm_eval.simple_evaluate(
            lm, tasks=list(names), task_manager=index, bootstrap_iters=10
        )

    expected = results(theirs, "choices")
    samples = results(HarnessModel(model), "choices")["samples"]["choices"]
    for ours, other in zip(samples, expected["samples"]["choices"], strict=True):
        for (nats, greedy), (their_nats, their_greedy) in zip(
            ours["filtered_resps"], other["filtered_resps"], strict=True
        ):
            # the same sums in fp32, in another order
            assert nats == pytest.approx(their_nats, rel=1e-5) and greedy == their_greedy
    for name in ("acc", "acc_norm"):
        assert (
            scores["choices"].metrics[name].value == expected["results"]["choices"][f"{name},none"]
        )
        error = expected["results"]["choices"][f"{name}_stderr,none"]
        assert scores["choices"].metrics[name].error == error
    bits = [
        (-sample["filtered_resps"][sample["target"]][0], sample["arguments"][sample["target"]][1])
        for sample in samples
    ]
    answer_bpb = sum(n for n, _ in bits) / math.log(2) / sum(len(a.encode()) for _, a in bits)
    assert scores["choices"].metrics["answer_bpb"].value == pytest.approx(answer_bpb)

    # The harness would also score the end-of-text token that the tokenizer adds before a text
    theirs.add_bos_token = False
    rolling = results(theirs, "texts")["results"]["texts"]["bits_per_byte,none"]
    assert scores["texts"].metrics["bits_per_byte"].value == pytest.approx(rolling, rel=1e-5)
    theirs.add_bos_token = True
    # Otherwise the folder's own number of new tokens would replace that of the task
    theirs.model.generation_config.max_new_tokens = None
    written = results(theirs, "answers")["samples"]["answers"]
    own = results(HarnessModel(model), "answers")["samples"]["answers"]
    assert [one["filtered_resps"] for one in own] == [one["filtered_resps"] for one in written]


def test_task_that_does_not_exist_is_refused_with_a_similar_one(tasks):
    pytest.importorskip("lm_eval")
    from zeroflow.inference import harness

    with pytest.raises(ValueError, match=r"no task hellaswog: did you mean hellaswag\?"):
        harness.open_tasks(["hellaswog"], str(tasks))


def test_tasks_without_the_harness_are_refused_with_the_command_that_installs_it(
    job, monkeypatch, console, capsys
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    command = ["evaluate", "--run=mine", f"--cache-dir={job.folder.cache.path}", "--tasks=piqa"]
    assert commands.main(command) == 1
    assert "pip install 'zeroflow[eval]'" in capsys.readouterr().err


GUESSED = {"choices": 50.0, "schema": 50.0, "words": 0.0}
"""Accuracy of guesses on the tasks of `bundle`, in percent."""


@pytest.fixture
def bundle(tmp_path) -> Path:
    """A folder like `eval_bundle`, with one task of each kind."""
    chance = random.Random(1)

    def words(count: int) -> str:
        return " ".join(
            chance.choice(["stone", "bridge", "é🙂", "don't", "12"]) for _ in range(count)
        )

    makes = {
        "choices": lambda: {"query": words(2), "choices": [words(1), words(3)]},
        "schema": lambda: {"context_options": [words(2), words(3)], "continuation": words(2)},
        "words": lambda: {"context": f"{words(3)}  ", "continuation": chance.choice("abe.")},
    }
    kinds = {"choices": "multiple_choice", "schema": "schema", "words": "language_modeling"}
    (tmp_path / "eval_data").mkdir()
    asked = []
    for name, make in makes.items():
        lines = [json.dumps(make() | {"gold": chance.randrange(2)}) for _ in range(12)]
        (tmp_path / "eval_data" / f"{name}.jsonl").write_text("\n".join(lines))
        task = {"label": name, "icl_task_type": kinds[name], "dataset_uri": f"{name}.jsonl"}
        asked.append(task | {"num_fewshot": [1]})
    asked[0]["continuation_delimiter"] = "\nAnswer: "
    (tmp_path / "core.yaml").write_text(json.dumps({"icl_tasks": asked}))  # JSON is YAML
    guesses = "".join(f"{name},{guess}\n" for name, guess in GUESSED.items())
    (tmp_path / "eval_meta_data.csv").write_text("Eval Task,Random baseline\n" + guesses)
    return tmp_path


def items(bundle: Path, name: str) -> list[tuple[dict, dict]]:
    """Return the questions of a task in their order, each with its solved example."""
    lines = (bundle / "eval_data" / f"{name}.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    random.Random(1337).shuffle(found)
    others = [[one for one in found if one is not item] for item in found]
    pairs = enumerate(zip(found, others, strict=True))
    return [(item, random.Random(1234 + n).sample(rest, 1)[0]) for n, (item, rest) in pairs]


class Oracle:
    """Choices and texts of the model, from one forward pass for each text, as in nanochat."""

    def __init__(self, job: TrainingJob) -> None:
        self.trained = trained.load(job.folder.cache.path, "mine")
        self.encoder = self.trained.tokenizer.load()

    def ids(self, text: str) -> list[int]:
        return [
            self.trained.tokenizer.end_of_text,
            *self.encoder.encode(text, add_special_tokens=False).ids,
        ]

    def logits(self, ids: list[int]) -> torch.Tensor:
        """Return the logits of each id after the first."""
        with torch.no_grad():
            return self.trained.model(torch.tensor([ids[-self.trained.context - 1 : -1]]))[0]

    def mean_nats(self, ids: list[int], scored: int) -> float:
        logits = self.logits(ids)[-scored:]
        return float(cross_entropy(logits, torch.tensor(ids[-len(logits) :])))

    def chooses(self, texts: list[str], *, same_end: bool) -> int:
        """Return the place of the text whose answer, or whose common end, has the lowest loss."""
        rows = [self.ids(text) for text in texts]
        if same_end:
            shared = common([row[::-1] for row in rows])
            losses = [self.mean_nats(row, shared) for row in rows]
        else:
            shared = common(rows)
            losses = [self.mean_nats(row, max(1, len(row) - shared)) for row in rows]
        return losses.index(min(losses))

    def writes(self, context: str, text: str) -> bool:
        """Return True if `text` continues `context` with the most likely tokens."""
        ids = self.ids(text)
        wanted = ids[common([self.ids(context), ids]) :]
        return self.logits(ids).argmax(-1)[-len(wanted) :].tolist() == wanted


def common(rows: list[list[int]]) -> int:
    """Return the number of ids with which all rows begin."""
    return next(
        n
        for n in range(min(map(len, rows)), -1, -1)
        if len({*map(tuple, (r[:n] for r in rows))}) == 1
    )


def right_answers(job: TrainingJob, bundle: Path) -> dict[str, list[bool]]:
    oracle, right = Oracle(job), {name: [] for name in GUESSED}
    for item, solved in items(bundle, "choices"):
        before = f"{solved['query']}\nAnswer: {solved['choices'][solved['gold']]}\n\n"
        texts = [f"{before}{item['query']}\nAnswer: {choice}" for choice in item["choices"]]
        right["choices"].append(oracle.chooses(texts, same_end=False) == item["gold"])
    for item, solved in items(bundle, "schema"):
        before = f"{solved['context_options'][solved['gold']]} {solved['continuation']}\n\n"
        texts = [f"{before}{one} {item['continuation']}" for one in item["context_options"]]
        right["schema"].append(oracle.chooses(texts, same_end=True) == item["gold"])
    for item, solved in items(bundle, "words"):
        before = f"{solved['context'].strip()} {solved['continuation']}\n\n"
        asked_text = before + item["context"].strip()
        right["words"].append(oracle.writes(asked_text, f"{asked_text} {item['continuation']}"))
    return right


def test_core_is_the_accuracy_of_the_most_likely_answers_relative_to_guesses(job, bundle):
    right = right_answers(job, bundle)
    assert 0 < sum(right["choices"]) < 12 and 0 < sum(right["schema"]) < 12
    found = evaluate(asked(job, core_path=bundle))
    core, *scores = found.tasks
    assert {score.task: score.metrics["acc"].value for score in scores} == {
        f"CORE {name}": sum(answers) / 12 for name, answers in right.items()
    }
    gains = [
        (sum(right[name]) / 12 - guess / 100) / (1 - guess / 100) for name, guess in GUESSED.items()
    ]
    assert core.metrics["centered_acc"].value == pytest.approx(sum(gains) / 3)
    assert core.examples == 36 and found.harness is None and not found.texts
    assert [figure.of for figure in found.main_figures()] == ["CORE"], "columns of a comparison"
    error = np.std(right["choices"], ddof=1) / 12**0.5
    assert scores[0].metrics["acc"].error == pytest.approx(error)


def test_core_is_scored_as_the_last_stage_and_then_known(job, bundle):
    work = asked(job, core_path=bundle)
    evaluate(work)
    assert is_known(work, STEP)
    assert not is_known(asked(job, core_path=bundle, tasks=("none",)), STEP)
    require_tasks(work.config)
    (bundle / "eval_data" / "words.jsonl").unlink()
    with pytest.raises(ValueError, match=r"the data of CORE in .*: words has no .*words\.jsonl"):
        require_tasks(work.config)


def test_core_of_a_few_questions_takes_solved_examples_from_them(job, bundle):
    job.folder.evaluation.unlink(missing_ok=True)
    work = asked(job, core_path=bundle, task_examples=1)
    found = evaluate(work)
    assert [score.examples for score in found.tasks] == [6, 2, 2, 2]
    assert is_known(work, STEP) and not is_known(asked(job, core_path=bundle), STEP)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "core.yaml").unlink(), "core.yaml cannot be read .*eval_bundle"),
        (lambda folder: (folder / "core.yaml").write_text("a: 1"), "do not describe .*icl_tasks"),
        (
            lambda folder: (folder / "eval_data" / "words.jsonl").unlink(),
            "words has no .*words.jsonl",
        ),
    ],
)
def test_folder_without_core_is_refused_by_what_is_missing(change, message, bundle):
    change(bundle)
    with pytest.raises(ValueError, match=f"the data of CORE in .*{message}"):
        core_tasks.open_tasks(bundle)
