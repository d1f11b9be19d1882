"""Settings without effect: what a recipe states and nothing reads, each with the reason.

A chain warns of them before it starts; a search refuses them, since its trials would all be alike.

    for idle in idle_settings(recipe):
        print(idle)  # "generator: depth is without effect on the family gan"
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline import registry
from pipeline.config import GeneratorConfig, Recipe
from pipeline.config.train import ONLY_WITH
from pipeline.models import load_family
from pipeline.tokenizers import load_tokenizer_kind


@dataclass(frozen=True)
class Idle:
    """Settings of one section that have no effect for one reason.

    Attributes:
        section: dotted, "generator.train" for example.
        names: of the settings, below the section.
        reason: ends the sentence "NAMES are without effect REASON".
        decided_by: the dotted setting by which they would have an effect, if it is one alone.
    """

    section: str
    names: tuple[str, ...]
    reason: str
    decided_by: str | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The dotted settings."""
        return tuple(f"{self.section}.{name}" for name in self.names)

    def __str__(self) -> str:
        verb = "is" if len(self.names) == 1 else "are"
        return f"{self.section}: {', '.join(self.names)} {verb} without effect {self.reason}"


def idle_settings(recipe: Recipe) -> Iterator[Idle]:
    """Every stated setting of the recipe that nothing reads.

    Candidates share the section `generator`, of which each reads its part: what only some of them
    read is not named.
    """
    yield from _tokenizer(recipe)
    aligner = recipe.aligner
    if not aligner.is_trained:
        reason = f"because {aligner.source} is taken as it is"
        yield from _named("aligner", aligner.model_fields_set - {"source", "tune"}, reason)
    families = sorted({config.family for config in recipe.generators.values()})
    if not any(load_family(name).reads == "image_tokens" for name in families):
        reason = f"because {', '.join(families)} reads no image tokens"
        yield from _named("encode", recipe.encode.model_fields_set, reason)
    if not recipe.candidates:
        yield from idle_generator_settings(recipe.generator)


def idle_generator_settings(config: GeneratorConfig) -> Iterator[Idle]:
    """Those of the section `generator`."""
    stated = config.model_fields_set
    others = set(registry.names("models")) - {config.family}
    yield from _named("generator", stated & others, f"on the family {config.family}")
    by_reason: dict[str, set[str]] = {}
    for name, reason in load_family(config.family).unread(config).items():
        by_reason.setdefault(reason, set()).add(name)
    for reason, names in by_reason.items():
        yield from _named("generator", stated & names, reason)
    for name, (setting, *values) in ONLY_WITH.items():
        chosen = getattr(config.train, setting)
        if name in config.train.model_fields_set and chosen not in values:
            reason = f"with {setting}={chosen}, but with {' or '.join(values)} alone"
            yield Idle("generator.train", (name,), reason, f"generator.train.{setting}")


def _tokenizer(recipe: Recipe) -> Iterator[Idle]:
    section, stated = recipe.tokenizer, recipe.tokenizer.model_fields_set
    if recipe.base is not None and section.train.policy == "head":
        if section.source is not None:
            reason = f"because the decoder of base={recipe.base} trains"
            yield Idle("tokenizer", ("source",), reason)
    elif recipe.base is not None:
        yield from _named("tokenizer", stated, f"because base={recipe.base} brings its tokenizer")
    elif section.freeze:
        reason = f"because {section.source} is taken as it is"
        yield from _named("tokenizer", stated - {"source", "freeze"}, reason)
    else:
        others = set(registry.names("tokenizers")) - {section.name}
        yield from _named("tokenizer", stated & others, f"on the tokenizer {section.name}")
        for name, reason in load_tokenizer_kind(section.name).unread.items():
            yield from _named("tokenizer", stated & {name}, reason)


def _named(section: str, names: set[str], reason: str) -> Iterator[Idle]:
    if names:
        yield Idle(section, tuple(sorted(names)), reason)
