"""Resuming a run: settings that may change, and the merge of requested with recorded settings."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from zeroflow import artifacts, reuse
from zeroflow.config import flag
from zeroflow.data.corpus import CorpusConfig
from zeroflow.reuse import Fields
from zeroflow.settings.run_config import (
    BuildChoice,
    EvaluationChoice,
    HostsChoice,
    RunConfig,
    TrainingChoice,
    leaves,
)
from zeroflow.settings.settled import Settled
from zeroflow.training import initial

# Settings that may change when a run is resumed, because they do not affect the weights
FREE = {"cache_dir", "device", "log_to", "sweep"}
FREE |= {f"training.{name}" for name in TrainingChoice.free}
FREE |= {f"build.{name}" for name in BuildChoice.model_fields}
FREE |= {f"hosts.{name}" for name in HostsChoice.model_fields}
FREE |= {f"data.{name}" for name in CorpusConfig.free}
FREE |= {f"evaluation.{name}" for name in EvaluationChoice.model_fields}
FREE |= {"overfit.overfit_steps", "overfit.overfit_loss", "skip_preflight"}
FREE |= {"register_"}

ADDED = {"data.validation_revision": None, "model.init_from": None}
"""Settings that were added later, with their defaults. They are part of a run's default name only
if they differ from the default, so that the names of existing runs stay the same."""


def identity(run: RunConfig) -> dict[str, str]:
    """Return the settings that distinguish runs; the default name contains their fingerprint."""
    return {name: str(value) for name, value in compared(run.model_dump()).items()}


def default_name(run: Settled) -> str:
    """Return a deterministic name for the settings; it begins with size and corpus."""
    digest = artifacts.fingerprint(identity(run))[:6]
    model = initial.short_name(run.model.init_from) if run.model.init_from else run.model.name
    return "-".join((model, run.data.name, digest, *run.training.sharding))


def compared(settings: Fields) -> Fields:
    """Return those of `settings`, as in run.json, that distinguish runs."""
    named = {"run_name", "initial.licence", *FREE}
    return {
        name: value
        for name, value in reuse.flat(settings).items()
        if name not in named and not (name in ADDED and value == ADDED[name])
    }


def given(config: BaseModel) -> dict[str, object]:
    """Return the settings that were given explicitly and are not None, nested."""
    found: dict[str, object] = {}
    for name in config.model_fields_set:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            value = given(value)
        if value not in (None, "auto", (), {}):
            found[name] = str(value) if isinstance(value, Path) else value
    return found


def without(settings: dict[str, object], before: dict[str, object]) -> dict[str, object]:
    """Return the entries of `settings` that are missing in `before` or have another value there."""
    new: dict[str, object] = {}
    for name, value in settings.items():
        known = before.get(name)
        if isinstance(value, dict) and isinstance(known, dict):
            value = without(value, known)
        if value != {} and value != (tuple(known) if isinstance(known, list) else known):
            new[name] = value
    return new


def merged(recorded: RunConfig, asked: RunConfig, at_start: dict[str, object]) -> RunConfig:
    """Return the recorded settings, overridden by those that are given now.

    Args:
        at_start: settings whose settled value differs from the value requested at the start,
            such as a commit instead of a branch. If requested again, they keep the settled value.
    """
    # Settings that the command repeats from the start are not overrides: for them, the recorded
    # settled value stays
    base, asked_now = recorded.model_dump(), without(given(asked), at_start)
    base.pop("initial", None)  # `settle` adds it again
    groups = {name: value for name, value in asked_now.items() if isinstance(value, dict)}
    training, model = groups.get("training", {}), groups.get("model", {})
    ranks = recorded.training.model_copy(update=training).ranks
    split = {"batch_size", "grad_accum_steps"} & set(training)
    # The global batch is fixed, so a change of one factor reopens the others
    if split or ranks != recorded.training.ranks:
        base["training"] |= {"batch_size": None, "grad_accum_steps": None}
    offloads = training.get("offload", recorded.training.offload) != "none"
    if (ranks == 1 and not offloads) or (offloads and not recorded.training.zero_stage):
        base["training"]["zero_stage"] = None  # the default of one GPU, or that with --offload
    _drop_groups(base["training"], training, ranks)
    source = recorded.model.init_from
    if {"size", "hidden_size"} & set(model) or model.get("init_from", source) != source:
        base["model"] = {}
    optimizer = groups.get("optimizer", {}).get("name", recorded.optimizer.name)
    if optimizer != recorded.optimizer.name:  # settings of another optimiser do not apply
        base["optimizer"] = {}
    for name, value in asked_now.items():
        base[name] = base[name] | value if isinstance(value, dict) else value
    for name in ("skip_preflight", "register_"):  # settings of the command, not of the run
        base[name] = getattr(asked, name)
    return RunConfig.model_validate(base)


def _drop_groups(recorded: dict[str, Any], asked: Fields, ranks: int) -> None:
    """Drop the recorded groups of ranks that do not suit the requested ZeRO stage and `ranks`."""
    stage = asked.get("zero_stage", recorded["zero_stage"])
    group = recorded["shard_group"]
    if group and (ranks % group or stage == 0):
        recorded["shard_group"] = None
    sharing = asked.get("shard_group") or recorded["shard_group"] or ranks
    reshard = recorded["reshard_group"]
    if reshard and (sharing % reshard or sharing == reshard or stage != 3):
        recorded["reshard_group"] = None


def difference(recorded: RunConfig, run: RunConfig) -> str:
    """Return the first setting that differs and may not change, with both values; "" if none."""
    before, now = dict(leaves(recorded)), dict(leaves(run))
    for name in before:
        if name in FREE or name.startswith("initial.") or before[name] == now.get(name):
            continue
        if name == "training.max_steps" and now[name] > before[name]:
            continue  # more steps extend a run
        return f"{flag(name)} {before[name]}, now it is {now[name]}"
    return ""
