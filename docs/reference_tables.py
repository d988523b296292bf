"""Write the generated tables of docs/reference/: `make reference`.

A page has prose and, between two comments, tables that are generated from the code:

    <!-- table: run -->
    ...
    <!-- end -->

`tests/test_reference.py` fails if a table is not up to date.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import fill
from typing import Any

from pydantic import BaseModel

from zeroflow.config import flag
from zeroflow.estimate.history import Past
from zeroflow.inference.evaluation import EvaluationConfig, Evaluations
from zeroflow.lab.record import ZeroLab
from zeroflow.orchestration.ui import UiConfig
from zeroflow.report.records import RunReport
from zeroflow.settings import flags, resuming
from zeroflow.settings.alerts import AlertConfig
from zeroflow.settings.proof import ProofRun
from zeroflow.settings.run_config import RunConfig
from zeroflow.settings.sweep import SweepConfig
from zeroflow.settings.zero_lab import ZeroLabRun
from zeroflow.text.markup import Markdown, table
from zeroflow.training import events, metrics
from zeroflow.training.goodput import Booking
from zeroflow.training.job import TrainResult
from zeroflow.training.recovery import Entry
from zeroflow.training.sampling import SamplingConfig

PAGES = Path(__file__).parent / "reference"

_TABLE = re.compile(r"(<!-- table: ([\w .-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

_SETTINGS = ("flag", "type", "default", "meaning")
_PATHS = {"path": "folder", "file-path": "file"}

_FIELDS = ("field", "type", "meaning")


def main() -> None:
    """Update every page."""
    for page in sorted(PAGES.glob("*.md")):
        page.write_text(updated(page.read_text(encoding="utf-8")), encoding="utf-8")


def updated(page: str) -> str:
    """Return `page` with updated tables.

    Raises:
        KeyError: the page has a table that does not exist.
    """
    return _TABLE.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}", page)


def names(page: str) -> list[str]:
    """Return the names of the tables of `page`."""
    return [found[2] for found in _TABLE.finditer(page)]


def _settings(config: type[BaseModel], title: str, *, but: str = "") -> str:
    """Return a section for `config` and for each group in it, except for the group `but`."""
    schema = config.model_json_schema()
    sections = []
    for path, group in _groups(schema, schema, ()):
        if but not in path:
            rows = [
                (f"`{flag('.'.join((*path, name)))}`", *_cells(field))
                for name, field in group["properties"].items()
                if "$ref" not in str(field)
            ]
            if rows:
                heading = f"### {f'`{path[-1]}`' if path else title}"
                sections.append(f"{heading}\n\n{_line(group)}\n\n{_table(_SETTINGS, rows)}")
    return "\n\n".join(sections)


def _groups(
    schema: dict[str, Any], group: dict[str, Any], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    yield path, group
    for name, field in group["properties"].items():
        for kind in field.get("anyOf", [field]):  # such as each of several optimisers
            if "$ref" in kind:
                inner = schema["$defs"][kind["$ref"].rsplit("/", 1)[-1]]
                yield from _groups(schema, inner, (*path, name))


def _free() -> str:
    """Return the settings that may change when a run is resumed."""
    names = (s.flag for s in flags.settings(RunConfig) if ".".join(s.path) in resuming.FREE)
    return fill(", ".join(f"`{name}`" for name in names) + ".", 110, break_on_hyphens=False)


def _cells(field: dict[str, Any]) -> tuple[str, str, str]:
    """Return type, default and meaning of a setting, from its JSON schema."""
    meaning, _, otherwise = _line(field).partition("Default: ")
    if "const" in field:
        return f"`{field['const']}`", "", meaning
    default = field["default"]
    if default in (None, [], ""):
        shown = otherwise.removesuffix(".") or "not set"
    elif isinstance(default, bool):
        shown = "on" if default else "off"
    else:
        shown = f"`{default if isinstance(default, str) else json.dumps(default)}`"
    return _type(field), shown, meaning.strip()


def _type(field: dict[str, Any]) -> str:
    """Return a type as text, such as "integer > 0" or "`auto`, `cpu` or `cuda`"."""
    kinds = [kind for kind in field.get("anyOf", [field]) if kind.get("type") != "null"]
    [kind] = kinds
    if kind["type"] == "array":
        return f"one or more: {_type(kind['items'])}"
    if choices := kind.get("enum"):
        *others, last = [f"`{choice}`" for choice in choices]
        return f"{', '.join(others)} or {last}"
    if kind.get("format") in _PATHS:
        return _PATHS[kind["format"]]
    if "pattern" in kind:
        return f"name of up to {kind['maxLength']} characters: letters, digits, `.`, `_`, `-`"
    limits = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    bounds = [f"{sign} {kind[limit]:,}" for limit, sign in limits.items() if limit in kind]
    name = {"string": "text", "boolean": "switch"}.get(kind["type"], kind["type"])
    return f"{name} {' and '.join(bounds)}".strip()


def _metrics() -> str:
    """Return the table of metrics: field, label, unit, curve in MLflow, and its x axis."""
    rows = []
    for field, metric in metrics.TABLE.items():
        keys = {metric.key: "steps"}
        if metric.by_compute:
            keys |= {f"{metric.key}_by_tokens": "tokens", f"{metric.key}_by_gflops": "10⁹ FLOPs"}
        if field == "goodput":
            keys = {f"{metric.key}/<phase>": "steps"}
        for key, axis in keys.items():
            rows.append((f"`{field}`", metric.label, metric.unit, f"`{key}`", axis))
    return _table(("metrics.jsonl", "metric", "unit", "MLflow", "x axis"), rows)


def _records(*kinds: type[BaseModel]) -> str:
    """Return a table of the fields of each kind of record, under its docstring."""
    sections = []
    for kind in kinds:
        schema = kind.model_json_schema(mode="serialization")
        event = schema["properties"].get("event", {}).get("default")
        title = f"`{event}`: {_line(schema)}" if event else _line(schema)
        sections.append(f"{title}\n\n{_table(_FIELDS, list(_fields(schema, schema)))}")
    return "\n\n".join(sections)


def _fields(
    schema: dict[str, Any], record: dict[str, Any], prefix: str = ""
) -> Iterator[tuple[str, ...]]:
    """Return a row for each field; fields of nested records are named by their path."""
    for name, field in record["properties"].items():
        kinds = [kind for kind in field.get("anyOf", [field]) if kind.get("type") != "null"]
        path, [inner] = f"{prefix}{name}", kinds
        if inner.get("type") == "array" and "items" in inner:
            path, inner = f"{path}[]", inner["items"]
        elif isinstance(inner.get("additionalProperties"), dict):
            path, inner = f"{path}.*", inner["additionalProperties"]
        if "$ref" in inner:
            inner = schema["$defs"][inner["$ref"].rsplit("/", 1)[-1]]
        if "properties" in inner:
            yield from _fields(schema, inner, f"{path}.")
        else:
            nullable = " or null" if len(kinds) < len(field.get("anyOf", kinds)) else ""
            meaning = re.sub(r"\bNone\b", "null", _line(field))
            yield f"`{path}`", _json_type(inner) + nullable, meaning


def _json_type(kind: dict[str, Any]) -> str:
    if "const" in kind:
        return f"`{kind['const']}`"
    if "enum" in kind:
        return " or ".join(f"`{choice}`" for choice in kind["enum"])
    name = kind.get("type", "any")
    return {"array": "list", "string": "text"}.get(name, name)


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return table(header, (tuple(map(Markdown, row)) for row in rows))


def _line(described: dict[str, Any]) -> str:
    return " ".join(described.get("description", "").split())


TABLES: dict[str, Callable[[], str]] = {
    "run": lambda: _settings(RunConfig, "The run"),
    "free": _free,
    "sweep": lambda: _settings(SweepConfig, "The sweep", but="run"),
    "proof": lambda: _settings(ProofRun, "The proof", but="run"),
    "zero-lab": lambda: _settings(ZeroLabRun, "The laboratory", but="run"),
    "ui": lambda: _settings(UiConfig, "The user interfaces"),
    "alerts": lambda: _settings(AlertConfig, "Alerts"),
    "sampling": lambda: _settings(SamplingConfig, "Sampling"),
    "evaluation": lambda: _settings(EvaluationConfig, "Evaluation"),
    "evaluation.json": lambda: _records(Evaluations),
    "metrics": _metrics,
    "metrics.jsonl": lambda: _records(metrics.StepRecord, metrics.ValidationRecord),
    "events.jsonl": lambda: _records(
        *(events.Started, events.Saved, events.CheckpointSkipped, events.Skipped, events.Spike),
        *(events.Stopped, events.Failed, events.Done),
    ),
    "ledger.jsonl": lambda: _records(Entry),
    "goodput.jsonl": lambda: _records(Booking),
    "training.json": lambda: _records(TrainResult),
    "report.json": lambda: _records(RunReport),
    "zero_lab.json": lambda: _records(ZeroLab),
    "plans.jsonl": lambda: _records(Past),
}


if __name__ == "__main__":
    main()
