"""The trained model that a run starts from: a checkpoint of a run, or a model of Hugging Face.

Its weights are copied once, in fp32, into a directory under `<cache>/models/`. So the source may
change or disappear after a run has started.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
import yaml
from pydantic import Field
from torch import Tensor

from zeroflow import artifacts
from zeroflow.artifacts import JsonObject
from zeroflow.config import Config
from zeroflow.data import hub
from zeroflow.data.hub_errors import HubError
from zeroflow.data.hub_requests import QUESTION
from zeroflow.data.sources.known_digests import digest_files
from zeroflow.data.tokenizer import SYNTHETIC_TOKENIZER, Tokenizer, TokenizerConfig, require_copy
from zeroflow.model.hugging_face import model_config
from zeroflow.model.llama import Llama, ModelConfig
from zeroflow.run_folder import Cache, RunFolder
from zeroflow.text.markup import one_line
from zeroflow.training import checkpoint, zero
from zeroflow.training.checkpoint import Which
from zeroflow.training.job import read_job
from zeroflow.training.tensor_files import SUFFIX, BadTensorFile, TensorFiles

log = logging.getLogger(__name__)

RUN = "run:"
"""Prefix of a source that is a run."""

_PART_BYTES = 2**30
"""Bytes of weights that are in memory at once while they are copied."""

_CARD = "README.md"
"""Model card of a folder in the format of Hugging Face."""

_LONGEST_LICENCE = 100
"""Maximum number of characters of a licence's name."""

_TIED_HEAD = "lm_head.weight"
_ANGLES = "rotary_emb.inv_freq"
"""Tensors that some files contain in addition: the embedding once more, and rotary angles."""


class Initial(Config):
    """A trained model that a run starts from, as the run records it."""

    digest: str
    """Digest of the source: of the files of a folder, of a checkpoint, or the commit on the hub."""

    model: ModelConfig
    licence: str | None = Field(None, exclude_if=lambda licence: licence is None)
    """Licence that the source names; None if it names none."""


class InitialSource(NamedTuple):
    """A trained model that was looked up."""

    name: str
    """The name that was asked for, with the step of a run or the commit on the hub."""

    initial: Initial
    tokenizer: TokenizerConfig
    """Choice of the tokenizer that the model was trained with."""


def is_on_hub(name: str) -> bool:
    """Return True if the source `name` is neither a run nor a folder of this machine."""
    return not name.startswith(RUN) and _folder(name) is None


def anywhere(name: str) -> str:
    """Return `name`, with an absolute path if it is a folder."""
    folder = _folder(name)
    return str(folder.absolute()) if folder else name


def short_name(name: str) -> str:
    """Return a short form of the source `name` for the names of folders."""
    last = name.removeprefix(RUN).rstrip("/").rsplit("/", 1)[-1]
    last = last if name.startswith(RUN) else last.partition("@")[0]
    return re.sub(r"[^A-Za-z0-9.]+", "-", last).strip("-.").lower()[:40] or "model"


def look_up(name: str, cache: Path) -> InitialSource:
    """Return the model that `name` means.

    Args:
        name: `run:NAME`, `run:NAME@STEP` or `run:NAME@best`; a folder of Hugging Face's format; or
            a name on the hub, with an optional @REVISION.

    Raises:
        ValueError: there is no such model, or this decoder cannot express it.
        HubError: the hub refused or could not be reached.
    """
    if name.startswith(RUN):
        return _of_run(name, cache)
    try:
        folder = _folder(name)
        return _of_folder(name, folder, cache) if folder else _of_hub(name)
    except HubError as error:
        raise error.with_remedies(
            f"if {name} is gated, accept its licence on its page and run `hf auth login`",
            "`--init-from FOLDER` to use one that you have",
        ) from error
    except ValueError as error:
        raise ValueError(f"--init-from {name}: {error}") from error


def has_changed(name: str, initial: Initial, cache: Path) -> bool:
    """Return True if `name` is a folder whose files differ from those that a run started with."""
    folder = _folder(name)
    return folder is not None and _digest(folder, cache) != initial.digest


def fetch(name: str, initial: Initial, cache: Path) -> Path:
    """Ensure that the weights of a source that was looked up are under `<cache>/models/`.

    Raises:
        ValueError: the source has changed since, or its tensors are not those of the decoder.
        HubError: the hub refused or failed.
    """
    path = directory(name, initial, cache)

    def build(partial: Path) -> None:
        from safetensors.torch import save_file  # needed by few runs

        log.info("copying the weights of %s", name)
        with ExitStack() as stack:
            weights = _weights(name, initial, cache, stack)
            for number, part in enumerate(_parts(weights)):
                save_file(part, partial / f"model-{number:05d}{SUFFIX}")
        artifacts.seal(partial, {"source": name, **initial.model_dump(mode="json")})

    reused = artifacts.build_once(path, build)
    log.info("initial weights %s: %s", "reused" if reused else "copied", path)
    return path


def directory(name: str, initial: Initial, cache: Path) -> Path:
    """Return the directory of the copied weights."""
    fingerprint = artifacts.fingerprint(initial.model_dump(mode="json", exclude={"licence"}))
    return Cache(cache).models / f"{short_name(name)}-{fingerprint}"


def load(model: Llama, path: Path) -> None:
    """Load copied weights into `model`, in place; each rank reads the rows of its shard."""
    with TensorFiles(path) as files:
        for name, parameter in zero.named_parameters(model):
            files.read_into(name, parameter.detach())


def _folder(name: str) -> Path | None:
    path = Path(name).expanduser()
    return path if path.is_dir() else None


def _of_run(name: str, cache: Path) -> InitialSource:
    run, _, which = name.removeprefix(RUN).partition("@")
    folder = Cache(cache).run(run)
    if not folder.job.exists():
        runs = ", ".join(f.name for f in Cache(cache).existing_runs() if f.job.exists())
        raise ValueError(
            f"--init-from {name}: no run {run} in {cache}/runs; existing runs: {runs or 'none'}"
        )
    if which and which != "best" and not which.isdecimal():
        raise ValueError(f"--init-from {name}: @ must be followed by a step or best")
    chosen: Which = "newest" if not which else "best" if which == "best" else int(which)
    path = checkpoint.find(folder.checkpoints, chosen)
    facts, tokenizer = checkpoint.read_facts(path), read_job(folder).tokenizer
    checkpoint.require_same(path, facts.model, tokenizer=tokenizer.fingerprint)
    require_copy(tokenizer)
    initial = Initial(
        digest=_digest_of_checkpoint(path), model=facts.model, licence=_licence_of_run(folder)
    )
    return InitialSource(f"{RUN}{run}@{facts.step}", initial, _choice(tokenizer))


def _licence_of_run(folder: RunFolder) -> str | None:
    """Return the licence of the model that a run started from; it also applies to the new model."""
    found = artifacts.read_json(folder.settings).get("initial") or {}
    licence: str | None = found.get("licence")
    return licence


def _choice(tokenizer: Tokenizer) -> TokenizerConfig:
    """Return the settings that give the same tokenizer again."""
    if tokenizer.path is None:
        return TokenizerConfig(tokenizer_name=SYNTHETIC_TOKENIZER, vocab_size=tokenizer.vocab_size)
    end = tokenizer.load().id_to_token(tokenizer.end_of_text)
    return TokenizerConfig(tokenizer_name=str(tokenizer.path.absolute()), end_of_text=end)


def _of_folder(name: str, folder: Path, cache: Path) -> InitialSource:
    if not (folder / "config.json").is_file():
        raise ValueError("the folder has no config.json, so it is not a model of Hugging Face")
    if not _files(folder):
        raise ValueError(f"the folder has no model*{SUFFIX}; other files of weights are not read")
    config = artifacts.read_json(folder / "config.json")
    initial = Initial(
        digest=_digest(folder, cache),
        model=model_config(config),
        licence=_licence(folder / _CARD, config),
    )
    return InitialSource(name, initial, TokenizerConfig(tokenizer_name=str(folder.absolute())))


def _of_hub(name: str) -> InitialSource:
    repository, _, revision = name.partition("@")
    if name.startswith((".", "/", "~")):
        raise ValueError("no such folder")
    commit = hub.model_revision(repository, revision or None, probe="config.json")
    with TemporaryDirectory() as place:
        folder, wanted = Path(place), ("config.json", _CARD)
        hub.download(repository, commit, wanted.__contains__, folder, patience=QUESTION)
        config = artifacts.read_json(folder / "config.json")
        model = model_config(config)
        initial = Initial(digest=commit, model=model, licence=_licence(folder / _CARD, config))
    tokenizer = TokenizerConfig(tokenizer_name=repository, tokenizer_revision=commit)
    return InitialSource(f"{repository}@{commit}", initial, tokenizer)


def _licence(card: Path, config: JsonObject) -> str | None:
    """Return the licence that the model card or the configuration names."""
    found = _card_metadata(card)
    named = found.get("license_name") or found.get("license") or config.get("license")
    return one_line(named)[:_LONGEST_LICENCE] if isinstance(named, str) and named else None


def _card_metadata(card: Path) -> JsonObject:
    """Return the YAML metadata at the beginning of a model card; empty if there is none."""
    if not card.is_file():
        return {}
    text = card.read_text(encoding="utf-8", errors="replace")
    if (block := re.match(r"---\n(.*?)\n---\s*\n", text, re.DOTALL)) is None:
        return {}
    try:
        found = yaml.safe_load(block[1])
    except yaml.YAMLError:  # text by others, which a run does not need
        return {}
    return found if isinstance(found, dict) else {}


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"model*{SUFFIX}"))


def _digest(folder: Path, cache: Path) -> str:
    """Return a digest of the configuration and the weights in a folder."""
    store = Cache(cache).digests / f"model-{artifacts.fingerprint(str(folder))}.json"
    found = digest_files([folder / "config.json", *_files(folder)], store)
    return artifacts.fingerprint({path.name: each.sha256 for path, each in found.items()})


def _digest_of_checkpoint(path: Path) -> str:
    return artifacts.fingerprint(artifacts.read_signed(path / artifacts.MANIFEST))


def _weights(
    name: str, initial: Initial, cache: Path, stack: ExitStack
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of the source in fp32.

    Args:
        stack: receives what must stay open meanwhile.

    Raises:
        ValueError: the source has changed, or its tensors are not those of the decoder.
    """
    if name.startswith(RUN):
        run, _, step = name.removeprefix(RUN).partition("@")
        path = checkpoint.find(Cache(cache).run(run).checkpoints, int(step))
        if _digest_of_checkpoint(path) != initial.digest:
            raise ValueError(f"--init-from {name}: the checkpoint has changed since the run began")
        return iter(checkpoint.load_model(path).state_dict().items())
    folder = _folder(name)
    if folder is None:
        repository, _, commit = name.partition("@")
        folder = Path(stack.enter_context(TemporaryDirectory(dir=Cache(cache).models)))
        hub.download(repository, commit, _is_of_weights, folder)
    elif _digest(folder, cache) != initial.digest:
        raise ValueError(f"--init-from {name}: its files have changed since the run began")
    return _of_files(stack.enter_context(TensorFiles(folder)), initial.model, name)


def _is_of_weights(file: str) -> bool:
    return re.fullmatch(rf"model[^/]*{re.escape(SUFFIX)}", file) is not None


def _of_files(files: TensorFiles, config: ModelConfig, name: str) -> Iterator[tuple[str, Tensor]]:
    with torch.device("meta"):
        expected = Llama(config).state_dict()
    found = {tensor for tensor in files if not tensor.endswith(_ANGLES)}
    if config.tie_word_embeddings:
        found.discard(_TIED_HEAD)
    for wrong, text in ((expected.keys() - found, "lacks"), (found - expected.keys(), "also has")):
        if wrong:
            raise ValueError(f"--init-from {name}: it {text} {', '.join(sorted(wrong)[:3])}")
    for tensor, ours in expected.items():
        weight = files.read(tensor)
        if weight.shape != ours.shape or not weight.is_floating_point():
            raise BadTensorFile(
                f"--init-from {name}: {tensor} is {list(weight.shape)} of {weight.dtype}, but the "
                f"configuration needs {list(ours.shape)} floating-point numbers"
            )
        yield tensor, weight.float()


def _parts(weights: Iterator[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Yield the weights in parts, each for one file."""
    part: dict[str, Tensor] = {}
    for name, weight in weights:
        part[name] = weight
        if sum(each.nbytes for each in part.values()) >= _PART_BYTES:
            yield part
            part = {}
    if part:
        yield part
