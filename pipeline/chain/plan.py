"""Resolving a recipe: everything that a chain needs to know, found before any work is started.

    plan = resolve(load_recipe("emoji-demo"), home=Path(".tessera"))
    plan.tokenizer.trains, plan.candidates["candidate"].spec.num_tokens

A `Plan` is frozen and complete: shard manifests, base, tokenizer, caption encoder, and for each
candidate its family, its completed section and the sizes of its network. Nothing else asks where a
shape or a default comes from. `pipeline.chain.preflight` checks a plan, `pipeline.chain.table`
makes the table of its steps, `pipeline.chain.workflow` runs them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pipeline.artifacts import bundle_digest, resolve_path
from pipeline.bundles.bundle import text_tokenizer_of
from pipeline.bundles.registry import resolve_model
from pipeline.chain.shapes import check_generator, make_spec, shape_of_base
from pipeline.config import CaptionEncoderConfig, GeneratorConfig, Recipe, TokenizerConfig
from pipeline.contracts import Family, ModelSpec
from pipeline.data.shards.manifest import Manifest, locate, read_manifest, verify
from pipeline.models import load_family
from pipeline.objective import TokenizerNetwork
from pipeline.runtime import choose_device
from pipeline.text.caption_encoder import HFCaptionEncoder, load_caption_encoder
from pipeline.text.encoder_identity import EncoderIdentity, encoder_width, identity_of
from pipeline.text.pretrained import content_digest, find_language_model
from pipeline.tokenizers import build_tokenizer
from pipeline.tokenizers._saved import (
    TokenizerManifest,
    tokenizer_shape_of_source,
    tokenizer_source,
)  # fmt: skip
from pipeline.tokenizers._saved import (
    read_manifest as read_tokenizer_manifest,
)


@dataclass(frozen=True)
class EncoderPlan:
    """The caption encoder: where it lies and what is known of it without loading it.

    Attributes:
        source: a directory or hub id.
        digest: of its files, or its commit on the hub.
        width: of its states.
        cache: where pretrained weights are converted to.
    """

    config: CaptionEncoderConfig
    source: str
    digest: str
    width: int
    cache: Path

    def identity(self) -> EncoderIdentity:
        """What a bundle's own is compared with; the encoder is loaded if it is not remembered."""
        return identity_of(self.config, cache=self.cache)

    def load(self) -> HFCaptionEncoder:
        """The encoder on this process' device; the same object whenever it is asked for."""
        return load_caption_encoder(self.config, cache=self.cache, device=str(choose_device()))


@dataclass(frozen=True)
class TokenizerPlan:
    """The image tokenizer: taken as it is, trained on from a source, or trained from scratch.

    Attributes:
        config: complete, with the shape of the source.
        image_size: pixels per side.
        source: the directory that it is taken or trained on from; None from scratch.
        trains: whether a step trains it.
    """

    config: TokenizerConfig
    image_size: int
    source: Path | None
    trains: bool

    def shape(self) -> TokenizerNetwork:
        """The network on PyTorch's meta device: sizes without weights.

        Raises:
            RecipeError: the sizes do not fit together.
        """
        self.config.check_grid(self.image_size)
        with torch.device("meta"):
            return build_tokenizer(self.config, self.image_size)


@dataclass(frozen=True)
class Candidate:
    """A generator to train.

    Attributes:
        name: the recipe's name for it; "candidate" where there is only one.
        section: of the recipe; names it in messages, and its step.
        config: complete, with what it takes from the base.
        spec: the sizes of its network. Its styles are those that the shards promise; training keeps
            those of them that preprocessing accepted images of (`Plan.spec`).
        language_model: where the pretrained language model lies that its network is built around,
            or the base's text tokenizer.
    """

    name: str
    section: str
    config: GeneratorConfig
    spec: ModelSpec
    language_model: str | None

    @property
    def family(self) -> Family:
        return load_family(self.config.family)

    @property
    def step(self) -> str:
        """The name of the step that trains it."""
        return "generator" if self.section == "generator" else f"generator-{self.name}"


@dataclass(frozen=True)
class Plan:
    """A resolved recipe.

    Attributes:
        home: absolute, since workers may run in another directory.
        shards: manifests by located URI.
        lacking: files of shards that are missing and may be, by input name, so that work is done
            anew once they are back.
        base: the bundle that training starts from.
        aligner: the directory of a trained one; None if a step trains it.
        aligner_source: the directory of the one that this training goes on from.
        candidates: by name.
    """

    recipe: Recipe
    home: Path
    shards: Mapping[str, Manifest]
    lacking: Mapping[str, str]
    base: Path | None
    tokenizer: TokenizerPlan
    encoder: EncoderPlan
    aligner: Path | None
    aligner_source: Path | None
    candidates: Mapping[str, Candidate]

    @property
    def cache(self) -> Path:
        """Where pretrained weights are converted to."""
        return self.encoder.cache

    @property
    def styles(self) -> list[str]:
        """Of all images that the shards promise, sorted."""
        return sorted({style for manifest in self.shards.values() for style in manifest.styles})

    def candidate(
        self, config: GeneratorConfig, name: str = "candidate", section: str = "generator"
    ) -> Candidate:
        """A generator's section, resolved: what it leaves open of the shape is the base's.

        Raises:
            RecipeError: a shape that is not the base's, settings that the family cannot follow, or
                more styles than places.
            PretrainedNotFoundError: its language model is nowhere to be found.
        """
        config = shape_of_base(config, self.base)
        check_generator(config, section)
        if self.base is not None:
            language_model = text_tokenizer_of(self.base)
        else:
            wanted = load_family(config.family).language_model(config)
            language_model = find_language_model(wanted, cache=self.cache) if wanted else None
        spec = self.spec(config, self.styles, language_model)
        return Candidate(name, section, config, spec, language_model)

    def spec(
        self, config: GeneratorConfig, styles: Collection[str], language_model: str | None
    ) -> ModelSpec:
        """The sizes of a generator that learns those of `styles` which its section keeps.

        Raises:
            RecipeError: more styles than places.
        """
        return make_spec(
            self.tokenizer.shape(), self.encoder.width, config.data.kept(styles), self.base, config,
            language_model,
        )  # fmt: skip


def resolve(recipe: Recipe, home: Path) -> Plan:
    """Find everything that the recipe names; nothing is trained or written but, for pretrained
    models that come in a package, their conversion.

    Raises:
        TesseraError: shards, base, tokenizer, caption encoder or tracking server are lacking, or
            the recipe sets a shape that is not that of its base.
    """
    home = home.absolute()
    base = resolve_model(recipe.base, home=home).path if recipe.base else None
    manifests = {
        uri: read_manifest(uri) for uri in (locate(uri, home) for uri in recipe.data.shards)
    }
    given = recipe.aligner.source
    aligner = None if given is None else resolve_path(given).absolute()
    plan = Plan(
        recipe=recipe,
        home=home,
        shards=manifests,
        lacking=_lacking(recipe, manifests),
        base=base,
        tokenizer=_tokenizer(recipe, base),
        encoder=_encoder(recipe.caption_encoder, home / "pretrained"),
        aligner=None if recipe.aligner.is_trained else aligner,
        aligner_source=aligner if recipe.aligner.is_trained else None,
        candidates={},
    )
    candidates = {
        name: plan.candidate(
            config, name, f"candidates.{name}" if recipe.candidates else "generator"
        )
        for name, config in recipe.generators.items()
    }
    return replace(plan, candidates=candidates)


def given_inputs(plan: Plan) -> dict[str, str]:
    """Digests of the models that a generator is trained with and no step makes, by input name."""
    source = plan.tokenizer.source
    given = None if plan.tokenizer.trains else source
    return {
        **({"tokenizer": bundle_digest(given)} if given is not None else {}),
        **({"base": bundle_digest(plan.base)} if plan.base is not None else {}),
    }


def _lacking(recipe: Recipe, manifests: Mapping[str, Manifest]) -> dict[str, str]:
    if not recipe.data.allow_missing_shards:
        return {}
    found = {}
    for i, uri in enumerate(manifests):
        if files := [p.file for p in verify(uri) if p.kind != "surplus"]:
            found[f"shards-{i}-without"] = " ".join(files)
    return found


def _tokenizer(recipe: Recipe, base: Path | None) -> TokenizerPlan:
    section, size = recipe.tokenizer, recipe.preprocess.image_size
    source = tokenizer_source(base, section, size)
    if section.is_trained(on_base=base is not None):
        return TokenizerPlan(tokenizer_shape_of_source(section, source), size, source, trains=True)
    assert source is not None, "a tokenizer that is not trained is taken from somewhere"
    built = read_tokenizer_manifest(source, TokenizerManifest)
    return TokenizerPlan(built.tokenizer, built.image_size, source, trains=False)


def _encoder(config: CaptionEncoderConfig, cache: Path) -> EncoderPlan:
    width = encoder_width(config, cache=cache)
    source = find_language_model(config.model, cache=cache)
    return EncoderPlan(config, source, content_digest(source, cache=cache), width, cache)
