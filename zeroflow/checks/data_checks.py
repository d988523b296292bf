"""Pre-flight checks of the shards.

To add one, write a function that returns a `Check`, and yield it in `checks`.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from zeroflow import artifacts
from zeroflow.checks.check import Check, on_every_rank
from zeroflow.data.rows import Rows
from zeroflow.data.shards import PartManifest, ShardSet, Split
from zeroflow.data.tokenizer import Tokenizer
from zeroflow.model.llama import ModelConfig

_SAMPLED_PARTS = 3
_SAMPLED_ROWS = 256
_DECODED_ROWS = 16
_MIN_REENCODED = 0.75
"""Fraction of ids that must survive decoding and encoding. The tokenizer's own ids do, except where
a document is cut; ids of another tokenizer rarely do."""


def checks(shards: ShardSet, tokenizer: Tokenizer, model: ModelConfig) -> Iterator[Check]:
    """Yield each check in turn, up to the first failure: later checks depend on earlier ones."""
    files = on_every_rank(checksums(shards))
    yield files
    if not files.passed:
        return
    ids = on_every_rank(token_ids(shards, tokenizer, model))
    yield ids
    if ids.passed and tokenizer.path is not None:  # synthetic ids have no text
        yield on_every_rank(text(Rows(shards, "train"), tokenizer))


def checksums(shards: ShardSet) -> Check:
    """Verify the checksums of a few parts; all parts were verified when built or reused."""
    numbers = np.unique(np.linspace(0, shards.parts - 1, _SAMPLED_PARTS).astype(int)).tolist()
    try:
        parts = (artifacts.verify(shards.part_paths[number]) for number in numbers)
        files = sum(len(PartManifest.model_validate(part).files) for part in parts)
    except artifacts.DamagedArtifact as damage:
        sentence = f"{damage}: run the same command again to set that part aside and rebuild it"
        return Check(name="checksums", passed=False, figure="a part is damaged", sentence=sentence)
    return Check(
        name="checksums",
        passed=True,
        figure=f"{files} files in {len(numbers)} of {shards.parts} parts",
        sentence="Their checksums match; all parts were verified when the shards were built or "
        "reused",
    )


def token_ids(shards: ShardSet, tokenizer: Tokenizer, model: ModelConfig) -> Check:
    """Check that sampled ids are in the vocabulary of tokenizer and model."""
    limit = min(tokenizer.vocab_size, model.vocab_size)
    splits: tuple[Split, ...] = ("train", "validation")
    ids = np.concatenate([_spread(Rows(shards, split), _SAMPLED_ROWS) for split in splits])
    lowest, highest = int(ids.min()), int(ids.max())
    passed = lowest >= 0 and highest < limit
    sentence = f"Found in {len(ids)} sampled rows; the vocabulary has {limit:,} tokens"
    if not passed:
        sentence += (
            f": the rows were made with a tokenizer other than {tokenizer.name} or are damaged; "
            f"remove {shards.path} and run the same command to rebuild them"
        )
    return Check(
        name="token ids", passed=passed, figure=f"{lowest:,} to {highest:,}", sentence=sentence
    )


def text(rows: Rows, tokenizer: Tokenizer) -> Check:
    """Check that decoding sampled ids, and encoding the text again, gives the same ids."""
    backend = tokenizer.load()
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
        sentence += (
            f": {tokenizer.name} did not make the other ids or cannot decode them; look at "
            "`zeroflow data`, and remove the shards if another tokenizer made them"
        )
    figure = f"{share:.1%} of {total:,} ids"
    return Check(name="text", passed=passed, figure=figure, sentence=sentence)


def _spread(rows: Rows, most: int) -> npt.NDArray[np.integer[Any]]:
    """Return at most `most` rows, spread evenly over a split."""
    count = min(most, len(rows))
    return rows[np.linspace(0, len(rows), count, endpoint=False).astype(np.int64)]
