"""Models in MLflow: the weights of a checkpoint, and versions of a registered model.

MLflow stores the weights once, as a logged model that is linked to its run, and shows the figures
of the model by the data that they were measured on. A version of a registered model refers to it.
"""

import json
import logging
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from zeroflow import artifacts
from zeroflow.run_folder import RunFolder
from zeroflow.text.redaction import redacted
from zeroflow.tracking.config import DESCRIPTION, Dataset, TrackingConfig, address
from zeroflow.tracking.delivery import reason
from zeroflow.tracking.store import RunIds, open_run, run_ids

log = logging.getLogger(__name__)

BEST = "best"
"""Alias of the version with the lowest bits per byte."""

_STEP, _HELD_OUT, _BPB, _MODEL = "step", "held_out", "val_bpb", "model_id"
"""Tags of a version: step and logged model, text for validation, and bits per byte on it."""

_VERSIONS = "mlflow.modelVersions"
"""Tag of a logged model that MLflow's pages read."""

_PROGRAM = Path(__file__).with_name("text_model.py")


class RegistrationFailed(RuntimeError):
    """MLflow could not be used; the model itself is complete."""


class ModelScore(NamedTuple):
    """A figure of a model."""

    key: str
    value: float
    time: float
    """Seconds since the epoch."""

    dataset: Dataset
    """Data that it was measured on."""


class Candidate(NamedTuple):
    """A checkpoint to register."""

    step: int
    params: Mapping[str, str]
    scores: tuple[ModelScore, ...]
    held_out: str
    """Digest of the text for validation; only runs with the same one are compared."""

    bpb: float | None
    """Bits per byte on that text; None if the step has no validation."""

    sampling: Mapping[str, int | float | bool]
    """Settings of text generation that a caller may change, with their defaults."""


class Registered(NamedTuple):
    """A version of a registered model."""

    name: str
    version: str
    is_best: bool
    """True if the alias `BEST` names it."""

    reused: bool
    """True if it had been registered before."""

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"

    def __str__(self) -> str:
        alias = f", which is also {self.name}@{BEST}" if self.is_best else ""
        return f"registered as {self.uri}{alias}"


def register(
    config: TrackingConfig,
    folder: RunFolder,
    model: Candidate,
    name: str,
    export: Callable[[Path], Path],
) -> Registered:
    """Register a checkpoint as a version of the model `name`, unless it is one already.

    If it has fewer bits per byte than the other versions on the same text, the alias `BEST` moves
    to it.

    Args:
        export: returns the folder of the model in the format of Hugging Face, which it may write
            to the path that it gets; called if MLflow does not have the model yet.

    Raises:
        RegistrationFailed: MLflow refused the model or could not be reached.
    """
    with _explained(config):
        client, run_id = open_run(config, folder)
    waiting_for = "another process is registering a model of this run"
    with artifacts.exclusive(folder.registering, waiting_for=waiting_for):
        with _explained(config):
            logged = _logged(client, run_id, model.step)
        if logged is None:
            with _new_folder(folder.registering) as place:
                exported = export(place / "model")
                with _explained(config):
                    _delete_incomplete(client, run_id, model.step)
                    logged = _log(client, run_id, model, exported, place / "saved")
    with _explained(config):
        version, reused = _version(client, name, model, logged, config.tags.get(DESCRIPTION, ""))
        is_best = _choose_best(client, name, version) == str(version.version)
    return Registered(name, str(version.version), is_best, reused)


def stored_bytes(folder: RunFolder) -> int:
    """Return the bytes of weights of the run that a store in its cache has; MLflow is not asked."""
    if not (ids := RunIds.read_if_exists(folder.mlflow)):
        return 0
    models = (folder.cache.mlflow / "artifacts" / "models").glob("*/artifacts/MLmodel")
    own = [file.parent for file in models if f"run_id: {ids.run_id}\n" in file.read_text()]
    return sum(file.stat().st_size for path in own for file in path.rglob("*.safetensors"))


def add_scores(
    config: TrackingConfig, folder: RunFolder, step: int, scores: Iterable[ModelScore]
) -> None:
    """Add figures to the logged model of a checkpoint, if MLflow has one."""
    if run_ids(folder) is None:
        return
    try:
        client, run_id = open_run(config, folder)
        if (logged := _logged(client, run_id, step)) is not None:
            _send(client, run_id, logged.model_id, step, scores)
    except Exception as error:  # the figures are on disk
        log.warning("the scores could not be added to the model in MLflow: %s", reason(error))


@contextmanager
def _explained(config: TrackingConfig) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # any failure of MLflow, its store or its server
        raise RegistrationFailed(
            f"MLflow at {_place(config)} did not register the model ({reason(error)}): the same "
            "command tries again"
        ) from error


def _place(config: TrackingConfig) -> str:
    """Return the address of the store, also for a run of a cache that was moved since."""
    return redacted(address(config.folder)) if config.folder else config.uri


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder, which exists until the end of the block.

    It is beside the checkpoints, because a folder for temporary files may be too small for a model.
    """
    shutil.rmtree(path, ignore_errors=True)  # left by a process that was killed
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _logged(client: Any, run_id: str, step: int) -> Any | None:
    """Return the complete logged model of a step of a run."""
    return next((one for one in _attempts(client, run_id, step) if one.status == "READY"), None)


def _delete_incomplete(client: Any, run_id: str, step: int) -> None:
    """Delete what killed processes left; no other process delivers this model now."""
    for left in _attempts(client, run_id, step):
        if left.status != "READY":
            client.delete_logged_model(left.model_id)


def _attempts(client: Any, run_id: str, step: int) -> list[Any]:
    run = client.get_run(run_id)
    found = client.search_logged_models(
        [run.info.experiment_id], filter_string=f"source_run_id = '{run_id}'"
    )
    return [one for one in found if one.params.get(_STEP) == str(step)]


def _log(client: Any, run_id: str, model: Candidate, exported: Path, saved: Path) -> Any:
    """Send the model in the folder `exported`, with its figures.

    It becomes READY at the very end, so that an interrupted delivery is repeated.

    Args:
        saved: new folder for the files in MLflow's format.
    """
    from mlflow.entities import LoggedModelOutput

    run = client.get_run(run_id)
    logged = client.create_logged_model(
        run.info.experiment_id,
        name=f"{re.sub(_NOT_IN_NAMES, '-', run.info.run_name)}-step-{model.step}",
        source_run_id=run_id,
        params={_STEP: str(model.step), **model.params},
    )
    try:
        _save(exported, saved, model, logged.model_id, run_id)
        if exported.parent == saved.parent:  # written for this, and a model may be large
            shutil.rmtree(exported)
        client.log_model_artifacts(logged.model_id, str(saved))
        _send(client, run_id, logged.model_id, model.step, model.scores)
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, model.step)])
        return client.finalize_logged_model(logged.model_id, "READY")
    except Exception:
        with suppress(Exception):  # the server is probably lost; the next attempt deletes it
            client.delete_logged_model(logged.model_id)
        raise


_NOT_IN_NAMES = r"[/:.%\"']"
"""Characters that names of logged models may not contain."""


def _save(exported: Path, saved: Path, model: Candidate, model_id: str, run_id: str) -> None:
    """Write the files of a model in MLflow's format."""
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    types = {bool: "boolean", int: "long", float: "double"}
    params = [ParamSpec(name, types[type(value)], value) for name, value in model.sampling.items()]
    texts = Schema([ColSpec("string")])
    # Recorded instead of shown: MLflow asks for examples, with which it would load the model again
    with warnings.catch_warnings(record=True):
        mlflow.pyfunc.save_model(
            saved,
            python_model=str(_PROGRAM),
            artifacts={"model": exported.absolute().as_uri()},  # a path may contain ? and #
            signature=ModelSignature(texts, texts, ParamSchema(params)),
            # Named, because MLflow would load the model to find out
            pip_requirements=[_requirement(name) for name in ("mlflow", "torch", "transformers")],
            mlflow_model=Model(model_id=model_id, run_id=run_id),
        )


def _requirement(package: str) -> str:
    version = metadata.version(package).partition("+")[0]  # without the kind of device
    return f"{package}=={version}"


def _send(client: Any, run_id: str, model_id: str, step: int, scores: Iterable[ModelScore]) -> None:
    from mlflow.entities import Metric

    metrics = [
        Metric(
            *(score.key, score.value, int(score.time * 1000), step),
            model_id=model_id,
            dataset_name=score.dataset.name,
            dataset_digest=score.dataset.digest,
        )
        for score in scores
    ]
    client.log_batch(run_id, metrics=metrics)


def _version(
    client: Any, name: str, model: Candidate, logged: Any, description: str
) -> tuple[Any, bool]:
    """Return the version of `name` that is the logged model, and True if it existed."""
    from mlflow.exceptions import MlflowException

    for version in client.search_model_versions(f"name = '{name}'"):
        if version.tags.get(_MODEL) == logged.model_id:
            return version, True
    with suppress(MlflowException):  # it exists; every other error comes again below
        client.create_registered_model(name)
    tags = {_MODEL: logged.model_id, _STEP: model.step, _HELD_OUT: model.held_out}
    if model.bpb is not None:
        tags[_BPB] = repr(model.bpb)
    version = client.create_model_version(
        name,
        # Not models:/..., which MLflow looks up in the store of its own settings
        source=logged.artifact_location,
        run_id=logged.source_run_id,
        model_id=logged.model_id,
        tags=tags,
        description=f"{description}; checkpoint of step {model.step}".lstrip("; "),
    )
    others = json.loads(logged.tags.get(_VERSIONS, "[]"))
    shown = [*others, {"name": name, "version": version.version}]
    client.set_logged_model_tags(logged.model_id, {_VERSIONS: json.dumps(shown)})
    return version, False


def _choose_best(client: Any, name: str, new: Any) -> str | None:
    """Give the alias `BEST` to the version with the lowest bits per byte.

    Only versions with the same text for validation as the one that has the alias are compared; if
    none has it, those with the same text as the new one.

    Returns:
        The version that has the alias now.
    """
    named = client.get_registered_model(name).aliases.get(BEST)
    current = None if named is None else str(named)
    versions = {
        str(each.version): each for each in client.search_model_versions(f"name = '{name}'")
    }
    text = versions.get(current or "", new).tags.get(_HELD_OUT)
    if new.tags.get(_HELD_OUT) != text:
        log.warning(
            "the alias %s stays at version %s of %s, which was validated on other text than "
            "version %s: register runs on other text under another name",
            *(BEST, current, name, new.version),
        )
        return current
    scored = {
        number: float(each.tags[_BPB])
        for number, each in versions.items()
        if each.tags.get(_HELD_OUT) == text and _BPB in each.tags
    }
    # Of equal versions, the first keeps it
    best = min(scored, key=lambda number: (scored[number], int(number)), default=current)
    if best is not None and best != current:
        client.set_registered_model_alias(name, BEST, best)
    return best
