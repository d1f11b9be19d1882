"""The base class of every section of a recipe: unknown keys are errors, values are frozen."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from pipeline import registry
from pipeline.errors import PluginError


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

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

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


MAX_WIDTH, MAX_DEPTH = 65_536, 512
"""Channels and blocks of a network at most: far beyond what is trained, and what still can be built
in a moment to see whether it fits."""
Width = Annotated[int, Field(ge=1, le=MAX_WIDTH)]
Depth = Annotated[int, Field(ge=0, le=MAX_DEPTH)]

Options = TypeVar("Options", bound=Config)


class ChoiceConfig(Config):
    """A section with a setting that names a file of the registry, such as `generator.family`.

    What only that file reads stands in a section of its name:

        generator: {family: gan, gan: {channels: 64}}

    Attributes:
        kind: of the registry.
        chosen_by: the setting that names the file.
    """

    model_config = ConfigDict(extra="allow")  # the files' own sections, checked below

    kind: ClassVar[str]
    chosen_by: ClassVar[str]

    @classmethod
    def section_of(cls, name: str) -> type[Config]:
        """The class of a file's own section.

        Raises:
            RecipeError: there is no such file; the message lists what there is.
        """
        raise NotImplementedError

    @classmethod
    def sections_by_name(cls) -> dict[str, type[Config]]:
        """The files' own sections, each named for its file; of plugins those that can be used."""
        found = {}
        for name in registry.names(cls.kind):
            with contextlib.suppress(PluginError):  # it is told to whoever chooses the plugin
                found[name] = cls.section_of(name)
        return found

    @model_validator(mode="after")
    def _own_sections_are_checked(self) -> Self:
        if taken := sorted(set(registry.names(self.kind)) & type(self).model_fields.keys()):
            raise PluginError(
                f"a file of {self.kind}/ is called {taken[0]}.py, and {taken[0]!r} is a setting "
                "beside the sections that are called like these files: rename the file"
            )
        sections = self.__pydantic_extra__ or {}
        mistakes: list[InitErrorDetails] = []
        for name, given in sections.items():
            if name not in registry.names(self.kind):
                mistakes.append({"type": "extra_forbidden", "loc": (name,), "input": given})
                continue
            try:
                sections[name] = self.section_of(name).model_validate(given)
            except ValidationError as error:
                mistakes += [
                    cast(InitErrorDetails, {**mistake, "loc": (name, *mistake["loc"])})
                    for mistake in error.errors(include_url=False)
                ]
        if mistakes:
            raise ValidationError.from_exception_data(type(self).__name__, mistakes)
        return self

    def options(self, section: type[Options]) -> Options:
        """The own section of the file that is chosen, whose class the file knows; at its defaults
        where the recipe says nothing."""
        chosen = getattr(self, self.chosen_by)
        given = (self.__pydantic_extra__ or {}).get(chosen, section())
        assert isinstance(given, section), f"{chosen} has no section of {section}"
        return given

    def completed(self) -> Self:
        """The same with the chosen file's own section stated and no other file's."""
        chosen = getattr(self, self.chosen_by)
        options = self.options(self.section_of(chosen))
        other = dict.fromkeys(self.__pydantic_extra__ or {})
        made = self.model_copy()
        object.__setattr__(made, "__pydantic_extra__", {chosen: options})
        object.__setattr__(
            made, "__pydantic_fields_set__", made.model_fields_set - other.keys() | {chosen}
        )
        return made
