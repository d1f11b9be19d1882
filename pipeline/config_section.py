"""The base class of every section of a recipe: unknown keys are errors, values are frozen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings joined into one, `changes` winning."""
    result = dict(values)
    for key, value in changes.items():
        known = result.get(key)
        if isinstance(known, Mapping) and isinstance(value, Mapping):
            value = merged(known, value)
        result[key] = value
    return result


class Config(BaseModel):
    """A section: its fields are its settings, with defaults, limits and descriptions.

    A section whose place in the recipe has a default of its own (`aligner.train`, for example)
    keeps that default's settings where the recipe gives the section in part.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def sections_by_name(cls) -> Mapping[str, type[Config]]:
        """Sections that are no fields, by name; the default is none."""
        return {}

    @model_validator(mode="before")
    @classmethod
    def _sections_given_in_part(cls, values: Any) -> Any:
        """What a section leaves open is what is the default in its place, not in its class."""
        if not isinstance(values, Mapping):
            return values
        values = dict(values)
        for name, given in values.items():
            field = cls.model_fields.get(name)
            if field and isinstance(field.default, Config) and isinstance(given, Mapping):
                values[name] = merged(field.default.model_dump(exclude_unset=True), given)
        return values
