"""Reasons why a stage ran although a similar result exists: the settings that differ."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from zeroflow.artifacts import DAMAGED, JsonObject
from zeroflow.config import flag
from zeroflow.records import Record, omitted
from zeroflow.units import count

Fields = Mapping[str, Any]
"""Inputs that a result depends on, by readable names; settings are named by their flags. If a
value is itself a mapping, its differing entries are named."""

Identity = JsonObject
"""`Fields` of a checked object, as stored."""

SAME = "it exists and verifies, and has the same settings and source"
PASSED = "the same check passed before"
TRAINED = "the run is already trained to its last step"
NOTHING = "none exists yet"
NOTHING_OF_TEXT = "none exists yet for this text"
FIRST = "the run has no earlier one"
"""Reasons of stages that were reused, and of stages that ran for the first time."""

_NAMED = 4
"""Number of differences that are named; the others are counted."""

_SHOWN = 50
"""Maximum number of characters shown of a value."""


class StageResult(Record):
    """Result of a stage. Whether it was reused depends on the command and is not stored."""

    reused: bool = Field(False, exclude=True)
    """True if nothing had to be done."""

    why: str = Field("", exclude=True)
    """Why the stage was reused or ran."""


class CheckResult(StageResult):
    """Result of a check of a run, which the next command may reuse."""

    passed: bool

    job: str = ""
    """Fingerprint of the checked inputs."""

    identity: Identity | None = omitted()
    """Checked inputs, for comparison with another check; None in files of older versions."""


class Difference(NamedTuple):
    field: str
    wanted: Any
    found: Any


def damaged(path: Path) -> str:
    return f"{path.name} was damaged and is set aside"


def existing(root: Path, read: Callable[[Path], Fields], *, but: Path) -> dict[str, Fields | None]:
    """Read the fields of the folders in `root`, newest first.

    Args:
        read: reads the fields of a folder.
        but: folder to leave out.

    Returns:
        Fields by folder name; None if they cannot be read, as in folders of an older version.
    """
    folders = [path for path in root.glob("[!.]*") if path.is_dir() and path.name != but.name]
    folders = [path for path in folders if DAMAGED not in path.name]
    return {
        path.name: _readable(read, path)
        for path in sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)
    }


def nearest(wanted: Fields, there: Mapping[str, Fields | None]) -> str:
    """Return why none of `there` can be reused: the differences of the most similar one."""
    known = {name: fields for name, fields in there.items() if fields is not None}
    if not there:
        return NOTHING
    if known and not any(_same_text(wanted, fields) for fields in known.values()):
        return NOTHING_OF_TEXT
    if not known:
        return f"the settings of {_some(list(there))} are unknown: no record can be read"
    name = min(
        known,
        key=lambda name: (
            not _same_text(wanted, known[name]),
            _distance(wanted, known[name]),
        ),
    )
    subject = name if len(there) == 1 else f"the most similar of {len(there)}, {name},"
    return f"{subject} {changes(wanted, known[name])}"


def by_flag(fields: Fields, settings: Iterable[str]) -> Fields:
    """Return `fields`; those with the name of one of the `settings` are named by its flag."""
    names = {*settings}
    return {flag(name) if name in names else name: value for name, value in fields.items()}


def since(
    wanted: Fields, before: CheckResult | None, named: Callable[[str], str] = lambda field: field
) -> str:
    """Return why the earlier check of a run cannot be reused."""
    if before is None:
        return FIRST
    if before.identity is None:
        return "the inputs of the earlier check are unknown: an older version did not record them"
    if not before.passed and flat(wanted) == flat(before.identity):
        return "the earlier one failed"
    now, then = (
        {named(field): value for field, value in flat(fields).items()}
        for fields in (wanted, before.identity)
    )
    return f"the earlier one {changes(now, then)}"


def changes(wanted: Fields, found: Fields) -> str:
    """Return the differences between the fields `found` and the fields `wanted`, as text."""
    different = list(_differences(wanted, found))
    if not different:
        return "differs in its name only"
    named = [f"{d.field} {_shown(d.found)} instead of {_shown(d.wanted)}" for d in different]
    if (more := len(named) - _NAMED) > 0:
        named = [*named[:_NAMED], count(more, "more difference")]
    return f"has {', '.join(named)}"


def flat(fields: Fields, prefix: str = "") -> Fields:
    """Return all values of nested `fields` by their full names, such as training.seq_len."""
    found: dict[str, object] = {}
    for name, value in fields.items():
        deeper = isinstance(value, Mapping)
        found |= flat(value, f"{prefix}{name}.") if deeper else {prefix + name: value}
    return found


def _readable(read: Callable[[Path], Fields], path: Path) -> Fields | None:
    try:
        return read(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _same_text(wanted: Fields, found: Fields) -> bool:
    """Return False if the text of `wanted` comes from another source, or from other files.

    Files of the same name are compared, as they may be versions of one text.
    """
    if "source" not in wanted:  # it depends on no text
        return True
    if wanted["source"] != found.get("source"):
        return False
    files, others = wanted.get("file"), found.get("file")
    if not (isinstance(files, Mapping) and isinstance(others, Mapping) and files and others):
        return True
    return not files.keys().isdisjoint(others)


def _distance(wanted: Fields, found: Fields) -> int:
    return sum(_value(wanted, name) != _value(found, name) for name in {**wanted, **found})


def _differences(wanted: Fields, found: Fields) -> Iterator[Difference]:
    for name in {**wanted, **found}:
        here, there = _value(wanted, name), _value(found, name)
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            for inner in _differences(here, there):
                yield inner._replace(field=f"{name} {inner.field}")
        elif here != there:
            yield Difference(name, here, there)


def _value(fields: Fields, name: str) -> Any:
    """Return the value of a field; None if it is missing, such as a setting of another source."""
    value = fields.get(name)
    return None if value == {} else value


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    if isinstance(value, Mapping):
        text = count(len(value), "entry", "entries")
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
