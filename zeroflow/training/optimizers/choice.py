"""The available optimisers, which are found in the modules of this package."""

import pkgutil
from importlib import import_module
from typing import Annotated, Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from zeroflow.training import optimizers
from zeroflow.training.optimizers.adamw import AdamW
from zeroflow.training.optimizers.base import OptimizerConfig

for _module in pkgutil.iter_modules(optimizers.__path__):
    import_module(f"{optimizers.__name__}.{_module.name}")

OPTIMIZERS: dict[str, type[OptimizerConfig]] = {
    kind.model_fields["name"].default: kind for kind in OptimizerConfig.__subclasses__()
}
"""Optimisers by name."""


def _name(given: Any) -> Any:
    if isinstance(given, OptimizerConfig):
        return given.name
    return given.get("name", DEFAULT.name) if isinstance(given, dict) else None


class _ByName:
    """Makes pydantic choose the class by the setting `name`; without a name, the default."""

    def __get_pydantic_core_schema__(self, _: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        kinds = {name: handler.generate_schema(kind) for name, kind in OPTIMIZERS.items()}
        return core_schema.tagged_union_schema(kinds, discriminator=_name)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        kinds = handler(schema)["oneOf"]
        return {"anyOf": kinds} if len(kinds) > 1 else kinds[0]  # Prefect's form has no oneOf


DEFAULT = AdamW()

AnyOptimizer = Annotated[OptimizerConfig, _ByName()]
"""Type of a setting that is one of `OPTIMIZERS`."""
