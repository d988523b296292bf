"""How what a run leaves open is settled, once, and recorded.

What was chosen is in the run's `run.json`, so that a run goes on with the same settings wherever
and whenever it is resumed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from zeroflow import artifacts, reuse
from zeroflow.data.corpus import resolve_corpus
from zeroflow.data.tokenizer import resolve_tokenizer
from zeroflow.device import Device, find_device, require_gpus
from zeroflow.reuse import Fields
from zeroflow.run_folder import Cache, RunFolder
from zeroflow.settings import defaults
from zeroflow.settings.refusals import refuse_what_does_nothing, refuse_what_the_device_cannot
from zeroflow.settings.run_config import BuildChoice, RunConfig, leaves
from zeroflow.tracking.store import forget
from zeroflow.training import checkpoint
from zeroflow.training.config import TrainingConfig


class Settled(NamedTuple):
    run: RunConfig
    """Nothing in it is None that training reads."""

    training: TrainingConfig
    device: Device
    resumes: bool
    """Whether a run of this name was started before."""

    data_reason: str
    """Why this data."""

    tokenizer_reason: str
    """Why this tokenizer."""


# Settings that may change when a run goes on: they touch no weight
_FREE = {"cache_dir", "device", "sweep", "data.data_path", "data.allow_synthetic_fallback"} | {
    f"training.{name}"
    for name in (
        "batch_size",  # with grad_accum_steps and gpus: only their product is mathematics
        "grad_accum_steps",
        "gpus",
        "zero_stage",
        "validate_every",
        "checkpoint_every",
        "keep_checkpoints",
        "keep_every",
        "activation_checkpointing",
        "on_spike",
        "hang_seconds",
        "log_interval",
        "sample_prompt",
        "sample_tokens",
    )
}
_FREE |= {f"build.{name}" for name in BuildChoice.model_fields} | {"data.bad_lines_limit"}
_FREE |= {"overfit.overfit_steps", "overfit.overfit_loss", "skip_preflight"}


def settle(asked: RunConfig, acquire: Callable[[Path], None] = lambda run_dir: None) -> Settled:
    """Fill what `asked` leaves open, name the run, and record it in its run.json.

    What a run of the same name has recorded comes before any default.

    Args:
        acquire: called with the run's directory before anything in it is changed; raises an error
            where another process is at work there.

    Raises:
        ValueError: settings contradict each other, the device, or those of the run of this name.
        hub.HubError: the hub is needed and refused or is out of reach.
    """
    refuse_what_does_nothing(asked)
    if before := find_recorded(asked):
        acquire(before.run_dir)
    recorded = find_recorded(asked)
    merged = _over(recorded, asked) if recorded else asked
    merged = merged.replace(model=merged.model.settled)
    if different := started_otherwise(asked):
        raise ValueError(
            f"run {merged.run_name} was started with {different}: use another --run-name, or the "
            "former setting"
        )
    if recorded and _difference(recorded, merged):
        # Nothing has been trained: the run begins anew, so that a remedy can be tried
        folder = recorded.folder
        for of_before in (folder.settings, folder.asked, folder.ledger):
            of_before.unlink(missing_ok=True)
        forget(folder)
        recorded, merged = None, asked.replace(model=asked.model.settled)
    device = find_device(merged.device)
    require_gpus(merged.training.gpus or 1, device, wanted=merged.device)
    refuse_what_the_device_cannot(merged, device)
    data, data_reason = resolve_corpus(merged.data)
    tokenizer, tokenizer_reason = resolve_tokenizer(merged.tokenizer, data, merged.cache_dir)
    run = merged.replace(
        device=device.kind,
        data=data,
        tokenizer=tokenizer,
        training=defaults.fill(merged.training, merged.model, data, device),
    )
    if run.run_name is None:
        run = run.replace(run_name=_default_name(run))
    training = run.training_config  # a contradiction shows here, before anything is recorded
    acquire(run.run_dir)
    named = asked.model_copy(update={"run_name": run.run_name})
    if not recorded and find_recorded(named):
        return settle(named, acquire)  # the same command again, or at the same time
    if recorded:
        data_reason = tokenizer_reason = "as the run was started"
    else:
        otherwise = _without(_given(asked), run.model_dump(mode="json"))
        artifacts.write_json(run.folder.asked, otherwise)
    artifacts.write_json(run.folder.settings, run.model_dump(mode="json"))
    return Settled(run, training, device, recorded is not None, data_reason, tokenizer_reason)


def started_otherwise(asked: RunConfig) -> str | None:
    """What is asked of a run and cannot be changed any more, as it has been trained; else None."""
    recorded = find_recorded(asked)
    if recorded is None or not checkpoint.newest_step(recorded.folder.checkpoints):
        return None
    merged = _over(recorded, asked)
    return _difference(recorded, merged.replace(model=merged.model.settled)) or None


def sketch(asked: RunConfig, device: Device) -> RunConfig:
    """`asked` with what follows from the device filled in; looks nothing up, records nothing.

    What a run of the same name has recorded comes before any default.

    Raises:
        ValueError: settings contradict each other.
    """
    refuse_what_does_nothing(asked)
    recorded = find_recorded(asked)
    merged = _over(recorded, asked) if recorded else asked
    merged = merged.replace(device=device.kind, model=merged.model.settled)
    refuse_what_the_device_cannot(merged, device)
    return merged.replace(
        training=defaults.fill(merged.training, merged.model, merged.data, device)
    )


def load(cache: Path, name: str) -> RunConfig:
    """The settled settings of an existing run.

    Raises:
        ValueError: there is no run of this name; the message lists those there are.
    """
    path = Cache(cache).run(name).settings
    if not path.exists():
        runs = Cache(cache).existing_runs()
        there = ", ".join(run.name for run in runs if run.settings.exists())
        raise ValueError(f"no run {name} in {cache}/runs; there are: {there or 'none'}")
    return RunConfig.model_validate(artifacts.read_json(path)).replace(cache_dir=cache)


def unlike_others(run: RunConfig) -> str:
    """Why no other run of the cache is what the settled `run` will be."""

    def read(folder: Path) -> Fields:
        return _compared(artifacts.read_json(RunFolder(folder).settings))

    others = reuse.existing(run.run_dir.parent, read, but=run.run_dir)
    return reuse.nearest(_compared(run.model_dump(mode="json")), others)


def size_of(asked: RunConfig) -> str:
    """Name of the model's size, which is that of the run of this name if there is one."""
    return (find_recorded(asked) or asked).model.name


def find_recorded(asked: RunConfig) -> RunConfig | None:
    if asked.run_name is None or not asked.folder.settings.exists():
        return None
    return load(asked.cache_dir, asked.run_name)


def _given(config: BaseModel) -> dict[str, Any]:
    """Settings that were set by hand and to something definite, nested."""
    given: dict[str, Any] = {}
    for name in config.model_fields_set:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            value = _given(value)
        if value not in (None, "auto", (), {}):
            given[name] = str(value) if isinstance(value, Path) else value
    return given


def _compared(settings: Fields) -> Fields:
    """Settings as in run.json, by which runs differ."""
    named = {"run_name", *_FREE}
    return {name: value for name, value in reuse.flat(settings).items() if name not in named}


def _without(given: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """What is `given` and was not, with that value, before."""
    new = {}
    for name, value in given.items():
        known = before.get(name)
        if isinstance(value, dict) and isinstance(known, dict):
            value = _without(value, known)
        if value != {} and value != (tuple(known) if isinstance(known, list) else known):
            new[name] = value
    return new


def _over(recorded: RunConfig, asked: RunConfig) -> RunConfig:
    """The recorded settings with those on top that are given now.

    What was settled otherwise at the start, and is asked for again, stays as it was settled.
    """
    path = recorded.folder.asked
    before = artifacts.read_json(path) if path.exists() else {}
    base, given = recorded.model_dump(), _without(_given(asked), before)
    training = given.get("training", {})
    gpus = recorded.training.gpus or 1
    split = {"batch_size", "grad_accum_steps"} & set(training)
    if split or training.get("gpus", gpus) != gpus:
        base["training"] |= {"batch_size": None, "grad_accum_steps": None}
    if training.get("gpus") == 1:
        base["training"]["zero_stage"] = None
    if "size" in given.get("model", {}) or "hidden_size" in given.get("model", {}):
        base["model"] = {}
    for name, value in given.items():
        base[name] = base[name] | value if isinstance(value, dict) else value
    base["skip_preflight"] = asked.skip_preflight  # of a command, not of a run
    return RunConfig.model_validate(base)


def _difference(recorded: RunConfig, run: RunConfig) -> str:
    """The first setting in which a run may not change, and how it would; else nothing."""
    before, now = dict(leaves(recorded)), dict(leaves(run))
    for name in before:
        if name in _FREE or before[name] == now[name]:
            continue
        if name == "training.max_steps" and now[name] > before[name]:
            continue  # more steps extend a run
        return f"{name} {before[name]}, now it is {now[name]}"
    return ""


def _default_name(run: RunConfig) -> str:
    identity = {name: str(value) for name, value in _compared(run.model_dump()).items()}
    gpus, stage = run.training.gpus, run.training.zero_stage
    shared = f"-{gpus}gpus-zero{stage}" if gpus and gpus > 1 else ""
    return f"{run.model.name}-{run.data.name}-{artifacts.fingerprint(identity)[:6]}{shared}"
