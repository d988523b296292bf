"""TODO docstring."""

from pathlib import Path
from typing import NamedTuple

from zeroflow import artifacts
from zeroflow.data.tokenizer import Tokenizer
from zeroflow.model.llama import Llama
from zeroflow.run_folder import Cache
from zeroflow.settings import settle
from zeroflow.training import checkpoint
from zeroflow.training.job import TrainingJob


class Trained(NamedTuple):
    model: Llama
    """On the CPU, of the newest checkpoint."""

    tokenizer: Tokenizer
    context: int
    """Tokens it was trained on at once."""


def load(cache: Path, name: str) -> Trained:
    """The model of run `name` with its tokenizer.

    Raises:
        ValueError: there is no such run, or it has no checkpoint yet.
    """
    settings = settle.load(cache, name)
    newest = checkpoint.latest(settings.folder.checkpoints)
    if newest is None:
        raise ValueError(f"run {name} has no checkpoint yet in {settings.run_dir}")
    context = settings.shard_config.seq_len
    return Trained(checkpoint.load_model(newest), job(cache, name).tokenizer, context)


def job(cache: Path, name: str) -> TrainingJob:
    """What the training of run `name` was given.

    Raises:
        ValueError: there is no such run, or it has not come as far as that.
    """
    settings = settle.load(cache, name)
    file = settings.folder.job
    if not file.exists():
        raise ValueError(f"run {name} has no data yet in {settings.run_dir}")
    found = TrainingJob.model_validate(artifacts.read_json(file))
    # The cache may have been moved since
    tokenizer = found.tokenizer
    if tokenizer.path is not None:
        tokenizer = tokenizer.replace(path=Cache(cache).tokenizers / tokenizer.path.name)
    shards = found.shards.replace(path=Cache(cache).shards / found.shards.path.name)
    return found.replace(run_dir=settings.run_dir, tokenizer=tokenizer, shards=shards)
