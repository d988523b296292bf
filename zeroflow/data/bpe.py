"""Training of a byte-level BPE tokenizer with the structure of Llama 3's."""

from collections.abc import Iterator
from itertools import takewhile
from threading import Event

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from zeroflow.data.time_limit import interruptible

END_OF_TEXT = "<|end_of_text|>"

# The pre-tokenizer of Llama 3: https://github.com/meta-llama/llama3, tokenizer.py
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_bpe(texts: Iterator[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Return a tokenizer of at most `vocab_size` tokens; fewer if the text has too few pairs.

    Raises:
        ValueError: there is no text.
    """
    if (first := next(texts, None)) is None:
        raise ValueError("there is no text to train a tokenizer on: name files with text")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    ended = Event()

    def read() -> Iterator[str]:
        yield first
        yield from takewhile(lambda text: not ended.is_set(), texts)

    try:
        interruptible(lambda: tokenizer.train_from_iterator(read(), trainer))
    finally:
        ended.set()
    return tokenizer
