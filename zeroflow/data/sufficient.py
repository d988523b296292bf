"""Check that a small corpus has tokens to train on and to validate on, before anything is built."""

from collections.abc import Callable, Iterator

import tokenizers

from zeroflow.data.corpus import CorpusConfig
from zeroflow.data.documents import Tally
from zeroflow.data.holdout import EVERYTHING, NOTHING, Divided, Holdout, choose_holdout
from zeroflow.data.shards import SPLITS, Layout, Split
from zeroflow.data.slices import all_slices, local_text_bytes, read_slice

MOST_BYTES = 4_000_000
"""Maximum size of a corpus that is checked; it is read in less than a second."""

_BEGINNING = 1000
"""Characters of each text that are encoded first, as they usually have tokens."""


def too_small(text_bytes: int, split: Split) -> ValueError:
    """Return the error for a corpus without a row for `split`."""
    return ValueError(
        f"the corpus is too small: of its {text_bytes:,} bytes of text, none is left for {split}: "
        "add text, change --validation-fraction, or set text for validation with --validation-path"
    )


def require_both_splits(
    corpus: CorpusConfig, layout: Layout, load: Callable[[], tokenizers.Tokenizer] | None
) -> None:
    """Check a resolved corpus of at most `MOST_BYTES` of local text; a larger one is not read.

    Args:
        load: loads the tokenizer; None if it is not known yet.

    Raises:
        ValueError: the text gives no tokens for one of the splits, or a file cannot be read.
    """
    if not corpus.is_text or local_text_bytes(corpus) > MOST_BYTES:
        return
    tokenizer = load and load()
    missing, size = list[Split](SPLITS), 0
    for batch, held_out, _ in _divided(corpus, layout):
        size += int(batch.text_bytes.sum())
        for split in [*missing]:
            is_held_out = split == "validation"
            pairs = zip(batch.texts, held_out, strict=True)
            texts = [text for text, out in pairs if out == is_held_out]
            if _has_tokens(texts, tokenizer):
                missing.remove(split)
        if not missing:
            return
    raise too_small(size, missing[0])


def _divided(corpus: CorpusConfig, layout: Layout) -> Iterator[Divided]:
    """Yield all documents of a corpus and of its text for validation."""
    if validation := corpus.validation:
        yield from _all(validation, EVERYTHING)
        yield from _all(corpus, NOTHING)
        return
    rule = choose_holdout(corpus, fraction=layout.validation_fraction, row_tokens=layout.row_tokens)
    yield from _all(corpus, rule)


def _all(corpus: CorpusConfig, rule: Holdout) -> Iterator[Divided]:
    tally = Tally()
    for piece in all_slices(corpus):
        yield from map(rule.apply, read_slice(corpus, piece, tally))


def _has_tokens(texts: list[str], tokenizer: tokenizers.Tokenizer | None) -> bool:
    if tokenizer is None:
        return bool(texts)
    for limit in (_BEGINNING, None):
        encoded = tokenizer.encode_batch_fast([t[:limit] for t in texts], add_special_tokens=False)
        if any(len(one.ids) for one in encoded):
            return True
    return False
