"""Settings as command-line flags: names, help texts, and the flags that reproduce settings."""

from collections.abc import Iterator
from inspect import isabstract
from typing import Any, NamedTuple, Union

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from zeroflow import artifacts
from zeroflow.config import described, flag, in_words
from zeroflow.text.markup import shortened
from zeroflow.text.redaction import redacted

_LONGEST = 200
"""Maximum number of characters of a value in an error message."""


class Setting(NamedTuple):
    """A single setting of a settings class, with its path through the groups."""

    path: tuple[str, ...]
    field: FieldInfo

    @property
    def flag(self) -> str:
        return flag(".".join(self.path))


def settings(config: type[BaseModel]) -> Iterator[Setting]:
    """Yield every setting of `config` and of the groups in it, except those in its `no_flags`."""
    no_flags = getattr(config, "no_flags", ())
    for setting in _leaves(config, ()):
        if ".".join(setting.path) not in no_flags:
            yield setting


def _leaves(config: type[BaseModel], path: tuple[str, ...]) -> Iterator[Setting]:
    for name, field in _fields(config).items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _leaves(field.annotation, (*path, name))
        else:
            yield Setting((*path, name), field)


def _fields(config: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields of `config`, or those of all its subclasses if it is abstract."""
    if not isabstract(config):
        return described(config)
    kinds = config.__subclasses__()
    names = dict.fromkeys(name for kind in kinds for name in kind.model_fields)
    return {name: _merged(name, config, kinds) for name in names}


def _merged(name: str, config: type[BaseModel], kinds: list[type[BaseModel]]) -> FieldInfo:
    """Merge the field `name` of several `kinds` of `config` into one that has all help texts."""
    fields = {
        kind.model_fields["name"].default: described(kind)[name]
        for kind in kinds
        if name in kind.model_fields
    }
    annotation: Any = Union[tuple(field.annotation for field in fields.values())]  # noqa: UP007
    if (common := described(config).get(name)) is not None:
        return FieldInfo(
            annotation=annotation, default=common.default, description=common.description
        )
    text = " ".join(f"{kind}: {help_text(field)}" for kind, field in fields.items())
    return FieldInfo(annotation=annotation, default=None, description=text)


def help_text(field: FieldInfo) -> str:
    """Return the description of a setting, with its default."""
    text = " ".join((field.description or "").split())
    if field.default in (None, "", (), False, PydanticUndefined):
        return text
    return f"{text} Default: {field.default}.".strip()


def flags(config: BaseModel) -> list[str]:
    """Return the command-line flags that reproduce all settings given to `config`."""
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


def error_message(error: Exception) -> str:
    """Return the message of an error without passwords, with settings named by their flags."""
    if isinstance(error, OSError):
        return redacted(artifacts.explained(error))
    if not isinstance(error, ValidationError):
        return redacted(str(error)) or type(error).__name__
    lines = []
    for problem in error.errors():
        names = [part for part in problem["loc"] if isinstance(part, str)]  # not a place in a list
        message = in_words(problem)
        if names and problem["type"] != "value_error":
            found = shortened(repr(problem["input"]), _LONGEST)
            message = f"{flag(names[-1])}: {message} (found {found})"
        lines.append(message)
    return redacted("\n".join(lines))


def refused(config: type[BaseModel], error: ValidationError) -> ValueError:
    """Return the error for a `config` that is made in Python, with settings named by their path."""
    paths = {setting.path[-1]: setting.path for setting in settings(config)}
    lines = []
    for problem in error.errors():
        path = [part for part in problem["loc"] if isinstance(part, str)]
        message = in_words(problem)
        if path and problem["type"] != "value_error":
            found = shortened(repr(problem["input"]), _LONGEST)
            message = f"{'.'.join(path)}: {message} (found {found})"
            groups = paths.get(path[-1], ())[:-1]
            if problem["type"] == "extra_forbidden" and groups:
                message += f": set it in the group {'.'.join(groups)}"
        lines.append(message)
    return ValueError(redacted("\n".join(lines)))
