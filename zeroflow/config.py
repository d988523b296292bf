"""Base of every settings class."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict


def flag(setting: str) -> str:
    """Return the flag of a setting, such as --learning-rate for `training.learning_rate`."""
    *groups, name = setting.split(".")
    if name == "name" and groups:  # the name of an optimiser is chosen by --optimizer
        name = groups[-1]
    return "--" + name.replace("_", "-")


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
