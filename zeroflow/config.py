"""Base of every settings class."""

from typing import Annotated, Any, Self

from pydantic import AllowInfNan, BaseModel, ConfigDict, NonNegativeFloat, PositiveFloat
from pydantic_core import ErrorDetails

FinitePositive = Annotated[PositiveFloat, AllowInfNan(False)]
FiniteNonNegative = Annotated[NonNegativeFloat, AllowInfNan(False)]
"""Numbers of settings. pydantic's own types take infinity."""

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
    """Frozen, typed settings that reject unknown names."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        protected_namespaces=(),
    )

    def replace(self, **changes: Any) -> Self:
        """Return a copy with `changes`, validated like a new object."""
        return type(self).model_validate(
            {name: getattr(self, name) for name in type(self).model_fields} | changes
        )
