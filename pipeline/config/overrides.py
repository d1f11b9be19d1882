"""Settings by dotted keys: set in nested mappings, compared with a base's, mistakes explained.

override(values, "generator.train.learning_rate", "3e-4", origin="TESSERA__...")
explain(validation_error, Recipe)  # "unknown key 'generator.widht'; did you mean 'width'?"
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeGuard, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipeline.config.section import Config
from pipeline.errors import RecipeError


def override(values: dict[str, Any], key: str, text: str, *, origin: str) -> None:
    """Set a dotted key in the nested mapping to a YAML value.

    Raises:
        RecipeError: not YAML, or the key goes through a value.
    """
    try:
        value = _yaml_value(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"override {origin!r}: {text!r} is not a YAML value: {error}") from error
    set_key(values, key, value, origin=origin)


def set_key(values: dict[str, Any], key: str, value: Any, *, origin: str) -> None:
    """Set a dotted key in the nested mapping.

    Raises:
        RecipeError: the key goes through a value.
    """
    *sections, last = key.split(".")
    node = values
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise RecipeError(f"override {origin!r}: {section!r} is a value, not a section")
        node = child
    node[last] = value


def _yaml_value(text: str) -> Any:
    """YAML's value, except that 3e-4 is the number people mean (YAML 1.1 reads a string)."""
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def explain(
    error: ValidationError,
    root: type[BaseModel],
    inside: tuple[str, ...] = (),
    *,
    shown: tuple[str, ...] | None = None,
) -> str:
    """One line per mistake: the key, what is wrong, and what would be right.

    Args:
        error: of validating `root`, or the section of it named by `inside`.
        shown: what the user calls that section, if not `inside`.
    """
    lines = []
    mistakes = error.errors()
    for item in mistakes:
        if item["type"] == "too_short" and any(_is_inside(other, item) for other in mistakes):
            continue  # it is too short without what is wrong in it
        loc = (*inside, *item["loc"])
        key = ".".join(str(part) for part in (*(inside if shown is None else shown), *item["loc"]))
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown key {key!r}; {_hint(root, loc)}")
        else:
            said = item["msg"].removeprefix("Value error, ")
            of_a_section = item["type"] == "value_error" and isinstance(item["input"], Mapping)
            value = "" if of_a_section else f"={item['input']!r}"
            lines.append(f"{key}{value}: {said}" if key else said)
    return "; ".join(lines)


def _is_inside(mistake: ErrorDetails, other: ErrorDetails) -> bool:
    """Whether a mistake is in an item of the list that another one is about."""
    depth = len(other["loc"])
    return len(mistake["loc"]) > depth and mistake["loc"][:depth] == other["loc"]


def stated(config: BaseModel) -> dict[str, Any]:
    """The settings that a section was given, as JSON values, also where they equal the default."""
    return config.model_dump(mode="json", exclude_unset=True)


def shaped_like(
    config: BaseModel, built: BaseModel, keys: Iterable[str], *, section: str, whose: str
) -> dict[str, Any]:
    """The settings of a section, with what it leaves open of a network's shape taken from `built`.

    Args:
        config: the recipe's section.
        built: the section that an existing network was built by.
        keys: the dotted settings that decide the shape.
        section: the section's name in the recipe, for the message.
        whose: whose shape it is, for the message.

    Raises:
        RecipeError: `config` sets another shape than the existing one.
    """
    values = stated(config)
    for key in keys:
        *sections, name = key.split(".")
        there, given = config, built
        for part in sections:
            there, given = getattr(there, part), getattr(given, part)
        wanted, known = getattr(there, name), getattr(given, name)
        if name in there.model_fields_set and wanted != known:
            raise RecipeError(
                f"{section}.{key}={wanted} is not {whose}, which has {known}: leave it out to take "
                "that, or train from scratch (base, tokenizer.source, aligner.source: null)"
            )
        set_key(values, key, known, origin=key)
    return values


def _hint(root: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    """What somebody who wrote the unknown key at `loc` may have meant."""
    name, known = str(loc[-1]), _known_keys(root, loc[:-1])
    if near := difflib.get_close_matches(name, known, n=1):
        return f"did you mean {near[0]!r}?"
    elsewhere = [place for place in _places(root) if place.rpartition(".")[2] == name]
    if len(elsewhere) == 1:
        return f"did you mean {elsewhere[0]!r}?"
    if elsewhere:
        first = next((p for p in elsewhere if p.startswith("generator.")), elsewhere[0])
        sections = ", ".join(place.rpartition(".")[0] for place in elsewhere)
        return f"it is a setting of {sections}: write {first!r}, for example"
    return f"known here: {', '.join(known)}" if known else "this section has no settings"


def _places(section: type[BaseModel], inside: str = "") -> Iterator[str]:
    """The dotted keys of all settings in a section and the sections in it."""
    for name, field in section.model_fields.items():
        if _is_section(field.annotation):
            yield from _places(field.annotation, f"{inside}{name}.")
        elif inside:
            yield f"{inside}{name}"


def _known_keys(root: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The keys of the section at `loc`."""
    section = root
    parts = iter(loc)
    for part in parts:
        own = section.sections_by_name() if issubclass(section, Config) else {}
        if str(part) in own:
            section = own[str(part)]
            continue
        if str(part) not in section.model_fields:
            return []
        annotation = section.model_fields[str(part)].annotation
        models = [a for a in (annotation, *get_args(annotation)) if _is_section(a)]
        if not models:
            return []
        section = models[0]
        if get_origin(annotation) is dict:
            next(parts, None)  # a name of the user's
    own = section.sections_by_name() if issubclass(section, Config) else {}
    return sorted({*section.model_fields, *own})


def _is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
