"""Progress that ranks write and their launcher reads."""

import time

import pytest

from zeroflow.training.pulse import Pulse, PulseReader, PulseWriter


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds by the clock of the process."""
    seconds = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: seconds[0])
    return seconds


def test_newest_pulse_is_read_once(tmp_path, passed):
    file = tmp_path / "alive"
    write, reader = PulseWriter(file), PulseReader(file)
    assert reader.new() is None
    write(Pulse("training", 1, 200))
    passed[0] += 1
    write(Pulse("overfit check", 2, 150, "loss 3.2"))
    assert reader.new() == Pulse("overfit check", 2, 150, "loss 3.2")
    assert reader.new() is None


def test_pulses_of_an_earlier_process_and_broken_ones_are_ignored(tmp_path, passed):
    file = tmp_path / "alive"
    PulseWriter(file)(Pulse("training", 7, 200))
    reader = PulseReader(file)
    assert reader.new() is None
    for content in ("", "[", "[1]", "7", "{}"):
        file.write_text(content)
        assert reader.new() is None
    PulseWriter(file)(Pulse("training", 8, 200))
    assert reader.new() == Pulse("training", 8, 200)


def test_pulses_are_written_at_most_ten_times_a_second_but_the_last_always(tmp_path, passed):
    file = tmp_path / "alive"
    write = PulseWriter(file)
    seen = []
    for step in range(1, 101):
        write(Pulse("training", step, 100))
        seen.append(PulseReader(file)._last)
        passed[0] += 1 / 32
    assert len(set(seen)) == 26, "every fourth step, and the last one"
    assert "100, 100" in seen[-1]
