"""Why a stage runs although something like its result is there: what they depend on, compared."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, JsonValue

from zeroflow.artifacts import DAMAGED
from zeroflow.records import Record, omitted

Fields = Mapping[str, Any]
"""What a result depends on, by names that a person knows. A value that is such a mapping itself is
one field, of which the entries that differ are named."""

Identity = dict[str, JsonValue]
"""`Fields` that are stored, of something that was checked."""

SAME = "it is there and whole, of the same settings and source"
PASSED = "the same was checked before, and passed"
NOTHING = "nothing of its kind was there"
FIRST = "the run had none before"

_NAMED = 4
"""Differences that are named; of more, their number."""

_SHOWN = 50
"""Characters of a value."""


class StageResult(Record):
    """What a stage gives, and how it came by it. That is of one command, and not stored."""

    reused: bool = Field(False, exclude=True)
    """Whether nothing had to be done."""

    why: str = Field("", exclude=True)
    """Why it was reused, or why not."""


class CheckResult(StageResult):
    """What a check of a run leaves for the next time."""

    passed: bool

    job: str = ""
    """Fingerprint of what was checked."""

    identity: Identity | None = omitted()
    """What was checked, for the comparison with another check; None in files of older versions."""


class Difference(NamedTuple):
    field: str
    wanted: Any
    found: Any


def damaged(path: Path) -> str:
    return f"{path.name} was damaged and is set aside"


def existing(root: Path, read: Callable[[Path], Fields], *, but: Path) -> dict[str, Fields | None]:
    """What the other folders in `root` were made from, newest first.

    Args:
        read: the fields of a folder, from its record.

    Returns:
        by the folder's name; None where no record can be read, as an earlier version kept none.
    """
    folders = [path for path in root.glob("[!.]*") if path.is_dir() and path.name != but.name]
    folders = [path for path in folders if DAMAGED not in path.name]
    return {
        path.name: _readable(read, path)
        for path in sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)
    }


def nearest(wanted: Fields, there: Mapping[str, Fields | None]) -> str:
    """Why none of those `there` serves: in what the one that differs in the fewest fields does."""
    known = {name: fields for name, fields in there.items() if fields is not None}
    if not there:
        return NOTHING
    if not known:
        return f"what {_some(list(there))} was made from is unknown: there is no readable record"
    name = min(known, key=lambda name: _distance(wanted, known[name]))
    subject = name if len(there) == 1 else f"the nearest of {len(there)}, {name},"
    return f"{subject} {changes(wanted, known[name])}"


def since(wanted: Fields, before: CheckResult | None) -> str:
    """Why the check that a run had `before` does not serve."""
    if before is None:
        return FIRST
    if before.identity is None:
        return "what was checked before is unknown: an earlier version has no record of it"
    if not before.passed and flat(wanted) == flat(before.identity):
        return "it failed before"
    return f"the one before {changes(flat(wanted), flat(before.identity))}"


def changes(wanted: Fields, found: Fields) -> str:
    """What is to be said of something with the fields `found` where `wanted` are needed."""
    different = list(_differences(wanted, found))
    if not different:
        return "is the same but for its name"
    named = [f"{d.field} {_shown(d.found)} instead of {_shown(d.wanted)}" for d in different]
    if (more := len(named) - _NAMED) > 0:
        named = [*named[:_NAMED], f"{more} more differences"]
    return f"has {', '.join(named)}"


def flat(fields: Fields, prefix: str = "") -> dict[str, Any]:
    """Every single value by its name, as in training.seq_len."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        deeper = isinstance(value, Mapping)
        found |= flat(value, f"{prefix}{name}.") if deeper else {prefix + name: value}
    return found


def _readable(read: Callable[[Path], Fields], path: Path) -> Fields | None:
    try:
        return read(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


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
    """None where there is none, as of a setting of another kind of source."""
    value = fields.get(name)
    return None if value == {} else value


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    if isinstance(value, Mapping):
        text = f"{len(value)} of them"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
