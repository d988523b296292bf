import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeroflow import records

LINES = st.lists(
    st.dictionaries(st.text(max_size=3), st.text(max_size=5) | st.integers() | st.none()),
    min_size=1,
    max_size=6,
)


@given(lines=LINES, cuts=st.lists(st.integers(0, 400), max_size=8))
def test_follower_sees_every_line_once_wherever_the_writer_pauses(tmp_path_factory, lines, cuts):
    written = tmp_path_factory.mktemp("written") / "events.jsonl"
    for line in lines:
        records.append(written, line)
    content = written.read_bytes()

    growing = written.with_name("growing.jsonl")
    tail, seen = records.Tail(growing), []
    assert tail.new_lines() == []
    for cut in [*sorted(cuts), len(content)]:
        growing.write_bytes(content[:cut])
        seen += tail.new_lines()
        complete = content[:cut].count(b"\n")
        assert seen == lines[:complete], "and none before it is complete"
    assert seen == lines
    assert records.read(growing) == lines


def test_follower_may_begin_in_mid_file(tmp_path):
    path = tmp_path / "events.jsonl"
    assert records.size(path) == 0
    records.append(path, {"n": 1})
    tail = records.Tail(path, records.size(path))
    records.append(path, {"n": 2})
    assert tail.new_lines() == [{"n": 2}]
    assert tail.new_lines() == []


def test_half_written_last_line_is_no_line(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"n": 1}\n{"n": 2}\n{"n": ')
    assert records.read(path) == [{"n": 1}, {"n": 2}]
    assert records.read(Path("nowhere.jsonl")) == []


def test_only_wanted_lines_are_kept_and_nothing_half_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "text": "é"}\n{"step": 2}\n{"step": 1}\n{"st')
    records.keep(path, lambda line: line["step"] == 1)
    kept = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert kept == [{"step": 1, "text": "é"}, {"step": 1}]
    assert path.read_text().endswith("\n")
    records.keep(tmp_path / "none.jsonl", lambda line: True)
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_line_takes_the_place_of_a_half_written_one(tmp_path):
    path = tmp_path / "events.jsonl"
    for half in (b'{"n": ', b'{"n": 1}\n{"text": "\xc3'):
        path.write_bytes(half)
        before = records.read(path)
        records.append(path, {"n": 2})
        assert records.read(path) == [*before, {"n": 2}]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk_is_told_with_the_file(tmp_path):
    full = tmp_path / "events.jsonl"
    full.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"events.jsonl cannot be added to: No space left"):
        records.append(full, {"n": 1})


def test_line_that_fits_in_part_only_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "events.jsonl"
    records.append(path, {"n": 1})

    class AlmostFull(io.FileIO):
        def write(self, content):
            return super().write(content[:3])

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode, buffering: AlmostFull(path, "a+"))
        with pytest.raises(OSError, match="the disk is full"):
            records.append(path, {"n": 2})
    assert path.read_bytes() == b'{"n": 1}\n'


def test_line_that_was_changed_is_told_with_its_file(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"n": 1}\n{"n": {"n": 2}\n')
    with pytest.raises(ValueError, match=r"ledger.jsonl has a line that is no JSON .*'{\"n\": {"):
        records.read(path)
