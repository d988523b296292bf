"""Settling: every setting that is left open gets a value once, which is recorded.

The settings are stored in the run's `run.json`, so that the run always resumes with the same ones,
although a default may depend on the device, the Hub or the version of zeroflow.
"""

import logging
from collections.abc import Callable
from pathlib import Path

from zeroflow import artifacts, reuse
from zeroflow.data.corpus import CorpusConfig, ResolvedCorpus, resolve_corpus
from zeroflow.data.tokenizer import (
    ResolvedTokenizer,
    changed_since,
    require_restorable,
    resolve_tokenizer,
)
from zeroflow.device import Device, find_device
from zeroflow.reuse import Fields
from zeroflow.run_folder import Cache, RunFolder
from zeroflow.settings import defaults, resuming
from zeroflow.settings.refusals import (
    refuse_more_gpus_than_there_are,
    refuse_what_does_nothing,
    refuse_what_the_device_cannot,
)
from zeroflow.settings.run_config import RunConfig, TrainingChoice
from zeroflow.settings.settled import Settled, Settlement
from zeroflow.tracking.store import forget
from zeroflow.training import checkpoint
from zeroflow.training.job import TrainResult, trained_tokenizer

log = logging.getLogger(__name__)


def settle(asked: RunConfig, acquire: Callable[[Path], None] = lambda run_dir: None) -> Settlement:
    """Give every open setting of `asked` a value, name the run, and record all in its run.json.

    Recorded settings of a run of the same name take precedence over defaults.

    The order matters: all refusals come before the first write, so that a refused command leaves an
    existing run unchanged. Checks that need no network come before requests to the Hub.

    Args:
        acquire: called with the run's directory before anything in it changes; raises an error if
            another process is working there.

    Raises:
        ValueError: settings contradict each other, the device, or the existing run of this name.
        hub.HubError: the hub is needed, but refused the request or could not be reached.
    """
    refuse_what_does_nothing(asked)
    if (anywhere := asked.data.anywhere) != asked.data:  # the run may be resumed in another folder
        asked = asked.model_copy(update={"data": anywhere})
    if before := _recorded(asked):
        acquire(before.run_dir)
    # Read again under the lock: before it, another process may have changed or discarded them
    recorded = _recorded(asked)
    wanted = _wanted(recorded, asked)
    if different := started_otherwise(asked):
        raise ValueError(
            f"run {wanted.run_name} was trained with {different}: use another --run-name, or the "
            "earlier setting"
        )
    discarded: RunFolder | None = None
    if recorded and resuming.difference(recorded, wanted):
        # The run has no checkpoint yet, so it may start over with other settings
        discarded = recorded.folder
        recorded, wanted = None, _wanted(None, asked)
    device = find_device(wanted.device)
    refuse_more_gpus_than_there_are(wanted, device)
    refuse_what_the_device_cannot(wanted, device)  # before requests to the hub
    corpus, corpus_reason = _resolved(wanted, recorded)
    tokenizer, tokenizer_reason = _tokenizer(recorded, wanted, corpus)
    run = _filled(wanted.replace(data=corpus, tokenizer=tokenizer), device)
    if not run.run_name:
        run = run.replace(run_name=resuming.default_name(run))
    _ = run.schedule  # raises if its settings contradict each other; nothing is recorded yet
    acquire(run.run_dir)
    # Nothing is written before this line, so a refusal leaves the run as it was
    if discarded:
        _discard_settings(discarded)
    if recorded:
        corpus_reason = tokenizer_reason = "as when the run was started"
    else:
        # Only now is the default name known. If a run of this name exists, because the command is
        # repeated or runs twice, its recorded settings take precedence
        named = asked.model_copy(update={"run_name": run.run_name})
        if _recorded(named):
            return settle(named, acquire)
        # What the user asked for is kept beside the settled value, so that repeating the same
        # request, such as a branch that has moved since, is not taken for a change
        otherwise = resuming.without(resuming.given(asked), run.model_dump(mode="json"))
        artifacts.write_json(run.folder.asked, otherwise)
    artifacts.write_json(run.folder.settings, run.model_dump(mode="json"))
    return Settlement(run, device, recorded is not None, corpus_reason, tokenizer_reason)


def _resolved(wanted: RunConfig, recorded: Settled | None) -> ResolvedCorpus:
    """Resolve the corpus of the run. The text of a complete run may be missing or changed.

    Raises:
        ValueError, hub.HubError: as `resolve_corpus` does.
    """
    try:
        return resolve_corpus(wanted.data)
    except (OSError, ValueError) as error:
        if recorded is None or wanted.data != recorded.data or not _is_complete(wanted):
            raise
        log.warning("%s. Run %s is complete and does not need it", error, wanted.run_name)
        return ResolvedCorpus(wanted.data, "as the run was started")


def _is_complete(wanted: RunConfig) -> bool:
    result = TrainResult.read_if_exists(wanted.folder.training)
    return result is not None and result.steps == wanted.training.max_steps


def sketch(asked: RunConfig, device: Device) -> Settled:
    """Settle the settings of `asked` that depend on the device; make no requests, record nothing.

    Recorded settings of a run of the same name take precedence over defaults.

    Raises:
        ValueError: settings contradict each other.
    """
    refuse_what_does_nothing(asked)
    wanted = _wanted(_recorded(asked), asked)
    refuse_what_the_device_cannot(wanted, device)
    return _filled(wanted, device)


def started_otherwise(asked: RunConfig) -> str | None:
    """Return the first requested setting that the trained run does not allow; None if none."""
    recorded = _recorded(asked)
    if recorded is None or not checkpoint.newest_step(recorded.folder.checkpoints):
        return None
    return resuming.difference(recorded, _wanted(recorded, asked)) or _other_files(recorded, asked)


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


def unlike_others(run: Settled) -> str:
    """Return how `run` differs from the most similar run of the cache, in words."""

    def read(folder: Path) -> Fields:
        return resuming.compared(artifacts.read_json(RunFolder(folder).settings))

    others = reuse.existing(run.run_dir.parent, read, but=run.run_dir)
    return reuse.nearest(resuming.compared(run.model_dump(mode="json")), others)


def size_of(asked: RunConfig) -> str:
    """Return the name of the model's size, from the existing run of this name if there is one."""
    return (_recorded(asked) or asked).model.name


def _other_files(recorded: Settled, asked: RunConfig) -> str | None:
    """Describe the change of a local tokenizer that `asked` names again; None if there is none."""
    trained, name = trained_tokenizer(recorded.folder), recorded.tokenizer.tokenizer_name
    if trained is None or asked.tokenizer.tokenizer_name != name:
        return None
    changed = changed_since(recorded.tokenizer, trained)
    return f"other files in the tokenizer {name} ({changed})" if changed else None


def _tokenizer(
    recorded: Settled | None, wanted: RunConfig, corpus: CorpusConfig
) -> ResolvedTokenizer:
    """Resolve the tokenizer; a trained run keeps its copy.

    Raises:
        ValueError: the copy is missing or damaged, and the files it was copied from are missing
            too, or have changed.
    """
    trained = trained_tokenizer(recorded.folder) if recorded else None
    if trained is None:
        return resolve_tokenizer(wanted.tokenizer, corpus, wanted.cache_dir)
    require_restorable(wanted.tokenizer, trained)
    return ResolvedTokenizer(wanted.tokenizer, "as when the run was started")


def _recorded(asked: RunConfig) -> Settled | None:
    if asked.run_name is None or not asked.folder.settings.exists():
        return None
    return load(asked.cache_dir, asked.run_name)


def _wanted(recorded: Settled | None, asked: RunConfig) -> RunConfig:
    """Merge `asked` over the recorded settings of the run."""
    if recorded is None:
        return asked.replace(model=asked.model.settled)
    wanted = resuming.merged(recorded, asked, _asked_at_start(recorded))
    wanted = wanted.replace(training=_with_intervals_for_more_steps(recorded, asked, wanted))
    return wanted.replace(model=wanted.model.settled)


def _with_intervals_for_more_steps(
    recorded: Settled, asked: RunConfig, wanted: RunConfig
) -> TrainingChoice:
    """Reopen the intervals that had the default for the recorded number of steps.

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


def _asked_at_start(recorded: Settled) -> dict[str, object]:
    file = recorded.folder.asked
    return artifacts.read_json(file) if file.exists() else {}


def _filled(wanted: RunConfig, device: Device) -> Settled:
    """Return `wanted` with all defaults that depend on device and size filled in.

    Raises:
        ValueError: the numbers of rows and tokens in a step contradict each other.
    """
    training = defaults.fill(wanted, device)
    groups = {name: getattr(wanted, name) for name in RunConfig.model_fields}
    return Settled.model_validate(
        groups | {"run_name": wanted.run_name or "", "device": device.kind, "training": training}
    )


def _discard_settings(folder: RunFolder) -> None:
    """Delete the settings of a run that has not trained anything."""
    for file in (folder.settings, folder.asked, folder.ledger):
        file.unlink(missing_ok=True)
    forget(folder)
