"""The form of a flow in Prefect: the most common settings, then the others in collapsed groups.

Prefect creates the form from the JSON schema of the flow's parameter. Its forms have no collapsed
sections. But for a value of several types, only the chosen type is shown. So each group is such a
value: either its defaults or its settings. An empty field is not sent, so Prefect receives only
what was filled in.

As on the command line, a setting is identified by its own name, independent of its group.
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias, TypeVar

from pydantic import BaseModel, create_model
from pydantic_core import to_jsonable_python

from zeroflow.config import Config
from zeroflow.settings.flags import Setting, help_text, settings

Settings = TypeVar("Settings", bound=Config)

Schema: TypeAlias = dict[str, Any]
"""A JSON schema, a part of one, or the values of a form."""

_TITLES = {
    "run_name": "Run to start or resume",  # not "Run name", which is the title of a Prefect field
    "sweep_name": "Sweep to start or resume",
    "sizes": "Model sizes",
    "seeds": "Seeds",
    "learning_rates": "Learning rates",
    "zero_stages": "ZeRO stages",
    "data_mode": "Data",
    "data_path": "Files",
    "dataset": "Dataset",
    "size": "Model size",
    "max_steps": "Steps",
    "seq_len": "Context length",
    "learning_rate": "Learning rate",
}
"""Settings that are shown before the groups, in this order, and their titles."""

_LAST = ("cache_dir",)
"""Settings that are shown after the groups."""

_OTHER = "other"
"""Group of the settings that belong to none."""

_GROUPS = {
    "model": "Custom shape",
    "build": "Building of shards",
    "hosts": "Several machines",
    "overfit": "Overfit check",
    "evaluation": "Evaluation at the end",
}
"""Titles of groups whose names are not clear enough."""

_LIMITS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "maxLength", "pattern")

_BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "more than",
    "maximum": "at most",
    "exclusiveMaximum": "less than",
}


def schema(config: type[Config]) -> Schema:
    """Return the JSON schema of the form of `config`."""
    first = [setting for setting in settings(config) if setting.path[-1] in _TITLES]
    first.sort(key=lambda setting: [*_TITLES].index(setting.path[-1]))
    groups: dict[str, list[Setting]] = {}
    for setting in settings(config):
        if setting.path[-1] not in (*_TITLES, *_LAST):
            groups.setdefault(_group(setting), []).append(setting)
    groups[_OTHER] = groups.pop(_OTHER)
    kinds = _kinds(settings(config))
    shown = {setting.path[-1]: _field(setting, kinds) for setting in first}
    shown |= {name: _folded(name, inner, kinds) for name, inner in groups.items()}
    shown |= {s.path[-1]: _field(s, kinds) for s in settings(config) if s.path[-1] in _LAST}
    summary = (config.__doc__ or "").strip().split("\n\n")[0]
    return _object(shown) | {"title": config.__name__, "description": summary}


def read(config: type[Settings], given: object) -> Settings:
    """Return the settings of a form, or of a flow that was called with them.

    Raises:
        pydantic.ValidationError: the settings are wrong.
    """
    if isinstance(given, config) or not isinstance(given, Mapping):
        return config.model_validate(given)
    nested: Schema = {}
    _place(given, {setting.path[-1]: setting.path for setting in settings(config)}, nested)
    return config.model_validate(nested)


def filled(asked: BaseModel) -> Schema:
    """Return the form of `asked`, filled in with the settings that were given explicitly."""
    form: Schema = {}
    for setting in settings(type(asked)):
        value: Any = asked
        for name in setting.path:
            value = getattr(value, name) if value and name in value.model_fields_set else None
        if value is not None:
            name = setting.path[-1]
            place = form if name in (*_TITLES, *_LAST) else form.setdefault(_group(setting), {})
            place[name] = to_jsonable_python(value)
    return form


def _place(given: Mapping[str, Any], paths: dict[str, tuple[str, ...]], into: Schema) -> None:
    """Put each setting of `given` into `into` at its path, without those that are None."""
    for name, value in given.items():
        if name in paths:
            if value is not None:
                *groups, last = paths[name]
                target = into
                for group in groups:
                    target = target.setdefault(group, {})
                target[last] = value
        elif isinstance(value, Mapping):
            _place(value, paths, into)
        elif value is not None:
            into[name] = value  # unknown: validation will refuse it by name


def _group(setting: Setting) -> str:
    """Return the name of the group of a setting in the form."""
    return setting.path[-2] if len(setting.path) > 1 and setting.path[-2] != "run" else _OTHER


def _object(properties: Schema) -> Schema:
    """Return the schema of an object, with the positions by which Prefect sorts its properties."""
    ordered = {
        name: {**field, "position": position}
        for position, (name, field) in enumerate(properties.items())
    }
    return {"type": "object", "properties": ordered}


def _folded(name: str, group: list[Setting], kinds: Schema) -> Schema:
    """Return the schema of a group, which shows no settings until the user chooses to set them."""
    fields = _object({setting.path[-1]: _field(setting, kinds) for setting in group})["properties"]
    # The limits are next to the types instead of within one. Otherwise, the error for a value out
    # of bounds would only be "not valid under any of the given schemas"
    shown = {
        name: {key: value for key, value in field.items() if key not in _LIMITS}
        for name, field in fields.items()
    }
    return {
        "title": _GROUPS.get(name, f"{name.capitalize()} settings"),
        "description": " ".join(setting.flag for setting in group),
        "anyOf": [
            {"type": "null", "title": "Defaults"},
            {"type": "object", "title": "Set", "properties": shown},
        ],
        "properties": fields,
    }


def _field(setting: Setting, kinds: Schema) -> Schema:
    """Return the schema of a setting, without a default: an empty field is not sent."""
    name = setting.path[-1]
    kind = _kind(setting, kinds[name])
    title = _TITLES.get(name, setting.flag[2:].replace("-", " ").capitalize())
    parts = (help_text(setting.field), _bounds(kind), f"Flag: {setting.flag}.")
    return kind | {"title": title, "description": " ".join(part for part in parts if part)}


def _kinds(shown: Iterable[Setting]) -> Schema:
    """Return pydantic's schemas of the values of settings, by name: one model for all is faster."""
    fields: Any = {setting.path[-1]: (setting.field.annotation, setting.field) for setting in shown}
    model: Any = create_model("Form", **fields)
    found: Schema = model.model_json_schema()["properties"]
    return found


def _kind(setting: Setting, field: Schema) -> Schema:
    """Return the schema of the values of a setting, in the simplest form."""
    kinds = [kind for kind in field.get("anyOf", [field]) if kind.get("type") != "null"]
    if choices := [kind["const"] for kind in kinds if "const" in kind]:
        return {"type": "string", "enum": choices}
    kept = ("type", "format", "enum", "items", *_LIMITS)
    kind = {key: value for key, value in kinds[0].items() if key in kept}
    if kind["type"] == "integer" and (above := kind.pop("exclusiveMinimum", None)) is not None:
        kind["minimum"] = above + 1
    if kind["type"] == "boolean" and setting.field.default is None:  # neither on nor off
        return {"anyOf": [{"type": "null", "title": "Default"}, kind | {"title": "Set"}]}
    return kind


def _bounds(kind: Schema) -> str:
    """Return the limits of a value as a sentence, which may be empty."""
    limits = [f"{words} {kind[limit]:,}" for limit, words in _BOUNDS.items() if limit in kind]
    if "pattern" in kind:
        limits = ["letters, digits, dots, dashes and underscores", f"at most {kind['maxLength']}"]
    return f"{', '.join(limits).capitalize()}." if limits else ""
