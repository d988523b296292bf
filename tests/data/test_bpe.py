"""Training of a tokenizer: its interruption. What it learns is tested with the tokenizers."""

import signal
import threading
from collections.abc import Iterator

import pytest

from zeroflow.data.bpe import train_bpe
from zeroflow.training.interruption import signal_main_thread


def test_training_is_interrupted_although_it_is_compiled_code():
    reading, done = threading.Event(), threading.Event()

    def texts() -> Iterator[str]:
        yield "a text"
        # Compiled code does not look at signals either
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            signal_main_thread(signal.SIGINT)
            done.wait(5)
        finally:
            reading.set()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        yield "another text"

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train_bpe(texts(), 300)
        assert not reading.is_set(), "it ended before the text was read"
    finally:
        done.set()
        signal.signal(signal.SIGINT, before)


def test_error_of_the_text_ends_the_training():
    def texts() -> Iterator[str]:
        yield "a text"
        raise ValueError("line 7 is not valid JSON")

    with pytest.raises(ValueError, match="line 7"):
        train_bpe(texts(), 300)
