"""The existing run of a name: its recorded settings, and what a request would change."""

from pathlib import Path
from typing import NamedTuple

from zeroflow import artifacts, reuse
from zeroflow.checks.overfit import OverfitResult
from zeroflow.config import flag
from zeroflow.data.tokenizer import Tokenizer, changed_since
from zeroflow.device import Device, find_device, gpu_elsewhere
from zeroflow.reuse import Fields
from zeroflow.run_folder import Cache, RunFolder
from zeroflow.settings import defaults, resuming
from zeroflow.settings.run_config import RunConfig, TrainingChoice
from zeroflow.settings.settled import Settled
from zeroflow.tracking.store import forget
from zeroflow.training import checkpoint
from zeroflow.training import initial as initials
from zeroflow.training.job import TrainResult, read_job, trained_tokenizer


def load(cache: Path, name: str) -> Settled:
    """Load the settings of an existing run.

    Raises:
        ValueError: there is no run of this name; the message lists the existing ones.
    """
    path = Cache(cache).run(name).settings
    if not path.exists():
        runs = Cache(cache).existing_runs()
        there = ", ".join(run.name for run in runs if run.settings.exists())
        raise ValueError(f"no run {name} in {cache}/runs; existing runs: {there or 'none'}")
    return Settled.model_validate(artifacts.read_json(path)).replace(cache_dir=cache)


def find(asked: RunConfig) -> Settled | None:
    """Return the recorded settings of the run with the name in `asked`, if there is one."""
    if asked.run_name is None or not asked.folder.settings.exists():
        return None
    return load(asked.cache_dir, asked.run_name)


def size_of(asked: RunConfig) -> str:
    """Return the name of the model's size, from the existing run of this name if there is one."""
    return (find(asked) or asked).model.name


class Existing(NamedTuple):
    """An existing run: its settings, its progress and its results, as recorded in its folder."""

    settings: Settled
    asked: dict[str, object]
    """Settings that were asked for at the start, if settling changed them."""

    step: int
    """Step of the newest checkpoint; 0 without one."""

    tokenizer: Tokenizer | None
    """The tokenizer that the run was trained with; None without a checkpoint."""

    result: TrainResult | None
    learned: OverfitResult | None

    def merged(self, asked: RunConfig) -> RunConfig:
        """Merge `asked` over the recorded settings of the run."""
        wanted = resuming.merged(self.settings, asked, self.asked)
        training = _with_intervals_for_more_steps(self.settings, asked, wanted)
        return wanted.replace(training=training, model=wanted.model.settled)

    def difference(self, wanted: RunConfig, asked: RunConfig) -> str:
        """Return the first setting that differs and may not change, or ""."""
        name, initial = asked.model.init_from, self.settings.initial
        different = resuming.difference(self.settings, wanted)
        if different or name is None or initial is None:
            return different
        changed = initials.has_changed(name, initial, self.settings.cache_dir)
        return f"other files in --init-from {name}" if changed else ""

    def trained_otherwise(self, different: str, asked: RunConfig) -> str:
        """Return what differs from the settings of the training; "" before a checkpoint.

        Args:
            different: the first setting that differs.
        """
        if not self.step:
            return ""
        if different:
            return different
        name = self.settings.tokenizer.tokenizer_name
        if self.tokenizer is None or asked.tokenizer.tokenizer_name != name:
            return ""
        changed = changed_since(self.settings.tokenizer, self.tokenizer)  # of a local tokenizer
        return f"other files in the tokenizer {name} ({changed})" if changed else ""

    def is_trained(self, wanted: RunConfig) -> bool:
        """Return True if the run has been trained to the last step that is requested."""
        return self.result is not None and self.result.steps == wanted.training.max_steps

    def is_complete(self, wanted: RunConfig) -> bool:
        """Return True if the run is trained and checked as requested; it needs no device."""
        return (
            self.is_trained(wanted)
            and self.settings.folder.job.exists()
            and self.learned is not None
            and self.learned.passed
            and wanted.overfit == self.settings.overfit
        )


def open_run(asked: RunConfig) -> Existing | None:
    """Return the run with the name in `asked`, if there is one.

    Raises:
        CheckpointError: its checkpoints belong to another version of zeroflow.
    """
    if (settings := find(asked)) is None:
        return None
    folder = settings.folder
    return Existing(
        settings=settings,
        asked=artifacts.read_json(folder.asked) if folder.asked.exists() else {},
        step=checkpoint.newest_step(folder.checkpoints),
        tokenizer=trained_tokenizer(folder),
        result=TrainResult.read_if_exists(folder.training),
        learned=OverfitResult.read_if_exists(folder.overfit),
    )


def started_otherwise(asked: RunConfig) -> str:
    """Return the first requested setting that the trained run does not allow, or ""."""
    if (run := open_run(asked)) is None:
        return ""
    return run.trained_otherwise(run.difference(run.merged(asked), asked), asked)


def _with_intervals_for_more_steps(
    recorded: Settled, asked: RunConfig, wanted: RunConfig
) -> TrainingChoice:
    """Reset the intervals that had the default for the recorded number of steps.

    They then get the default for the larger number of steps.
    """
    before, training = recorded.training, wanted.training
    if (training.max_steps or 0) <= before.max_steps:
        return training
    gpu = recorded.device == "cuda"
    usual = {
        "validate_every": defaults.validate_every(before.max_steps, gpu=gpu),
        "checkpoint_every": defaults.checkpoint_every(before.max_steps),
    }
    unasked = {
        name: None
        for name, steps in usual.items()
        if getattr(asked.training, name) is None and getattr(before, name) == steps
    }
    return training.replace(**unasked)


def device_of(recorded: Settled) -> Device:
    """Return the device that a run was trained on, which this machine need not have."""
    work = read_job(recorded.folder).training.workload
    return find_device("cpu") if work.device == "cpu" else gpu_elsewhere(work.device_name)


def discard_settings(folder: RunFolder) -> None:
    """Delete the settings of a run that has not trained anything."""
    for file in (folder.settings, folder.asked, folder.ledger):
        file.unlink(missing_ok=True)
    forget(folder)


def unlike_others(run: Settled) -> str:
    """Return how `run` differs from the most similar run of the cache, in words.

    Runs without a checkpoint and runs on another text do not count.
    """

    def read(folder: Path) -> Fields:
        return by_flag(artifacts.read_json(RunFolder(folder).settings))

    def by_flag(settings: Fields) -> Fields:
        compared = resuming.compared(settings).items()
        fields = {flag(name): value for name, value in compared if not name.startswith("initial.")}
        data = settings["data"]
        return fields | {"source": [data[name] for name in ("data_mode", "data_path", "dataset")]}

    others = reuse.existing(run.run_dir.parent, read, but=run.run_dir)
    trained = {
        name: fields
        for name, fields in others.items()
        if checkpoint.newest_step(RunFolder(run.run_dir.with_name(name)).checkpoints)
    }
    return reuse.nearest(by_flag(run.model_dump(mode="json")), trained)
