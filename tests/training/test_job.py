"""Whether a training lives is told by changes, not by times: the clock may be set meanwhile."""

import os
import time
from pathlib import Path

import pytest

from zeroflow.training import events, job


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that have passed, by the clock that nobody can set."""
    seconds = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: seconds[0])
    return seconds


@pytest.mark.parametrize("days", [0, 1000, -1000])
def test_file_that_is_touched_is_a_sign_of_life_whatever_the_clock_says(tmp_path, passed, days):
    alive = tmp_path / events.ALIVE
    signs = job._SignsOfLife(tmp_path)
    for number in range(3):
        passed[0] += 50
        assert signs.seconds_since_last() == 50
        touch(alive, time.time() + 86_400 * days * number)
        assert signs.seconds_since_last() == 0


@pytest.mark.parametrize("days", [0, 1000, -1000])
def test_file_that_is_not_touched_is_none(tmp_path, passed, days):
    touch(tmp_path / events.ALIVE, time.time() + 86_400 * days)
    signs = job._SignsOfLife(tmp_path)
    assert signs.seconds_since_last() == 0
    passed[0] += 500
    assert signs.seconds_since_last() == 500


def touch(file: Path, when: float) -> None:
    file.touch()
    os.utime(file, (when, when))


def test_compiled_code_is_kept_with_the_cache_unless_the_user_says_where(monkeypatch):
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    environment = job._environment(Path("cache/compile"))
    assert environment["TRITON_CACHE_DIR"] == str(Path("cache/compile/triton"))
    assert environment["TORCHINDUCTOR_CACHE_DIR"] == "mine"
    assert "TRITON_CACHE_DIR" not in job._environment(None)
