"""TODO docstring."""

import argparse
from collections.abc import Iterator
from inspect import isabstract
from pathlib import Path
from types import UnionType
from typing import (
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

Settings = TypeVar("Settings", bound=BaseModel)


_ALIASES = {"size": ["--model-size"]}


class Setting(NamedTuple):
    """A leaf of a settings class and where it lies."""

    path: tuple[str, ...]
    field: FieldInfo

    @property
    def flag(self) -> str:
        # the name of an optimiser is chosen by --optimizer
        name = self.path[-2] if self.path[-1] == "name" else self.path[-1]
        return "--" + name.replace("_", "-")


def settings(config: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[Setting]:
    """Every single setting of `config`, groups unfolded, but for those without a choice."""
    for name, field in _fields(config).items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from settings(field.annotation, (*path, name))
        elif get_origin(field.annotation) is not Literal or len(get_args(field.annotation)) > 1:
            yield Setting((*path, name), field)


def _fields(config: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of `config`; if it is abstract, those of all its subclasses."""
    if not isabstract(config):
        return config.model_fields
    kinds = config.__subclasses__()
    names = dict.fromkeys(name for kind in kinds for name in kind.model_fields)
    return {name: _merged(name, config, kinds) for name in names}


def _merged(name: str, config: type[BaseModel], kinds: list[type[BaseModel]]) -> FieldInfo:
    """The field `name` of those `kinds` of `config` that have it, with the help text of each."""
    fields = {
        kind.model_fields["name"].default: kind.model_fields[name]
        for kind in kinds
        if name in kind.model_fields
    }
    annotation: Any = Union[tuple(field.annotation for field in fields.values())]  # noqa: UP007
    if (common := config.model_fields.get(name)) is not None:
        return FieldInfo(
            annotation=annotation, default=common.default, description=common.description
        )
    text = " ".join(f"{kind}: {_help(field)}" for kind, field in fields.items())
    return FieldInfo(annotation=annotation, default=None, description=text)


def _help(field: FieldInfo) -> str:
    text = " ".join((field.description or "").split())
    if field.default in (None, "", (), False, PydanticUndefined):
        return text
    return f"{text} Default: {field.default}.".strip()


def add_settings(parser: argparse.ArgumentParser, config: type[BaseModel], title: str) -> None:
    """Give `parser` a flag for every setting, in a group for every class."""
    groups: dict[tuple[str, ...], Any] = {}
    for setting in settings(config):
        where = setting.path[:-1]
        if where not in groups:
            owner = _owner(config, where)
            summary = (owner.__doc__ or "").strip().split("\n\n")[0]
            groups[where] = parser.add_argument_group(where[-1] if where else title, summary)
        _add_flag(groups[where], setting)


def read_settings(config: type[BaseModel], arguments: argparse.Namespace) -> dict[str, Any]:
    """What was given on the command line, nested as `config` is."""
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


def flags(config: BaseModel) -> list[str]:
    """What on the command line asks for all that `config` was given."""
    argv = []
    for setting in settings(type(config)):
        given: Any = config
        for name in setting.path:
            given = getattr(given, name) if given and name in given.model_fields_set else None
        if isinstance(given, bool):
            if given:
                argv.append(setting.flag)
            elif setting.field.default is None:
                argv.append(setting.flag.replace("--", "--no-", 1))
        elif isinstance(given, tuple):
            argv += [setting.flag, *map(str, given)] if given else []
        elif given is not None:
            argv.append(f"{setting.flag}={given}")
    return argv


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
    text = _help(field).replace("%", "%%")
    flags = [setting.flag, *_ALIASES.get(setting.path[-1], [])]
    options: dict[str, Any] = {"dest": _destination(setting), "default": None, "help": text}
    kinds = _kinds(field.annotation)
    if bool in kinds:
        # Only a setting that is not simply off needs a way to say no
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
    """The plain types in an annotation; the choices of a Literal as a list."""
    origin = get_origin(annotation)
    if origin is Literal:
        return [list(get_args(annotation))]
    if origin in (Union, UnionType):
        parts = [part for part in get_args(annotation) if part is not type(None)]
        return [kind for part in parts for kind in _kinds(part)]
    if origin is tuple:
        return [tuple]
    return [get_args(annotation)[0] if hasattr(annotation, "__metadata__") else annotation]
