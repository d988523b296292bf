"""Signals whose exception a library drops, in a process with handlers of its own."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
from pydantic import BaseModel, model_serializer

from zeroflow.training import interruption
from zeroflow.training.interruption import insistent


class Settings(BaseModel):
    """Has a serializer in Python, as Prefect's settings do."""

    @model_serializer
    def shown(self) -> dict[str, int]:
        signal.raise_signal(signal.SIGINT)
        return {}


@pytest.fixture(autouse=True)
def handler(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(interruption, "_LOOK_SECONDS", 0.01)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_signal_that_a_library_has_dropped_is_repeated():
    with pytest.raises(KeyboardInterrupt), insistent(signal.SIGINT) as stops:
        with suppress(Exception):  # an ordinary error, although Ctrl-C was pressed
            Settings().model_dump()
        assert stops.received == signal.SIGINT
        while True:
            time.sleep(0.01)


def test_handled_signal_is_not_repeated():
    arrived = []
    with insistent(signal.SIGINT) as stops:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as stop:
            arrived.append(stop)
            time.sleep(0.1)  # longer than several polls
    assert arrived and stops.over.is_set()


def test_nothing_is_repeated_after_the_block():
    with insistent(signal.SIGINT), suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    time.sleep(0.1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ignored_signals_stay_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with insistent(signal.SIGINT) as stops:
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert stops.received is None
