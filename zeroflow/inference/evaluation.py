"""evaluation.json: scores of a run's checkpoints on texts and tasks."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, Self

from pydantic import Field, NonNegativeInt, PositiveInt, computed_field

from zeroflow.config import Config, WholePositive, flag
from zeroflow.data.formats import registry
from zeroflow.records import Record, omitted
from zeroflow.run_folder import RunFolder

DEFAULT_TASKS = ("lambada_openai", "blimp", "piqa", "hellaswag", "arc_easy", "sciq")
"""Tasks on which models below a billion parameters differ."""

CORE = "CORE"
"""Name of the score on CORE. Those of its tasks begin with it and a space."""

_DEFAULT = "default"


class EvaluationConfig(Config):
    """Texts and tasks to evaluate on. Without any, the held-out rows of the run."""

    data_path: tuple[str, ...] = Field(
        (),
        description=f"Files or globs of text: {registry.described()}. Each has its own score; "
        "quote a glob for one score of all its files.",
    )

    dataset: str | None = None
    """Name of a dataset on the Hugging Face Hub, whose train split is read."""

    dataset_config: str | None = None
    """Subset of that dataset. Default: the dataset's default."""

    text_column: str = "text"
    """Field of .jsonl lines or column of .parquet files that contains the text."""

    text_tokens: WholePositive = 100_000
    """Maximum number of tokens to score of each text."""

    tasks: tuple[str, ...] = Field(
        (),
        description="Tasks of lm-evaluation-harness. default: " + ", ".join(DEFAULT_TASKS) + ".",
    )

    task_path: str | None = None
    """Folder with YAML files of your own tasks."""

    core_path: Path | None = None
    """Folder `eval_bundle` with the data of the 22 tasks of CORE."""

    task_examples: WholePositive | None = None
    """Maximum number of examples of each task. Default: all."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to evaluate on; auto uses a GPU if there is one."""

    def refuse_what_does_nothing(self) -> None:
        """
        Raises:
            ValueError: a setting of texts or tasks is given without a text or a task.
        """
        needed = {
            "dataset_config": (self.dataset, "--dataset"),
            "text_column": (self.data_path or self.dataset, "--data-path or --dataset"),
            "text_tokens": (self.data_path or self.dataset, "--data-path or --dataset"),
            "task_path": (self.tasks, "--tasks"),
            "task_examples": (self.tasks or self.core_path, "--tasks or --core-path"),
        }
        for name, (given, others) in needed.items():
            default = type(self).model_fields[name].default
            if not given and getattr(self, name) != default:
                raise ValueError(f"{flag(name)} has no effect without {others}: add it, or drop it")

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks, each once."""
        named = (DEFAULT_TASKS if task == _DEFAULT else (task,) for task in self.tasks)
        return list(dict.fromkeys(name for names in named for name in names))


class TextScore(Record):
    """Loss on a text."""

    text: str
    """Name of the text: absolute path of a file or glob, or name of a dataset."""

    revision: str | None
    """Digest of the files, or commit of the dataset."""

    documents: NonNegativeInt
    tokens: PositiveInt
    """Number of scored tokens, with the end of each document."""

    text_bytes: NonNegativeInt
    """UTF-8 bytes of these tokens, without unknown ones."""

    unknown: NonNegativeInt
    """Number of these tokens that are unknown."""

    loss: float
    """Mean over the tokens, in nats."""

    loss_error: float | None
    """Standard error of `loss`; None for a single sampled unit."""

    bpb: float | None
    """The loss in bits per byte; None if there are no bytes."""

    bpb_error: float | None

    most: PositiveInt | None = omitted()
    """Maximum number of tokens that was asked for; None for held-out rows, and in files of older
    versions."""

    @property
    def title(self) -> str:
        """Name of what was scored: that of the text, and of a part also its length."""
        whole = self.most is None or self.tokens < self.most
        return self.text if whole else f"{self.text}, first {self.tokens:,} tokens"

    def covers(self, most: int) -> bool:
        """Return True if a score of at most `most` tokens would be the same."""
        return self.most in (None, most) or self.tokens < min(most, self.most or 0)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


class TaskMetric(Record):
    """A figure of a task."""

    value: float
    error: float | None
    """Standard error; None if the harness gives none."""


class TaskScore(Record):
    """Figures of a task."""

    task: str
    version: str
    """Version of the task's definition."""

    examples: NonNegativeInt
    few_shot: NonNegativeInt
    """Number of solved examples before each question."""

    metrics: dict[str, TaskMetric]

    most: PositiveInt | None = omitted()
    """Maximum number of examples of each task; None for all, and in files of older versions."""

    @property
    def title(self) -> str:
        """Name of what was scored: that of the task, and of a part also its number of examples."""
        whole = self.most is None or self.examples < self.most
        return self.task if whole else f"{self.task}, {self.examples:,} examples"

    @property
    def main(self) -> str:
        """Name of the metric to compare: accuracy normalised by length, if there is one."""
        return next((name for name in _MAIN if name in self.metrics), next(iter(self.metrics)))


_MAIN = ("acc_norm", "acc", "exact_match")


class Figure(NamedTuple):
    """A figure of a text or a task."""

    of: str
    """Title of the score on a text or a task."""

    name: str
    value: float
    error: float | None
    """Standard error; None if it is unknown."""

    @property
    def text(self) -> str:
        return with_error(self.value, self.error)


class Evaluation(Record):
    """Scores of one checkpoint."""

    step: NonNegativeInt
    time: float
    """Seconds since the epoch."""

    harness: str | None = None
    """Version of lm-evaluation-harness; None if none of its tasks was scored."""

    texts: list[TextScore] = []  # noqa: RUF012, pydantic copies it
    tasks: list[TaskScore] = []  # noqa: RUF012

    def figures(self) -> Iterator[Figure]:
        """Yield every figure."""
        for text in self.texts:
            yield Figure(text.title, "loss", text.loss, text.loss_error)
            if text.bpb is not None:
                yield Figure(text.title, "bpb", text.bpb, text.bpb_error)
        for task in self.tasks:
            for name, metric in task.metrics.items():
                yield Figure(task.title, name, metric.value, metric.error)

    def main_figures(self) -> Iterator[Figure]:
        """Yield the figure of each text and task by which models are compared."""
        mains = {text.title: "loss" if text.bpb is None else "bpb" for text in self.texts}
        compared = (task for task in self.tasks if not task.task.startswith(f"{CORE} "))
        mains |= {task.title: task.main for task in compared}
        yield from (figure for figure in self.figures() if mains.get(figure.of) == figure.name)

    def updated(self, newer: "Evaluation") -> Self:
        """Return this evaluation with the scores of a `newer` one of the same checkpoint."""
        texts = {score.title: score for score in (*self.texts, *newer.texts)}
        tasks = {score.title: score for score in (*self.tasks, *newer.tasks)}
        return self.replace(
            time=newer.time,
            harness=newer.harness or self.harness,
            texts=list(texts.values()),
            tasks=list(tasks.values()),
        )


class Evaluations(Record):
    """Evaluations of a run, one for each evaluated step."""

    steps: list[Evaluation] = []  # noqa: RUF012

    def of(self, step: int) -> Evaluation | None:
        """Return the evaluation of the checkpoint of `step`."""
        return next((one for one in self.steps if one.step == step), None)

    @property
    def newest(self) -> Evaluation | None:
        """The evaluation of the last step; None if there is none."""
        return self.steps[-1] if self.steps else None


def read(folder: RunFolder) -> Evaluations:
    """Read the evaluations of a run.

    Raises:
        ValueError: the file cannot be read.
    """
    return Evaluations.read_if_exists(folder.evaluation) or Evaluations()


def add(folder: RunFolder, newer: Evaluation) -> Evaluation:
    """Add an evaluation to those of a run; new scores on the same text or task replace older ones.

    Returns:
        All scores of its checkpoint.
    """
    known = read(folder)
    before = known.of(newer.step)
    now = before.updated(newer) if before else newer
    others = [one for one in known.steps if one.step != newer.step]
    Evaluations(steps=sorted([*others, now], key=lambda one: one.step)).write(folder.evaluation)
    return now


def with_error(value: float, error: float | None) -> str:
    """Return a figure as text, with its standard error if that is known."""
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def begun(step: int) -> Evaluation:
    """Return an evaluation of the checkpoint of `step` without scores."""
    return Evaluation(step=step, time=time.time())
