"""Evaluation of a run's checkpoint on texts and tasks."""

import logging
import os
import subprocess
import sys
from pathlib import Path

from zeroflow.device import find_device
from zeroflow.inference import core_tasks, evaluation, harness, text_scores, trained
from zeroflow.inference.evaluation import Evaluation, EvaluationConfig
from zeroflow.inference.text_scores import HELD_OUT
from zeroflow.records import Record
from zeroflow.run_folder import Cache
from zeroflow.settings.flags import error_message
from zeroflow.text.markup import LineFormatter
from zeroflow.training.checkpoint import Which

log = logging.getLogger(__name__)


class EvaluationFailed(RuntimeError):
    """A process that evaluates ended with an error."""


class EvaluationJob(Record):
    """A checkpoint, and what to evaluate it on."""

    cache: Path
    run: str
    which: Which = "newest"
    config: EvaluationConfig = EvaluationConfig()


def evaluate(job: EvaluationJob) -> Evaluation:
    """Score a checkpoint on texts and tasks, and record each score in the folder of its run.

    Without texts and tasks, the held-out rows of the run are scored.

    Returns:
        the scores of this call

    Raises:
        ValueError, hub.HubError: there is no such checkpoint, text or task, or it cannot be read.
    """
    config = job.config
    found = trained.load(job.cache, job.run, job.which)
    asked = config.data_path or config.dataset or config.tasks or config.core_path
    if asked and found.tokenizer.path is None:
        raise ValueError(
            f"run {job.run} was trained on token ids, so it has no loss on texts and tasks: name "
            "none, to score its held-out rows"
        )
    # Before any score, because a text or a task may not exist
    names = config.task_names
    index = harness.open_tasks(names, config.task_path) if names else None
    core = core_tasks.open_tasks(config.core_path) if config.core_path else None
    texts = text_scores.corpora(config)
    model = found.model.to(find_device(config.device).kind)
    folder, new = Cache(job.cache).run(job.run), evaluation.begun(found.step)
    for name, corpus in texts.items():
        log.info("scoring %s", name)
        score = text_scores.score_text(found, name, corpus, most=config.text_tokens)
        new = new.replace(texts=[*new.texts, score])
        evaluation.add(folder, new)  # at once: the next text may be unreadable
    if not asked:
        score = text_scores.score_held_out(model, trained.job(job.cache, job.run))
        new = new.replace(texts=[score])
    if names:
        log.info("scoring tasks: %s", ", ".join(names))
        tasks = harness.score_tasks(found, names, index, examples=config.task_examples)
        new = new.replace(tasks=tasks, harness=harness.version())
    if core:
        evaluation.add(folder, new)
        scores = core_tasks.score_tasks(found, core, examples=config.task_examples)
        new = new.replace(tasks=[*new.tasks, *scores])
    evaluation.add(folder, new)
    return new


def require_tasks(config: EvaluationConfig) -> None:
    """Check that the tasks of `config` exist.

    Raises:
        ValueError: a task does not exist, or the harness or the data of CORE is missing.
    """
    if config.tasks:
        harness.open_tasks(config.task_names, config.task_path)
    if config.core_path:
        core_tasks.open_tasks(config.core_path)


def evaluate_apart(job: EvaluationJob) -> None:
    """Evaluate in a separate process, whose end frees the memory of a GPU.

    Raises:
        EvaluationFailed: the process ended with an error.
    """
    # The child must import the same modules as this process
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=job.model_dump_json(),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        last = done.stdout.strip().rpartition("\n")[2] or f"exit code {done.returncode}"
        raise EvaluationFailed(f"the model could not be evaluated: {last}")


def is_known(job: EvaluationJob, step: int) -> bool:
    """Return True if the checkpoint of `step` has been scored on the texts and tasks of `job`.

    A score on fewer tokens or examples does not count.

    Raises:
        ValueError, hub.HubError: there is no such text.
    """
    known = evaluation.read(Cache(job.cache).run(job.run)).of(step)
    if known is None:
        return False
    tasks = {score.task for score in known.tasks if score.most == job.config.task_examples}
    corpora = text_scores.corpora(job.config)
    wanted = [*job.config.task_names, *([evaluation.CORE] if job.config.core_path else [])]
    if not corpora and not wanted:
        return any(score.text == HELD_OUT for score in known.texts)
    texts = {
        (score.text, score.revision)
        for score in known.texts
        if score.covers(job.config.text_tokens)
    }
    same = texts.issuperset((name, corpus.data_revision) for name, corpus in corpora.items())
    return same and tasks.issuperset(wanted)


def _main() -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(LineFormatter("%(message)s"))
    logging.getLogger("zeroflow").addHandler(handler)
    try:
        evaluate(EvaluationJob.model_validate_json(sys.stdin.read()))
    except Exception as error:
        log.error("%s", error_message(error).splitlines()[0])
        raise SystemExit(1) from error


if __name__ == "__main__":
    _main()
