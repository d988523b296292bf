"""Command-line arguments made from the settings classes."""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import (
    Any,
    Literal,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

from pydantic import BaseModel

from zeroflow.settings.flags import Setting, help_text, settings
from zeroflow.text.markup import is_utf8, visible

N = TypeVar("N", int, float)

_MOST_VALUES = 1000
"""Maximum number of values of a setting. Prefect accepts at most 512 KB of parameters, and its
pages show all of them."""

_ALIASES = {"size": ["--model-size"], "run_name": ["--name"]}
"""Other flags of a setting, by its name."""


class Parser(argparse.ArgumentParser):
    """A parser for many flags: its usage is one line, and it suggests a flag for a misspelt one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)  # a misspelt flag is an error
        self._given: list[str] = []

    def format_usage(self) -> str:
        self._shorten_usage()
        return super().format_usage()

    def format_help(self) -> str:
        self._shorten_usage()
        return super().format_help()

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse `args`; unlike argparse's own method, exit with an error if one is unknown."""
        given = list(sys.argv[1:] if args is None else args)
        self._given = given
        found, unknown = super().parse_known_args(given, namespace)
        if unknown:
            self.error(self._meant(unknown[0], given))
        return found, unknown

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ") + self._dash(message)
        self.exit(2, f"error: {message}\n`{self.prog} --help` shows what it takes\n")

    def _shorten_usage(self) -> None:
        """Show only the required flags in the usage; a parser of commands keeps its own usage."""
        if self._subparsers is None:
            needed = [
                f"{action.option_strings[0]} {action.metavar or action.dest.upper()} "
                for action in self._actions
                if action.required
            ]
            self.usage = f"%(prog)s {''.join(needed)}[settings]"

    def _dash(self, message: str) -> str:
        """Return how to give a value that begins with a dash, if one seems to be meant."""
        head, missing, _ = message.removeprefix("argument ").partition(": expected ")
        for flag, value in zip(self._given, self._given[1:], strict=False):
            if missing and flag in head.split("/") and value.startswith("-"):
                return f". Write a value that begins with a dash as {flag}={shlex.quote(value)}"
        return ""

    def _meant(self, unknown: str, given: Sequence[str]) -> str:
        """Return the error message for an argument that no flag takes."""
        flags = list(self._option_string_actions)
        if unknown.startswith("--"):
            name = unknown.partition("=")[0]
            word, words = name.strip("-").replace("_", "-"), [flag.strip("-") for flag in flags]
            near = [f"--{found}" for found in get_close_matches(word, words, n=1)]
            near = near or [flag for flag in flags if word in (*flag.split("-"), _initials(flag))]
            return f"there is no {name}" + (f": did you mean {' or '.join(near)}?" if near else "")
        before = [flag for flag in given[: given.index(unknown)] if flag in flags]
        if not before:
            return f"{unknown!r} belongs to no flag"
        several = [flag for flag in flags if flag == f"{before[-1]}s"]
        meant = f": did you mean {several[0]}?" if several else ""
        return f"{unknown!r} is one value too many for {before[-1]}{meant}"


def whole_number(text: str) -> int:
    """Return the value of a flag as a whole number."""
    return _of_type(int, text, "must be a whole number")


def positive_number(text: str) -> int:
    """Return the value of a flag as a positive whole number."""
    if (number := whole_number(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1 (found {text!r})")
    return number


def any_number(text: str) -> float:
    """Return the value of a flag as a number."""
    return _of_type(float, text, "must be a number")


def _of_type(kind: Callable[[str], N], text: str, rule: str) -> N:
    try:
        return kind(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{rule} (found {text!r})") from error


def _initials(flag: str) -> str:
    return "".join(word[:1] for word in flag.split("-"))


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


_MAY_BE_EMPTY = {"sample_prompt", "sbatch_options", "run_name"}
"""A model writes without a prompt, and options of an earlier command are dropped by empty ones. An
empty name is refused with what a name may contain."""


def read_settings(config: type[BaseModel], arguments: argparse.Namespace) -> dict[str, object]:
    """Return the settings given on the command line, nested like `config`.

    Raises:
        ValueError: a value is empty or not UTF-8, or a setting has thousands of values.
    """
    values: dict[str, object] = {}
    for setting in settings(config):
        given = getattr(arguments, _destination(setting))
        if given is None:
            continue
        for value in given if isinstance(given, list) else [given]:
            if value == "" and setting.path[-1] not in _MAY_BE_EMPTY:  # as of an unset variable
                raise ValueError(f"{setting.flag} is empty: give a value, or drop it")
            if isinstance(value, str) and not is_utf8(value):
                raise ValueError(
                    f"{setting.flag} {visible(value)} is not UTF-8: encode or rename it as UTF-8"
                )
        if isinstance(given, list) and len(given) > _MOST_VALUES:
            first = Path(given[0])
            raise ValueError(
                f"{setting.flag} has {len(given):,} files, because the shell expanded a pattern: "
                f"quote it, as in {setting.flag} '{first.parent / ('*' + first.suffix)}'"
            )
        _put(values, setting.path, given)
    return values


def _put(values: dict[str, object], path: tuple[str, ...], given: object) -> None:
    name, *inner = path
    if not inner:
        values[name] = given
        return
    group = values.setdefault(name, {})
    assert isinstance(group, dict)
    _put(group, tuple(inner), given)


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
        # A setting that is off by default needs no --no-... flag
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
        options["metavar"] = _METAVARS.get(setting.path[-1], _metavar(kinds[0]))
    group.add_argument(*flags, **options)


_METAVARS = {"data_path": "GLOB", "alert_to": "FILE"}


def _metavar(kind: Any) -> str:
    return (
        "NAME" if isinstance(kind, list) else {int: "N", float: "X", Path: "DIR"}.get(kind, "NAME")
    )


def _kinds(annotation: Any) -> list[Any]:
    """Return the types in an annotation; the choices of a Literal are returned as a list."""
    origin = get_origin(annotation)
    if origin is Literal:
        return [list(get_args(annotation))]
    if origin in (Union, UnionType):
        parts = [part for part in get_args(annotation) if part is not type(None)]
        return [kind for part in parts for kind in _kinds(part)]
    if origin is tuple:
        return [tuple]
    return [get_args(annotation)[0] if hasattr(annotation, "__metadata__") else annotation]
