import io
import json
import math
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from zeroflow.records import JsonLines, Record, omitted


class Step(Record):
    event: Literal["step"] = "step"
    n: int
    loss: float = 0.0
    text: str = ""
    rate: float | None = omitted()


class End(Record):
    event: Literal["end"] = "end"


LINES: JsonLines[Step | End] = JsonLines(Annotated[Step | End, Field(discriminator="event")])

FLOATS = st.floats(width=64)
STEPS = st.builds(Step, n=st.integers(), loss=FLOATS, text=st.text(max_size=5), rate=FLOATS)
RECORDS = st.lists(st.builds(End) | STEPS, min_size=1, max_size=6)


def same(ours: list[Step | End], theirs: list[Step | End]) -> bool:
    """Equality by bits: a NaN is like another."""
    return [repr(record) for record in ours] == [repr(record) for record in theirs]


@given(records=RECORDS, cuts=st.lists(st.integers(0, 700), max_size=8))
def test_follower_sees_every_record_once_wherever_the_writer_pauses(
    tmp_path_factory, records, cuts
):
    written = tmp_path_factory.mktemp("written") / "events.jsonl"
    for record in records:
        LINES.append(written, record)
    content = written.read_bytes()

    growing = written.with_name("growing.jsonl")
    tail, seen = LINES.follow(growing), []
    assert tail.new_records() == []
    for cut in [*sorted(cuts), len(content)]:
        growing.write_bytes(content[:cut])
        seen += tail.new_records()
        complete = content[:cut].count(b"\n")
        assert same(seen, records[:complete]), "and none before its line is complete"
    assert same(seen, records)
    assert same(LINES.read(growing), records)


def test_follower_can_start_at_the_end(tmp_path):
    path = tmp_path / "events.jsonl"
    assert LINES.follow(path, from_end=True).new_records() == []
    LINES.append(path, Step(n=1))
    tail = LINES.follow(path, from_end=True)
    LINES.append(path, Step(n=2))
    assert tail.new_records() == [Step(n=2)]
    assert tail.new_records() == []


def test_half_written_last_line_is_not_a_record(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "step", "n": 1}\n{"event": "end"}\n{"event": ')
    assert LINES.read(path) == LINES.readable(path) == [Step(n=1), End()]
    assert LINES.read(Path("nowhere.jsonl")) == LINES.readable(Path("nowhere.jsonl")) == []


def test_only_wanted_lines_are_kept_as_they_are_and_nothing_half_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first, second = '{"event": "step", "n": 1, "later": "é"}', '{"event": "step", "n": 2}'
    path.write_text(f"{first}\n{second}\n{first}\n" + '{"st')
    LINES.keep(path, lambda record: isinstance(record, Step) and record.n == 1)
    assert path.read_text(encoding="utf-8") == f"{first}\n{first}\n"
    LINES.keep(tmp_path / "none.jsonl", lambda record: True)
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_new_line_replaces_a_half_written_one(tmp_path):
    path = tmp_path / "events.jsonl"
    for half in (b'{"event": ', b'{"event": "end"}\n{"text": "\xc3'):
        path.write_bytes(half)
        before = LINES.read(path)
        LINES.append(path, Step(n=2))
        assert LINES.read(path) == [*before, Step(n=2)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_error_of_a_full_disk_names_the_file(tmp_path):
    full = tmp_path / "events.jsonl"
    full.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"cannot add to .*events.jsonl: No space left"):
        LINES.append(full, End())


def test_line_that_fits_only_in_part_is_removed(tmp_path, monkeypatch):
    path = tmp_path / "events.jsonl"
    LINES.append(path, End())
    before = path.read_bytes()

    class AlmostFull(io.FileIO):
        def write(self, content):
            return super().write(content[:3])

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode, buffering: AlmostFull(path, "a+"))
        with pytest.raises(OSError, match="the disk is full"):
            LINES.append(path, Step(n=2))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"event": "step", "n": {"n": 2}', "Invalid JSON"),
        ('{"event": "step", "n": "many"}', "step.n: must be a whole number"),
        ('{"event": "other"}', "'other' is not one of 'step', 'end'"),
        ("[]", "must be a group of named values"),
    ],
)
def test_line_that_cannot_be_read_is_named_with_its_file_and_skipped_on_demand(
    line, reason, tmp_path
):
    path = tmp_path / "ledger.jsonl"
    path.write_text(f'{{"event": "end"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"ledger.jsonl has a line that cannot be read: ") as error:
        LINES.read(path)
    assert reason in str(error.value) and line[:20] in str(error.value)
    assert "\n" not in str(error.value)
    assert LINES.readable(path) == [End()]
    assert LINES.readable(path, most_bytes=10**6) == [End()]


class Figures(Record):
    FORMAT: ClassVar[int] = 2
    loss: float
    inner: Step | None = None


def test_file_has_the_format_of_its_class_and_non_finite_numbers_stay(tmp_path):
    path = tmp_path / "report.json"
    for loss in (math.nan, -math.inf, 1e-320, 0.1):
        figures = Figures(loss=loss, inner=Step(n=1, loss=loss))
        figures.write(path)
        assert repr(Figures.read(path)) == repr(figures)
    assert json.loads(path.read_text()) == {
        "format": 2,
        "loss": 0.1,
        "inner": {"event": "step", "n": 1, "loss": 0.1, "text": ""},
    }
    assert Figures.read_if_exists(path) is not None
    assert Figures.read_if_exists(tmp_path / "none.json") is None


def test_file_of_an_older_format_or_with_more_fields_is_read(tmp_path):
    path = tmp_path / "report.json"
    for content in ('{"loss": 1.0}', '{"format": 1, "loss": 1.0}', '{"loss": 1.0, "later": 2}'):
        path.write_text(content)
        assert Figures.read(path) == Figures(loss=1.0)


def test_newer_format_is_refused_with_what_to_do(tmp_path):
    file, lines = tmp_path / "report.json", tmp_path / "events.jsonl"
    file.write_text('{"format": 3, "renamed": 1.0}')
    with pytest.raises(ValueError, match=r"report.json cannot be read: .*format is 3.* up to 2"):
        Figures.read(file)
    lines.write_text('{"format": 2, "event": "step", "n": 1}\n')
    with pytest.raises(ValueError, match=r"events.jsonl .* up to 1: use the version that wrote it"):
        LINES.read(lines)


@pytest.mark.parametrize("content", ['{"loss":', "[]", '{"loss": "low"}', '{"other": 1}'])
def test_file_that_is_something_else_is_named(content, tmp_path):
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"report.json") as error:
        Figures.read(path)
    assert "\n" not in str(error.value)


def test_file_that_is_replaced_is_read_from_its_beginning(tmp_path):
    path = tmp_path / "lines.jsonl"
    for n in (1, 2, 3):
        LINES.append(path, Step(n=n))
    tail = LINES.follow(path)
    assert len(tail.new_records()) == 3
    LINES.keep(path, lambda step: step.n == 1)
    for n in (2, 3, 4):
        LINES.append(path, Step(n=n))
    assert tail.new_records() == [Step(n=n) for n in (1, 2, 3, 4)]
