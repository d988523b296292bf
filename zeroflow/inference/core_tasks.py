"""Scores on CORE, the mean over 22 tasks of the DCLM paper: https://arxiv.org/abs/2406.11794

The prompts, the solved examples before them and the rules are those of nanochat, so that scores can
be compared with those of its models: https://github.com/karpathy/nanochat, nanochat/core_eval.py
"""

import csv
import hashlib
import json
import logging
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import yaml
from tokenizers import Tokenizer as Encoder

from zeroflow.inference import scoring
from zeroflow.inference.evaluation import CORE, TaskMetric, TaskScore
from zeroflow.inference.scoring import Request, Score
from zeroflow.inference.trained import Trained

log = logging.getLogger(__name__)

Item: TypeAlias = dict[str, Any]
"""A line of a task's data, whose fields depend on the kind of the task."""

_KINDS = ("multiple_choice", "schema", "language_modeling")
_ORDER_SEED = 1337
_EXAMPLES_SEED = 1234  # plus the number of the question
_CHUNK = 256
"""Number of questions whose token ids are in memory at once."""


class CoreTask(NamedTuple):
    """A task of CORE."""

    name: str
    kind: str
    file: Path
    few_shot: int
    delimiter: str
    """Text between a question and its answer."""

    guessed: float
    """Accuracy of guesses."""


class _Question(NamedTuple):
    requests: list[Request]
    """One for each possible answer; in a language modelling task, only one, for the answer."""

    gold: int | None
    """Index of the right answer; None if the model must produce it."""


def open_tasks(folder: Path) -> list[CoreTask]:
    """Return the tasks of an unpacked `eval_bundle`.

    Raises:
        ValueError: a file is missing or has another format.
    """
    try:
        asked = yaml.safe_load((folder / "core.yaml").read_text(encoding="utf-8"))["icl_tasks"]
        with (folder / "eval_meta_data.csv").open(encoding="utf-8") as lines:
            guesses = {row["Eval Task"]: row["Random baseline"] for row in csv.DictReader(lines)}
        tasks = [
            CoreTask(
                name=one["label"],
                kind=one["icl_task_type"],
                file=folder / "eval_data" / one["dataset_uri"],
                few_shot=one["num_fewshot"][0],
                delimiter=one.get("continuation_delimiter", " "),
                guessed=float(guesses[one["label"]]) / 100,
            )
            for one in asked
        ]
    except OSError as error:
        raise ValueError(
            f"the data of CORE in {folder}: {Path(error.filename).name} cannot be read "
            f"({error.strerror}): give the path of the unpacked eval_bundle"
        ) from error
    except (KeyError, TypeError, IndexError, ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"the data of CORE in {folder}: core.yaml and eval_meta_data.csv do not describe its "
            f"tasks ({type(error).__name__}: {error})"
        ) from error
    for task in tasks:
        if task.kind not in _KINDS:
            raise ValueError(
                f"the data of CORE in {folder}: {task.name} has the unknown kind {task.kind}"
            )
        if not task.file.is_file():
            raise ValueError(f"the data of CORE in {folder}: {task.name} has no {task.file}")
    return tasks


def score_tasks(
    trained: Trained, tasks: Sequence[CoreTask], *, examples: int | None
) -> list[TaskScore]:
    """Return the CORE score of a checkpoint, and its accuracy on each task.

    CORE is the mean of the centred accuracies of the tasks. If guesses have accuracy g, an accuracy
    of a is centred to (a - g) / (1 - g): 0 for guesses, and 1 if all answers are right.

    Args:
        examples: maximum number of questions of each task; None for all.

    Raises:
        ValueError: the data of a task cannot be read.
    """
    scores, gains, squares, versions = [], [], [], []
    for task in tasks:
        log.info("scoring %s: %s", CORE, task.name)
        content = task.file.read_bytes()
        versions.append(hashlib.sha256(content).hexdigest()[:8])
        right = list(_answers(trained, task, _items(task, content, examples)))
        accuracy, count = sum(right) / len(right), len(right)
        error = math.sqrt(accuracy * (1 - accuracy) / (count - 1)) if count > 1 else None
        gains.append((accuracy - task.guessed) / (1 - task.guessed))
        squares.append(((error or 0) / (1 - task.guessed)) ** 2)
        scores.append(
            TaskScore(
                task=f"{CORE} {task.name}",
                version=versions[-1],
                examples=count,
                few_shot=task.few_shot,
                metrics={"acc": TaskMetric(value=accuracy, error=error)},
            )
        )
    core = TaskMetric(value=sum(gains) / len(gains), error=math.sqrt(sum(squares)) / len(gains))
    version = hashlib.sha256("".join(versions).encode()).hexdigest()[:8]
    asked = sum(score.examples for score in scores)
    whole = TaskScore(
        task=CORE, version=version, examples=asked, few_shot=0, metrics={"centered_acc": core}
    )
    return [score.replace(most=examples) for score in (whole, *scores)]


def _items(task: CoreTask, content: bytes, most: int | None) -> list[Item]:
    """Return the questions of a task, in the order in which nanochat takes them."""
    try:
        items = [json.loads(line) for line in content.split(b"\n") if line.strip()]
    except ValueError as error:
        raise ValueError(f"{task.file}: {error}") from error
    if len(items) <= task.few_shot:
        raise ValueError(
            f"{task.file} has too few lines ({len(items)}): a question needs "
            f"{task.few_shot} others as solved examples"
        )
    random.Random(_ORDER_SEED).shuffle(items)
    # Solved examples are taken from the same questions
    return items[: None if most is None else max(most, task.few_shot + 1)]


def _answers(trained: Trained, task: CoreTask, items: Sequence[Item]) -> Iterator[bool]:
    """Yield True for each question that the model answers correctly."""
    encoder = trained.tokenizer.load()
    for begin in range(0, len(items), _CHUNK):
        questions = [
            _question(trained, encoder, task, items, number)
            for number in range(begin, min(begin + _CHUNK, len(items)))
        ]
        requests = [request for question in questions for request in question.requests]
        scored = iter(scoring.score(trained.model, requests))
        for question in questions:
            yield _is_right(question, [next(scored) for _ in question.requests])


def _is_right(question: _Question, scores: Sequence[Score]) -> bool:
    if question.gold is None:
        return scores[0].greedy
    means = [
        score.nats / request.scored
        for score, request in zip(scores, question.requests, strict=True)
    ]
    return means.index(min(means)) == question.gold


def _question(
    trained: Trained, encoder: Encoder, task: CoreTask, items: Sequence[Item], number: int
) -> _Question:
    texts = _prompts(task, items[number], _solved(task, items, number))
    end = trained.tokenizer.end_of_text
    encoded = encoder.encode_batch(texts, add_special_tokens=False)
    rows = [[end, *one.ids] for one in encoded]
    shared = _shared(rows if task.kind != "schema" else [row[::-1] for row in rows])
    if task.kind == "language_modeling":  # without and with the answer
        rows = rows[1:]
    most = trained.context + 1
    requests = []
    for row in rows:
        # At least one token, even if another answer begins with this one
        wanted = shared if task.kind == "schema" else max(1, len(row) - shared)
        kept = row[-most:]
        requests.append(Request(kept, min(wanted, len(kept) - 1)))
    return _Question(requests, None if task.kind == "language_modeling" else items[number]["gold"])


def _solved(task: CoreTask, items: Sequence[Item], number: int) -> list[Item]:
    """Return the solved examples before a question: other questions of the task."""
    chosen = random.Random(_EXAMPLES_SEED + number).sample(range(len(items) - 1), task.few_shot)
    return [items[place + (place >= number)] for place in chosen]


def _prompts(task: CoreTask, item: Item, solved: Sequence[Item]) -> list[str]:
    """Return a text for each possible answer, or without and with the answer."""
    d = task.delimiter
    if task.kind == "multiple_choice":
        shown = [f"{one['query']}{d}{one['choices'][one['gold']]}" for one in solved]
        ends = [f"{item['query']}{d}{choice}" for choice in item["choices"]]
    elif task.kind == "schema":
        shown = [f"{one['context_options'][one['gold']]}{d}{one['continuation']}" for one in solved]
        ends = [f"{context}{d}{item['continuation']}" for context in item["context_options"]]
    else:
        shown = [f"{one['context'].strip()}{d}{one['continuation']}" for one in solved]
        asked = f"{item['context'].strip()}{d}"
        ends = [asked, f"{asked}{item['continuation']}"]
    before = "".join(f"{text}\n\n" for text in shown)
    texts = [before + end for end in ends]
    # A space belongs to the first token of the answer
    return [texts[0].strip(), texts[1]] if task.kind == "language_modeling" else texts


def _shared(rows: Sequence[Sequence[int]]) -> int:
    """Return the number of ids at the beginning that all rows share."""
    for place, ids in enumerate(zip(*rows, strict=False)):
        if len(set(ids)) > 1:
            return place
    return min(map(len, rows))
