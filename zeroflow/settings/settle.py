"""Settling: every setting that is left open gets a value once, which is recorded.

The settings are stored in the run's `run.json`, so that the run always resumes with the same ones,
although a default may depend on the device, the Hub or the version of zeroflow.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from zeroflow import artifacts
from zeroflow.config import flag
from zeroflow.data import slices
from zeroflow.data.corpus import CorpusConfig, ResolvedCorpus, resolve_corpus
from zeroflow.data.hub_errors import HubError
from zeroflow.data.tokenizer import (
    SYNTHETIC_TOKENIZER,
    ResolvedTokenizer,
    Tokenizer,
    TokenizerConfig,
    require_restorable,
    resolve_tokenizer,
    without_hub,
)
from zeroflow.device import Device, find_device
from zeroflow.model.llama import Shape
from zeroflow.run_folder import Cache, RunFolder
from zeroflow.settings import defaults, existing, resuming
from zeroflow.settings.existing import Existing
from zeroflow.settings.refusals import (
    refuse_a_plan_for_no_gpu,
    refuse_an_impossible_evaluation,
    refuse_ids_beyond_the_token_type,
    refuse_machines_that_cannot_share,
    refuse_more_gpus_than_there_are,
    refuse_what_does_nothing,
    refuse_what_the_device_cannot,
)
from zeroflow.settings.run_config import RunConfig
from zeroflow.settings.settled import Settled, Settlement
from zeroflow.tracking import others
from zeroflow.training import initial as initials
from zeroflow.training.initial import Initial, InitialSource

log = logging.getLogger(__name__)

_ASSUMED_ELSEWHERE = "assumed for another machine, because it is not available here"

Acquire = Callable[[Path], None]
"""Acquires the directory of a run for this process, or raises `RunIsBusy`."""


def settle(asked: RunConfig, acquire: Acquire = lambda run_dir: None) -> Settlement:
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
    asked = _anywhere(asked)
    if before := existing.find(asked):
        acquire(before.run_dir)
    # Read again under the lock: before it, another process may have changed or discarded them
    found = _with_initial(_looked_up(asked, _own_device))
    settlement = _decided(found, _resolve(found))
    run = settlement.run
    acquire(run.run_dir)
    # Nothing is written before this line, so a refusal leaves the run as it was
    if found.discarded:
        log.info(
            "run %s has no checkpoint yet and starts over: it was begun with %s",
            run.run_name,
            found.difference,
        )
        existing.discard_settings(found.discarded)
    if not settlement.resumes:
        # Only now is the default name known. If a run of this name exists, because the command is
        # repeated or runs twice, its recorded settings take precedence
        named = asked.model_copy(update={"run_name": run.run_name})
        if existing.find(named):
            return settle(named, acquire)
        # What the user asked for is kept beside the settled value, so that repeating the same
        # request, such as a branch that has moved since, does not count as a change
        otherwise = resuming.without(resuming.given(asked), run.model_dump(mode="json"))
        artifacts.write_json(run.folder.asked, otherwise, private=True)
    artifacts.write_json(run.folder.settings, run.model_dump(mode="json"), private=True)
    return settlement


def foresee(asked: RunConfig, gpu: Device | None = None) -> Settlement:
    """Settle `asked` as a run would, and record nothing.

    If a run needs something from the Hub that cannot be read now, it is assumed to be available,
    and the reason says so.

    Args:
        gpu: a GPU of another machine to plan for; None for the device of this machine.

    Raises:
        ValueError: settings contradict each other, the device, or the existing run of this name.
    """
    return _unrecorded(asked, gpu, lambda found: _assume(found, elsewhere=gpu is not None))


def look_up(asked: RunConfig, gpu: Device | None = None) -> Settlement:
    """Settle `asked` as a run would, including requests to the Hub, and record nothing.

    Args:
        gpu: a GPU of another machine on which the run will train; None for this machine's device.

    Raises:
        ValueError, hub.HubError: as `settle` does.
    """
    return _unrecorded(asked, gpu, _resolve)


def _unrecorded(
    asked: RunConfig, gpu: Device | None, resolve: Callable[["_Found"], "_Text"]
) -> Settlement:
    if gpu and asked.device == "cpu":
        raise ValueError("--gpu and --device cpu: drop one of them")

    def device_of(wanted: RunConfig) -> Device:
        device = gpu or find_device(wanted.device)
        refuse_a_plan_for_no_gpu(wanted, device)
        return device

    def decide(asked: RunConfig) -> Settlement:
        found = _with_initial(_looked_up(asked, device_of))
        return _decided(found, resolve(found))

    asked = _anywhere(asked)
    settlement = decide(asked)
    named = asked.model_copy(update={"run_name": settlement.run.run_name})
    return decide(named) if not asked.run_name and existing.find(named) else settlement


def require_possible(asked: RunConfig) -> None:
    """Check a run as far as its settings and the files of this machine show.

    That takes a moment, makes no request and writes nothing. `settle` begins with the same checks.

    Raises:
        ValueError: settings contradict each other, the device, or the existing run of this name, or
            a file that they name cannot be used.
    """
    _looked_up(_anywhere(asked), _own_device)


class _Found(NamedTuple):
    """The requested run, as far as settings, device and records show."""

    wanted: RunConfig
    """The requested settings, merged over the recorded ones."""

    device: Device
    recorded: Settled | None = None
    initial: Initial | None = None
    """The model to start from; None for random weights, and for a model on the hub that is not
    looked up yet."""

    tokenizer: Tokenizer | None = None
    """The tokenizer that the run was trained with; None if it has no checkpoint."""

    needs_text: bool = True
    """False if the run has already been trained to its last step on the same text."""

    discarded: RunFolder | None = None
    """Folder of a run that has not trained yet, and whose settings are replaced."""

    difference: str = ""
    """The first setting that differs from the discarded ones; "" if none."""


def _looked_up(asked: RunConfig, device_of: Callable[[RunConfig], Device]) -> _Found:
    """
    Args:
        device_of: returns the device for the merged settings, or refuses them.

    Raises:
        ValueError: as `require_possible` does.
    """
    known, new = existing.open_run(asked), asked.replace(model=asked.model.settled)
    if known is None:
        return _new(new, device_of)
    wanted = known.merged(asked)
    different = known.difference(wanted, asked)
    if refused := known.trained_otherwise(different, asked):
        raise ValueError(
            f"run {wanted.run_name} was trained with {refused}: use another --run-name, or the "
            "earlier setting"
        )
    if different:
        # The run has no checkpoint yet, so it may start over with other settings
        found = _new(new, device_of)
        return found._replace(discarded=known.settings.folder, difference=different)
    return _resumed(known, wanted, device_of)


def _new(wanted: RunConfig, device_of: Callable[[RunConfig], Device]) -> _Found:
    """Look up a run that starts at its first step."""
    initial, name = None, wanted.model.init_from
    if name and not initials.is_on_hub(name):
        wanted, initial = _started_from(wanted, initials.look_up(name, wanted.cache_dir))
    device = device_of(wanted)
    _require_usable(wanted, device, None, needs_text=True)
    return _Found(wanted, device, initial=initial)


def _resumed(
    known: Existing, wanted: RunConfig, device_of: Callable[[RunConfig], Device]
) -> _Found:
    """Look up a run that is resumed, or complete, with the settings `wanted`."""
    recorded = known.settings
    needs_text = wanted.data != recorded.data or not known.is_trained(wanted)
    if known.is_complete(wanted):  # any machine can show the result
        device = existing.device_of(recorded)
    else:
        device = device_of(wanted)
        _require_usable(wanted, device, known.tokenizer, needs_text=needs_text)
    return _Found(wanted, device, recorded, recorded.initial, known.tokenizer, needs_text)


def _with_initial(found: _Found) -> _Found:
    """Look up a model to start from that is on the hub, unless that was done before.

    Raises:
        ValueError, hub.HubError: as `initial.look_up` does.
    """
    wanted = found.wanted
    name = wanted.model.init_from
    if not name or found.initial:
        return found
    wanted, initial = _started_from(wanted, initials.look_up(name, wanted.cache_dir))
    return found._replace(wanted=wanted, initial=initial)


def _started_from(wanted: RunConfig, source: InitialSource) -> tuple[RunConfig, Initial]:
    """Return `wanted` with the shape and the tokenizer of the model that it starts from.

    Raises:
        ValueError: another shape or tokenizer is asked for.
    """
    shape = {name: getattr(source.initial.model, name) for name in Shape.model_fields}
    for name, value in shape.items():
        if (given := getattr(wanted.model, name)) not in (None, value):
            raise ValueError(
                f"{flag(name)} {given}, but --init-from {source.name} has {value}: drop it"
            )
    if wanted.tokenizer not in (TokenizerConfig(), source.tokenizer):
        raise ValueError(
            f"--init-from {source.name} has its own tokenizer: drop --tokenizer-name, "
            "--vocab-size, --tokenizer-revision and --end-of-text"
        )
    is_text = source.tokenizer.tokenizer_name != SYNTHETIC_TOKENIZER
    if wanted.data.is_text != is_text:
        kind = "text" if is_text else "token ids"
        raise ValueError(
            f"--init-from {source.name} was trained on {kind}, but --data-mode is "
            f"{wanted.data.data_mode}: use another model or --data-mode"
        )
    model = wanted.model.replace(init_from=source.name, **shape)
    return wanted.replace(model=model, tokenizer=source.tokenizer), source.initial


def _require_usable(
    wanted: RunConfig, device: Device, tokenizer: Tokenizer | None, *, needs_text: bool
) -> None:
    """
    Args:
        tokenizer: the tokenizer of a trained run; None if it is not trained.

    Raises:
        ValueError: the device, the text or the tokenizer cannot be used with these settings.
    """
    refuse_what_the_device_cannot(wanted, device)
    _ = _filled(wanted, device).schedule  # raises if its settings contradict each other
    if tokenizer is None:
        refuse_ids_beyond_the_token_type(wanted, wanted.tokenizer)
    if needs_text:
        slices.require_readable(wanted.data)
    if tokenizer:
        require_restorable(wanted.tokenizer, tokenizer)


def _own_device(wanted: RunConfig) -> Device:
    """Return the device of this machine.

    Raises:
        ValueError: the machine has no such device, or fewer than the run asks for.
    """
    device = find_device(wanted.device)
    refuse_more_gpus_than_there_are(wanted, device)
    return device


class _Text(NamedTuple):
    """Corpus and tokenizer of a run, with the reasons for them."""

    corpus: ResolvedCorpus
    tokenizer: ResolvedTokenizer


def _decided(found: _Found, text: _Text) -> Settlement:
    """Give every open setting a value, and name the run."""
    wanted, recorded, device = found.wanted, found.recorded, found.device
    (corpus, corpus_reason), (tokenizer, tokenizer_reason) = text
    if found.initial and tokenizer.tokenizer_name != wanted.tokenizer.tokenizer_name:
        raise ValueError(
            f"--init-from {wanted.model.init_from} was trained on text, but the data are synthetic "
            f"({corpus_reason}): name other data"
        )
    run = _filled(wanted.replace(data=corpus, tokenizer=tokenizer), device)
    run = run.replace(initial=found.initial)
    if not run.run_name:
        run = run.replace(run_name=resuming.default_name(run))
    if recorded:
        corpus_reason = tokenizer_reason = "as when the run was started"
    return Settlement(run, device, recorded is not None, corpus_reason, tokenizer_reason)


def _resolve(found: _Found) -> _Text:
    """Ask the Hub for what the run needs from it.

    Raises:
        ValueError, hub.HubError: as `settle` does.
    """
    corpus = _resolved(found)
    return _Text(corpus, _tokenizer(found, corpus.corpus))


def _assume(found: _Found, *, elsewhere: bool) -> _Text:
    """Resolve as `_resolve` does, and assume that what the Hub does not provide now is available.

    Args:
        elsewhere: also assume this where a run would fall back to what this machine has.
    """
    data, tokens = found.wanted.data, found.wanted.tokenizer
    try:
        corpus = _resolved(found)
    except HubError as error:
        corpus = ResolvedCorpus(data, f"assumed to be available; here, {error.cause}")
    fell_back = data.data_mode in ("auto", "fineweb") and corpus.corpus.data_mode != "fineweb"
    if elsewhere and fell_back:
        corpus = ResolvedCorpus(data.replace(data_mode="fineweb"), _ASSUMED_ELSEWHERE)
    try:
        tokenizer = _tokenizer(found, corpus.corpus)
    except HubError as error:
        tokenizer = ResolvedTokenizer(tokens, f"assumed to be available; here, {error.cause}")
    usual = without_hub(corpus.corpus)
    if elsewhere and tokens.tokenizer_name == "auto" and tokenizer[0].tokenizer_name != usual:
        tokenizer = ResolvedTokenizer(tokens.replace(tokenizer_name=usual), _ASSUMED_ELSEWHERE)
    return _Text(corpus, tokenizer)


def _anywhere(asked: RunConfig) -> RunConfig:
    """Return `asked` with absolute paths, as the run may be resumed in another folder.

    Raises:
        ValueError: a setting has no effect.
    """
    refuse_what_does_nothing(asked)
    refuse_an_impossible_evaluation(asked)
    others.require_installed(asked.trackers)
    data, model, evaluation = asked.data.anywhere, asked.model.anywhere, asked.evaluation.anywhere
    if (data, model, evaluation) == (asked.data, asked.model, asked.evaluation):
        return asked
    return asked.model_copy(update={"data": data, "model": model, "evaluation": evaluation})


def _resolved(found: _Found) -> ResolvedCorpus:
    """Resolve the corpus of the run. The text of a complete run may be missing or changed.

    Raises:
        ValueError, hub.HubError: as `resolve_corpus` does.
    """
    wanted = found.wanted
    try:
        return resolve_corpus(wanted.data, Cache(wanted.cache_dir).digests)
    except (OSError, ValueError) as error:
        if found.needs_text:
            raise
        log.warning("%s. Run %s is complete and does not need it", error, wanted.run_name)
        return ResolvedCorpus(wanted.data, "as the run was started")


def _tokenizer(found: _Found, corpus: CorpusConfig) -> ResolvedTokenizer:
    """Resolve the tokenizer; a trained run keeps its copy.

    Raises:
        ValueError: the copy is missing or damaged, and the files it was copied from are missing
            too, or have changed.
    """
    wanted = found.wanted
    if found.tokenizer:
        require_restorable(wanted.tokenizer, found.tokenizer)
        return ResolvedTokenizer(wanted.tokenizer, "as when the run was started")
    resolved = resolve_tokenizer(wanted.tokenizer, corpus, wanted.cache_dir)
    if resolved.tokenizer.tokenizer_name != wanted.tokenizer.tokenizer_name:  # it was auto
        refuse_ids_beyond_the_token_type(wanted, resolved.tokenizer)
    return resolved._replace(reason="that of --init-from") if found.initial else resolved


def _filled(wanted: RunConfig, device: Device) -> Settled:
    """Return `wanted` with all defaults that depend on device and size filled in.

    Raises:
        ValueError: the numbers of rows and tokens in a step contradict each other.
    """
    training = defaults.fill(wanted, device)
    groups = {name: getattr(wanted, name) for name in RunConfig.model_fields}
    run = Settled.model_validate(
        groups | {"run_name": wanted.run_name or "", "device": device.kind, "training": training}
    )
    refuse_machines_that_cannot_share(run)
    return run
