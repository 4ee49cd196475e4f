"""The parameters of a deployment, with a schema by which Prefect's server refuses mistakes at submission.

The names and meanings are those of the command line. What only the worker can know, such as whether the config is
there and whether two settings contradict each other, is the first thing that a run checks.
"""

from __future__ import annotations

import types
from typing import Annotated, Union, get_args, get_origin

from pydantic import BaseModel, WithJsonSchema

from pipeline.config import PipelineConfig


def override_pattern() -> str:
    """A regular expression for `key=value` with a key that the config knows, a whole section's included."""
    return rf"^\s*{_keys(PipelineConfig)}\s*="


def _keys(section: type[BaseModel]) -> str:
    keys = []
    for name, field in section.model_fields.items():
        inner = _section_in(field.annotation)
        below = r"(\.\w+)*" if get_origin(field.annotation) is dict else rf"(\.{_keys(inner)})?" if inner else ""
        keys.append(name + below)
    return f"({'|'.join(keys)})"


def _section_in(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType):
        return next((found for part in get_args(annotation) if (found := _section_in(part))), None)
    return None


# The schemas are for Prefect's server alone: inside a run the config's own checks say more.
ConfigFile = Annotated[str, WithJsonSchema({"type": "string", "pattern": r"\.ya?ml$"})]
Overrides = Annotated[
    list[str] | None,
    WithJsonSchema({"type": "array", "items": {"type": "string", "pattern": override_pattern()}}),
]
