"""Signs of life of ranks."""

import os
import time
from pathlib import Path

import pytest

from zeroflow.training.following import Heartbeat


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that have passed, by the clock that cannot be set."""
    seconds = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: seconds[0])
    return seconds


@pytest.mark.parametrize("days", [0, 1000, -1000])
def test_touched_file_is_a_sign_of_life_with_any_clock(tmp_path, passed, days):
    alive = tmp_path / "alive"
    heartbeat = Heartbeat(alive)
    for number in range(3):
        passed[0] += 50
        assert heartbeat.seconds_since_last() == 50
        touch(alive, time.time() + 86_400 * days * number)
        assert heartbeat.seconds_since_last() == 0


@pytest.mark.parametrize("days", [0, 1000, -1000])
def test_untouched_file_is_not_a_sign_of_life(tmp_path, passed, days):
    alive = tmp_path / "alive"
    touch(alive, time.time() + 86_400 * days)
    heartbeat = Heartbeat(alive)
    assert heartbeat.seconds_since_last() == 0
    passed[0] += 500
    assert heartbeat.seconds_since_last() == 500


def touch(file: Path, when: float) -> None:
    file.touch()
    os.utime(file, (when, when))
