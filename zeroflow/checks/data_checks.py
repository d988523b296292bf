"""Pre-flight checks of the shards.

To add one, write a function that returns a `Check`, and yield it in `checks`.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zeroflow import artifacts
from zeroflow.checks.check import Check, on_every_rank
from zeroflow.data import encoding
from zeroflow.data.returned_text import (
    MOST_LOST,
    MOST_UNKNOWN,
    WORTH_A_WARNING,
    ReturnedText,
    mean_lost_share,
)
from zeroflow.data.rows import Rows
from zeroflow.data.shards import PartManifest, ShardSet, Split
from zeroflow.data.tokenizer import Tokenizer
from zeroflow.model.llama import ModelConfig
from zeroflow.units import count

# Sample sizes, with which the checks take a second or two
_SAMPLED_PARTS = 3
_SAMPLED_MANIFESTS = 100
_SAMPLED_ROWS = 256
_DECODED_ROWS = 16

_MIN_REENCODED = 0.75
"""Fraction of ids that must be the same after decoding and encoding. A tokenizer's own ids are,
except where a document is cut; ids of another tokenizer rarely are."""

_LOSSY = 0.05
"""Fraction of the text that a tokenizer lost when it made the ids, from which on it is the cause if
they change. Lower-casing loses about 4 %, and the ids return nevertheless."""


def checks(shards: ShardSet, tokenizer: Tokenizer, model: ModelConfig) -> Iterator[Check]:
    """Yield each check in turn, up to the first failure: later checks depend on earlier ones."""
    files = on_every_rank(checksums(shards))
    yield files
    if not files.passed:
        return
    ids = on_every_rank(token_ids(shards, tokenizer, model))
    yield ids
    if ids.passed and tokenizer.path is not None:  # synthetic ids have no text
        yield on_every_rank(text(shards, tokenizer))
        yield on_every_rank(lost_text(shards, tokenizer))


def checksums(shards: ShardSet) -> Check:
    """Verify the checksums of a few parts; all were verified when built or first reused."""
    paths = _some_parts(shards, _SAMPLED_PARTS)
    try:
        parts = map(artifacts.verify, paths)
        files = sum(len(PartManifest.model_validate(part).files) for part in parts)
    except artifacts.DamagedArtifact as damage:
        sentence = f"{damage}: run the same command again to set that part aside and rebuild it"
        return Check(
            name="checksums",
            passed=False,
            may_pass_again=True,
            figure="a part is damaged",
            sentence=sentence,
        )
    return Check(
        name="checksums",
        passed=True,
        figure=f"{count(files, 'file')} in {len(paths)} of {count(shards.parts, 'part')}",
        sentence="Their checksums match; all parts were verified when they were built or first "
        "reused",
    )


def token_ids(shards: ShardSet, tokenizer: Tokenizer, model: ModelConfig) -> Check:
    """Check that sampled ids are in the vocabularies of tokenizer and model."""
    limit = min(tokenizer.vocab_size, model.vocab_size)
    splits: tuple[Split, ...] = ("train", "validation")
    ids = np.concatenate([_spread(Rows(shards, split), _SAMPLED_ROWS) for split in splits])
    lowest, highest = int(ids.min()), int(ids.max())
    passed = lowest >= 0 and highest < limit
    sentence = f"Found in {count(len(ids), 'sampled row')}; the vocabulary has {limit:,} tokens"
    if not passed:
        sentence += (
            f": the rows were made with a tokenizer other than {tokenizer.name} or are damaged; "
            f"remove {shards.path} and run the same command to rebuild them"
        )
    return Check(
        name="token ids", passed=passed, figure=f"{lowest:,} to {highest:,}", sentence=sentence
    )


def text(shards: ShardSet, tokenizer: Tokenizer) -> Check:
    """Check that decoding sampled ids, and encoding the text again, gives the same ids."""
    backend, rows = tokenizer.load(), Rows(shards, "train")
    returned = total = 0
    beginning = ""
    for row in _spread(rows, _DECODED_ROWS):
        for document in np.split(row, np.flatnonzero(row == rows.end_of_text) + 1):
            ids = document[document != rows.end_of_text].tolist()
            words = backend.decode(ids, skip_special_tokens=False)
            again = backend.encode(words, add_special_tokens=False).ids
            returned += (Counter(ids) & Counter(again)).total()
            total += len(ids)
            beginning = beginning or " ".join(words.split())[:40]
    share = returned / max(1, total)
    passed = share >= _MIN_REENCODED
    sentence = f"They survive decoding and encoding; the text begins with {beginning!r}"
    if not passed:
        sentence += _why_other_ids(shards, tokenizer)
    figure = f"{share:.1%} of {count(total, 'id')}"
    return Check(name="text", passed=passed, figure=figure, sentence=sentence)


def _why_other_ids(shards: ShardSet, tokenizer: Tokenizer) -> str:
    """Return the cause of ids that change, as the end of a sentence."""
    samples = _returned(shards)
    if (lost := mean_lost_share(samples)) >= _LOSSY:
        return (
            f". When {tokenizer.name} made the ids, {min(lost, 1):.0%} of the characters were "
            "lost or changed: use another tokenizer, such as --tokenizer-name train"
        )
    cause = "did not make the other ids" if samples else "did not make the other ids or loses text"
    return (
        f": {tokenizer.name} {cause}; look at `zeroflow data`, and remove the shards if another "
        "tokenizer made them"
    )


def _returned(shards: ShardSet) -> list[ReturnedText]:
    """Return the samples of lost text of some parts; empty if an earlier version built them."""
    manifests = map(PartManifest.read, _some_parts(shards, _SAMPLED_MANIFESTS))
    return [manifest.returned for manifest in manifests if manifest.returned]


def lost_text(shards: ShardSet, tokenizer: Tokenizer) -> Check:
    """Check that few tokens are unknown, and that little text is lost by encoding."""
    rows = _spread(Rows(shards, "train"), _SAMPLED_ROWS)
    ids = rows[rows != shards.end_of_text]
    unknown_id = encoding.unknown_id(tokenizer.load())
    unknown = 0.0 if unknown_id is None else float((ids == unknown_id).mean())
    samples = _returned(shards)
    lost, characters = mean_lost_share(samples), sum(sample.characters for sample in samples)
    figure = f"{unknown:.2%} of {count(ids.size, 'token')} unknown"
    if samples:
        figure += f", {lost:.2%} of {characters:,} sampled characters lost"
        sentence = (
            "Lost characters are missing or changed after encoding and decoding; the limits are "
            f"{MOST_UNKNOWN:.0%} unknown and {MOST_LOST:.0%} lost"
        )
    else:
        sentence = (
            f"The limit is {MOST_UNKNOWN:.0%}; how much text is lost is not known, because an "
            "earlier version built the shards"
        )
    if warning := max(unknown, lost) >= WORTH_A_WARNING:
        sentence += (
            f". The model never sees what {tokenizer.name} leaves out; if the text needs it, use "
            "another tokenizer, such as --tokenizer-name train"
        )
    passed = unknown < MOST_UNKNOWN and lost < MOST_LOST
    return Check(name="lost text", passed=passed, warning=warning, figure=figure, sentence=sentence)


def _some_parts(shards: ShardSet, most: int) -> list[Path]:
    """Return at most `most` parts, spread evenly from the first to the last."""
    return [shards.part(number) for number in shards.some_parts(most)]


def _spread(rows: Rows, most: int) -> npt.NDArray[np.integer[Any]]:
    """Return at most `most` rows, spread evenly over a split."""
    count = min(most, len(rows))
    return rows[np.linspace(0, len(rows), count, endpoint=False).astype(np.int64)]
