"""Base of every settings class."""

import ast
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    AllowInfNan,
    BaseModel,
    ConfigDict,
    GetJsonSchemaHandler,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError

FinitePositive = Annotated[PositiveFloat, AllowInfNan(False)]
FiniteNonNegative = Annotated[NonNegativeFloat, AllowInfNan(False)]
"""Numbers of settings. pydantic's own types take infinity."""

LARGEST = 2**63 - 1
"""Largest whole number of a setting. Seeds of PyTorch and sizes of arrays have 64 bits."""


def _in_64_bits(number: int) -> int:
    if number > LARGEST:
        raise PydanticCustomError("less_than_equal", "{le}", {"le": LARGEST})
    return number


# Not a constraint of pydantic's, which the tables of settings would show for every number
IN_64_BITS = AfterValidator(_in_64_bits)

WholePositive = Annotated[PositiveInt, IN_64_BITS]
WholeNonNegative = Annotated[NonNegativeInt, IN_64_BITS]
"""Whole numbers of settings. pydantic's own types take integers of any size."""

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Pattern of the names of runs and sweeps."""

NAME_IN_WORDS = (
    "a name may contain only letters, digits, dots, dashes and underscores, and must begin with a "
    "letter or a digit"
)

_WHOLE, _NUMBER, _YES = "must be a whole number", "must be a number", "must be true or false"
_GROUP = "must be a group of named values"

_IN_WORDS = {
    "int_type": _WHOLE,
    "int_parsing": _WHOLE,
    "int_parsing_size": "is too large",
    "int_from_float": _WHOLE,
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
    "finite_number": "must be a finite number",
    "bool_type": _YES,
    "bool_parsing": _YES,
    "string_type": "must be a text",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": NAME_IN_WORDS,  # all our patterns are those of names
    "path_type": "must be a path",
    "tuple_type": "must be a list",
    "dict_type": _GROUP,
    "model_type": _GROUP,
    "model_attributes_type": _GROUP,
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
    "union_tag_invalid": "'{tag}' is not one of {expected_tags}",
    "extra_forbidden": "there is no such setting",
    "missing": "is missing",
}
"""Messages by pydantic's kinds of errors; the names in braces are those of its context."""


def flag(setting: str) -> str:
    """Return the flag of a setting, such as --learning-rate for `training.learning_rate`.

    An underscore at the end of a name that Python or pydantic already uses is not part of the flag.
    """
    *groups, name = setting.rstrip("_").split(".")
    if name == "name" and groups:  # the name of an optimiser is chosen by --optimizer
        name = groups[-1]
    return "--" + name.replace("_", "-")


def in_words(problem: ErrorDetails) -> str:
    """Return the message of one error of a validation, without the name of the setting."""
    known = _IN_WORDS.get(problem["type"])
    if known is None:
        return problem["msg"].removeprefix("Value error, ")
    context = problem.get("ctx", {}).items()
    return known.format_map({n: f"{v:g}" if isinstance(v, float) else v for n, v in context})


class Config(BaseModel):
    """Frozen, typed settings that reject unknown names.

    The docstring under a field is its description; see `described`.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        protected_namespaces=(),
    )

    def replace(self, **changes: Any) -> Self:
        """Return a copy with `changes`, validated like a new object."""
        return type(self).model_validate(
            {name: getattr(self, name) for name in type(self).model_fields} | changes
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Return the JSON schema with the descriptions of the fields."""
        schema = handler(core_schema)
        shown = handler.resolve_ref_schema(schema).get("properties", {})
        for name, field in described(cls).items():
            if field.description and name in shown:
                shown[name].setdefault("description", field.description)
        return schema


def described(config: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields of `config`, with the docstrings under them as their descriptions.

    pydantic's `use_attribute_docstrings` would look for the source of every class when it is
    defined, which takes a tenth of the time of our imports, and most classes are not described.
    """
    sources = [_docstrings(kind.__module__).get(kind.__qualname__, {}) for kind in _own(config)]
    for name, field in config.model_fields.items():
        if field.description is None:
            field.description = next((found[name] for found in sources if name in found), None)
    return config.model_fields


def _own(config: type[BaseModel]) -> list[type]:
    """Return the classes that may define fields of `config`, the most specific first."""
    return [kind for kind in config.__mro__ if issubclass(kind, Config) and kind is not Config]


@cache
def _docstrings(module: str) -> dict[str, dict[str, str | None]]:
    """Return the docstrings under the fields of each class of `module`, by name."""
    try:
        source = inspect.getsource(sys.modules[module])
    except (OSError, TypeError):  # not in a file
        return {}
    return dict(_classes(ast.parse(source), ""))


def _classes(node: ast.AST, within: str) -> Iterator[tuple[str, dict[str, str | None]]]:
    """Yield the qualified name of each class in `node`, and the docstrings under its fields."""
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, ast.ClassDef):
            name = f"{within}{inner.name}"
            yield name, dict(_fields(inner))
            yield from _classes(inner, f"{name}.")
        elif isinstance(inner, ast.FunctionDef):
            yield from _classes(inner, f"{within}{inner.name}.<locals>.")


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, str | None]]:
    for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            yield statement.target.id, _text(following)


def _text(statement: ast.stmt | None) -> str | None:
    """Return the text of a statement that is only a text."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        text = statement.value.value
        return inspect.cleandoc(text) if isinstance(text, str) else None
    return None
