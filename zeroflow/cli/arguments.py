"""Command-line arguments made from the settings classes."""

import argparse
from pathlib import Path
from types import UnionType
from typing import (
    Any,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

from pydantic import BaseModel

from zeroflow.settings.flags import Setting, help_text, settings

Settings = TypeVar("Settings", bound=BaseModel)

_ALIASES = {"size": ["--model-size"]}


def add_settings(parser: argparse.ArgumentParser, config: type[BaseModel], title: str) -> None:
    """Add a flag to `parser` for every setting, with one group per class."""
    groups: dict[tuple[str, ...], Any] = {}
    for setting in settings(config):
        where = setting.path[:-1]
        if where not in groups:
            owner = _owner(config, where)
            summary = (owner.__doc__ or "").strip().split("\n\n")[0]
            groups[where] = parser.add_argument_group(where[-1] if where else title, summary)
        _add_flag(groups[where], setting)


def read_settings(config: type[BaseModel], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings given on the command line, nested like `config`."""
    values: dict[str, Any] = {}
    for setting in settings(config):
        given = getattr(arguments, _destination(setting))
        if given is None:
            continue
        target = values
        for name in setting.path[:-1]:
            target = target.setdefault(name, {})
        target[setting.path[-1]] = given
    return values


def _owner(config: type[BaseModel], path: tuple[str, ...]) -> type[BaseModel]:
    for name in path:
        annotation = config.model_fields[name].annotation
        assert isinstance(annotation, type)
        config = annotation
    return config


def _destination(setting: Setting) -> str:
    return "setting_" + "_".join(setting.path)


def _add_flag(group: Any, setting: Setting) -> None:
    field = setting.field
    text = help_text(field).replace("%", "%%")
    flags = [setting.flag, *_ALIASES.get(setting.path[-1], [])]
    options: dict[str, Any] = {"dest": _destination(setting), "default": None, "help": text}
    kinds = _kinds(field.annotation)
    if bool in kinds:
        # A setting that is off by default needs no --no- form
        with_no = field.default is None
        options["action"] = argparse.BooleanOptionalAction if with_no else "store_true"
    elif tuple in kinds:
        item = _kinds(get_args(field.annotation)[0])[0]
        options |= {"nargs": "+", "metavar": _METAVARS.get(setting.path[-1], _metavar(item))}
        if isinstance(item, list):
            options["choices"] = item
            del options["metavar"]
    elif choices := [value for kind in kinds if isinstance(kind, list) for value in kind]:
        options["choices"] = choices
    else:
        options["metavar"] = _metavar(kinds[0])
    group.add_argument(*flags, **options)


_METAVARS = {"data_path": "GLOB"}


def _metavar(kind: Any) -> str:
    return (
        "NAME" if isinstance(kind, list) else {int: "N", float: "X", Path: "DIR"}.get(kind, "NAME")
    )


def _kinds(annotation: Any) -> list[Any]:
    """Plain types in an annotation; the choices of a Literal as a list."""
    origin = get_origin(annotation)
    if origin is Literal:
        return [list(get_args(annotation))]
    if origin in (Union, UnionType):
        parts = [part for part in get_args(annotation) if part is not type(None)]
        return [kind for part in parts for kind in _kinds(part)]
    if origin is tuple:
        return [tuple]
    return [get_args(annotation)[0] if hasattr(annotation, "__metadata__") else annotation]
