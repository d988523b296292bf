"""Remarks about settings that are allowed, but have no effect or an unexpected one."""

from collections.abc import Iterator

from zeroflow.config import flag
from zeroflow.data.tokenizer import SYNTHETIC_TOKENIZER, TRAINED_TOKENIZER, TokenizerConfig
from zeroflow.settings import defaults
from zeroflow.settings.settled import Settled
from zeroflow.units import count


def remarks(run: Settled) -> tuple[str, ...]:
    """Return a sentence about each such kind of settings of a run."""
    return (*_vocabulary(run), *_intervals(run))


def _vocabulary(run: Settled) -> Iterator[str]:
    """Yield a sentence about --vocab-size if `auto` has chosen a tokenizer with its own size."""
    name, asked = run.tokenizer.tokenizer_name, run.tokenizer.vocab_size
    default = TokenizerConfig.model_fields["vocab_size"].default
    if asked == default or name in (TRAINED_TOKENIZER, SYNTHETIC_TOKENIZER):
        return
    yield (
        f"--vocab-size {asked} has no effect, because {name} has its own vocabulary: "
        "--tokenizer-name train trains one of this size"
    )


_IF_LONGER = {
    "checkpoint_every": "saved are only the last step and those with the lowest validation loss",
    "validate_every": "the model is validated only at the beginning and the end",
    "log_interval": "training losses are logged only at the first and the last step",
    "keep_every": "no further checkpoints are kept",
}
"""Consequence of an interval that is longer than the run."""


def _intervals(run: Settled) -> Iterator[str]:
    """Yield a sentence about requested intervals that are longer than the run."""
    training, gpu = run.training, run.device == "cuda"
    steps = training.max_steps
    usual = {
        "validate_every": defaults.validate_every(steps, gpu=gpu),
        "log_interval": defaults.log_interval(gpu=gpu),
    }
    found = [
        f"{flag(name)} {interval} ({consequence})"
        for name, consequence in _IF_LONGER.items()
        if (interval := getattr(training, name) or 0) > steps and interval != usual.get(name)
    ]
    if found:
        yield f"longer than the run of {count(steps, 'step')}: {', '.join(found)}"
