"""Registration of a run's models in MLflow, with their cards, losses and scores."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from zeroflow.inference import evaluation, trained
from zeroflow.inference.evaluation import Evaluation
from zeroflow.inference.export import export
from zeroflow.inference.text_scores import HELD_OUT
from zeroflow.report.model_card import model_card
from zeroflow.run_folder import RunFolder
from zeroflow.settings import existing
from zeroflow.tracking import models
from zeroflow.tracking.config import Dataset, TrackingConfig
from zeroflow.tracking.models import Candidate, ModelScore, Registered
from zeroflow.training import checkpoint
from zeroflow.training.checkpoint import Which
from zeroflow.training.job import TrainingJob
from zeroflow.training.metrics import METRICS, TABLE, ValidationRecord
from zeroflow.training.sampling import SamplingConfig


class Registrations(NamedTuple):
    """The registered models of a run."""

    versions: tuple[Registered, ...]

    @property
    def reused(self) -> bool:
        """True if all had been registered before."""
        return bool(self.versions) and all(version.reused for version in self.versions)


def register_run(folder: RunFolder, name: str) -> Registrations:
    """Register the last model of a run, and its best one if that is another.

    Raises:
        ValueError, RegistrationFailed: as `register` does.
    """
    found = (checkpoint.find(folder.checkpoints), checkpoint.best(folder.checkpoints))
    steps = dict.fromkeys(checkpoint.step_of(path) for path in found if path)
    return Registrations(tuple(register(folder, name, step) for step in steps))


def register(
    folder: RunFolder, name: str, which: Which = "newest", *, exported: Path | None = None
) -> Registered:
    """Register a checkpoint of a run as a version of the model `name` in MLflow.

    Args:
        exported: folder to which the model has been exported; None to export it if necessary.

    Raises:
        ValueError: there is no such run or checkpoint, or it has no tokenizer.
        RegistrationFailed: MLflow refused the model or could not be reached.
    """
    cache = folder.cache.path
    job = trained.job(cache, folder.name)
    if job.tokenizer.path is None:
        raise ValueError(
            f"run {folder.name} was trained on token ids, and a registered model writes text: drop "
            "--register"
        )
    step = checkpoint.step_of(checkpoint.find(folder.checkpoints, which))

    def write(target: Path) -> Path:
        if exported is not None:
            return exported
        found = trained.load(cache, folder.name, step)
        card = model_card(folder, step=step, format="hf")
        export(found.model, found.tokenizer, target, context=found.context, card=card)
        return target

    return models.register(tracking_of(job), folder, _candidate(folder, job, step), name, write)


def tracking_of(job: TrainingJob) -> TrackingConfig:
    """Return the MLflow settings of a run, whose cache may have moved."""
    tracking = job.tracking
    if tracking.folder is None:
        return tracking
    return tracking.replace(folder=job.folder.cache.mlflow.resolve())


def evaluation_scores(found: Evaluation, job: TrainingJob) -> Iterator[ModelScore]:
    """Yield the figures of an evaluation, and their standard errors, as MLflow shows them."""
    data = {text.title: _dataset(text.text, text.revision or "") for text in found.texts}
    data |= {task.title: _dataset(task.task, f"version {task.version}") for task in found.tasks}
    data[HELD_OUT] = _held_out_rows(job)
    for figure in found.figures():
        # MLflow sorts its charts: those of the training come first
        key = f"scores/{_KEY.sub('_', figure.of)}/{figure.name}"
        yield ModelScore(key, figure.value, found.time, data[figure.of])
        if figure.error is not None:
            yield ModelScore(f"{key}_stderr", figure.error, found.time, data[figure.of])


_KEY = re.compile(r"[^\w.-]+", re.ASCII)
"""Characters that names of metrics in MLflow may not contain; a slash makes a folder there."""


def _dataset(name: str, digest: str) -> Dataset:
    longest = 36  # the column of a digest in MLflow's database
    return Dataset(name=name[:500], digest=digest[:longest] or "none", source=name)


def _held_out_rows(job: TrainingJob) -> Dataset:
    """Return the dataset of the run: its held-out rows are in the same shards."""
    assert job.tracking.dataset is not None, "every run has rows"
    return job.tracking.dataset


def _candidate(folder: RunFolder, job: TrainingJob, step: int) -> Candidate:
    validations = {
        record.step: record
        for record in METRICS.read(folder.metrics)
        if isinstance(record, ValidationRecord)
    }
    found, evaluated = validations.get(step), evaluation.read(folder).of(step)
    scores = [] if found is None else list(_validation_scores(found, job))
    if evaluated is not None:
        scores += evaluation_scores(evaluated, job)
    bpb = found.val_bpb if found else None
    tokens = step * job.training.workload.batch_tokens
    sampling = SamplingConfig()
    return Candidate(
        step=step,
        params={"tokens": str(tokens), "parameters": str(job.model.parameters)},
        scores=tuple(score for score in scores if math.isfinite(score.value)),
        held_out=existing.load(folder.cache.path, folder.name).held_out,
        bpb=bpb if bpb is not None and math.isfinite(bpb) else None,
        sampling={
            "max_new_tokens": sampling.tokens,
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
        },
    )


def _validation_scores(found: ValidationRecord, job: TrainingJob) -> Iterator[ModelScore]:
    for name in ("val_loss", "val_bpb", "val_error"):
        value = getattr(found, name)
        if value is not None:
            yield ModelScore(TABLE[name].key, value, found.time, _held_out_rows(job))
