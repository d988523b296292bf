"""The trained model of a run, with its tokenizer and shards."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from zeroflow.data.rows import Rows
from zeroflow.data.shards import SPLITS, ShardSet, Split
from zeroflow.data.tokenizer import Tokenizer, require_copy
from zeroflow.inference.generate import TextGenerator, of_model, remark_on
from zeroflow.model.llama import Llama
from zeroflow.settings import existing
from zeroflow.settings.flags import refused
from zeroflow.training import checkpoint
from zeroflow.training.checkpoint import Which
from zeroflow.training.job import TrainingJob, read_job
from zeroflow.training.sampling import SamplingConfig


@dataclass(frozen=True)
class Trained:
    """A trained model with its tokenizer and rows."""

    run: str
    step: int
    """Step of the checkpoint."""

    model: Llama
    """The model of the checkpoint, on the CPU: `model(ids)` maps (B, T) ids to (B, T, V) logits."""

    tokenizer: Tokenizer
    shards: ShardSet

    @property
    def context(self) -> int:
        """Context length in training, in tokens."""
        return self.shards.row_tokens - 1

    def rows(self, split: Split) -> Rows:
        """Return the rows of a split. `rows[ids]` reads rows, of shape (len(ids), T + 1).

        Raises:
            ValueError: there is no such split.
        """
        if split not in SPLITS:
            raise ValueError(f"there is no split {split!r}: use {' or '.join(SPLITS)}")
        return Rows(self.shards, split)

    @cached_property
    def generator(self) -> TextGenerator:
        """The model and its tokenizer for texts in pieces; it shares the model's weights."""
        return of_model(self.model, self.tokenizer, context=self.context)

    def generate(self, prompt: str = "", **settings: Any) -> str:
        """Return `prompt` and its continuation; token ids if the model was trained on ids.

        Args:
            settings: fields of `SamplingConfig`: tokens, temperature, top_k, top_p, seed.

        Raises:
            ValueError: a setting is wrong, or the model was trained on ids and there is a prompt.
        """
        if not isinstance(prompt, str):
            raise ValueError(f"a prompt is a text, not {prompt!r}")
        try:
            config = SamplingConfig.model_validate(settings)
        except ValidationError as error:
            raise refused(SamplingConfig, error) from None
        remark_on(prompt)
        return prompt + self.generator.generate(prompt, config)


def load(cache: Path, name: str, which: Which = "newest") -> Trained:
    """Load a checkpoint of run `name`.

    Raises:
        ValueError: there is no such run, or it has no such checkpoint.
    """
    settings = existing.load(cache, name)
    path = checkpoint.find(settings.folder.checkpoints, which)
    found = job(cache, name)
    checkpoint.require_same(path, found.model, tokenizer=found.tokenizer.fingerprint)
    model = checkpoint.load_model(path)
    return Trained(name, checkpoint.step_of(path), model, found.tokenizer, found.shards)


def job(cache: Path, name: str) -> TrainingJob:
    """Load the training job of run `name`, with paths in `cache`.

    Raises:
        ValueError: there is no such run, it has no shards yet, or its tokenizer is missing.
    """
    settings = existing.load(cache, name)
    if not settings.folder.job.exists():
        raise ValueError(f"run {name} has no data yet in {settings.run_dir}")
    found = read_job(settings.folder)
    require_copy(found.tokenizer)
    return found
