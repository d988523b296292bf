"""Scores on tasks of lm-evaluation-harness: https://github.com/EleutherAI/lm-evaluation-harness"""

import importlib.util
import logging
import math
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from importlib import metadata
from typing import Any, TypeAlias

import numpy as np

from zeroflow.inference import scoring
from zeroflow.inference.evaluation import TaskMetric, TaskScore
from zeroflow.inference.trained import Trained

Results: TypeAlias = dict[str, Any]
"""Results of the harness for a task or an example."""

_RESAMPLES = 1000
"""Bootstrap resamples for standard errors that have no formula, such as that of a perplexity."""

_SEED = 1234
"""Seed of the choice of solved examples; the harness's own default."""

ANSWER_BPB = "answer_bpb"
"""Bits per byte of the right answers, which improves before the accuracy does."""


def version() -> str:
    return metadata.version("lm_eval")


def open_tasks(names: Sequence[str], folder: str | None) -> Any:
    """Return the harness's index of tasks, after a check that it has all `names`.

    Args:
        folder: folder with YAML files of more tasks.

    Raises:
        ValueError: the harness is not installed, or has no such task.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("tasks need lm-evaluation-harness: pip install 'zeroflow[eval]'")
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    if folder:  # an index of all tasks of the harness takes many seconds
        own = TaskManager(include_path=folder, include_defaults=False)
        if set(names) <= set(own.all_tasks):
            return own
    index = TaskManager(include_path=folder)
    for name in names:
        if name not in index.all_tasks:
            near = get_close_matches(name, index.all_tasks, n=1)
            meant = f": did you mean {near[0]}?" if near else ""
            raise ValueError(f"lm-evaluation-harness has no task {name}{meant}")
    return index


def score_tasks(
    trained: Trained, names: Sequence[str], index: Any, *, examples: int | None
) -> list[TaskScore]:
    """Score a checkpoint on tasks, with the number of solved examples that each task defines.

    Args:
        index: as `open_tasks` returns it.
        examples: maximum number of examples of each task; None for all.

    Raises:
        ValueError: the data of a task cannot be loaded.
    """
    import lm_eval

    from zeroflow.inference.harness_model import HarnessModel

    try:
        # Not `simple_evaluate`, which also seeds Python, and describes the whole machine
        loaded = index.load(list(names))
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=_SEED)
        found = lm_eval.evaluate(
            HarnessModel(trained), loaded, limit=examples, bootstrap_iters=_RESAMPLES
        )
    except OSError as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"the data of {', '.join(names)} cannot be loaded, which comes from the Hugging Face "
            f"Hub or from local files: {reason}"
        ) from error
    inner = {name for names in found["group_subtasks"].values() for name in names}
    scores = [_score(name, found) for name in found["results"] if name not in inner]
    return [score.replace(most=examples) for score in scores]


def _score(name: str, found: Results) -> TaskScore:
    """Return the figures of a task, or of a group of tasks."""
    tasks = _tasks_of(name, found)
    figures = found["results"][name]
    metrics: dict[str, TaskMetric] = {}
    for key, value in figures.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = figures.get(f"{metric}_stderr,{filtered}")
        label = metric if filtered == "none" else f"{metric} ({filtered})"
        known = error if isinstance(error, float) and math.isfinite(error) else None
        metrics[label] = TaskMetric(value=value, error=known)
    samples = [sample for task in tasks for sample in found["samples"].get(task, ())]
    if (bpb := _answer_bpb(samples)) is not None:
        metrics[ANSWER_BPB] = bpb
    return TaskScore(
        task=name,
        version=str(found["versions"].get(name)),
        examples=sum(found["n-samples"][task]["effective"] for task in tasks),
        few_shot=int(found["n-shot"].get(tasks[0]) or 0),
        metrics=metrics,
    )


def _tasks_of(name: str, found: Results) -> list[str]:
    """Return the tasks of a group, at any depth; a task is its own group."""
    inner = found["group_subtasks"].get(name)
    return [task for each in inner for task in _tasks_of(each, found)] if inner else [name]


def _answer_bpb(samples: Iterable[Results]) -> TaskMetric | None:
    """Return the bits per byte of the right answers; None for a task without given answers."""
    nats, sizes = [], []
    for sample in samples:
        answers, responses = sample["arguments"], sample["filtered_resps"]
        right = 0 if len(answers) == 1 else sample["target"]
        # Some metrics add requests without the question, whose answers would be counted twice
        scored = len(answers) == len(responses) and all(len(pair) == 2 for pair in answers)
        if not scored or not isinstance(right, int) or not isinstance(responses[0], tuple | list):
            return None
        nats.append(-float(responses[right][0]))
        sizes.append(len(answers[right][1].encode()))
    if not sum(sizes):
        return None
    bits = np.array(nats) / math.log(2)
    return TaskMetric(**scoring.ratio(bits, np.array(sizes, dtype=np.float64))._asdict())
