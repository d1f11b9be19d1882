"""Bundles: a trained generator as one self-contained directory.

    config.json             the manifest: what was built, for which captions, styles and image size,
                            and the digests of the files
    model.safetensors       the generator's weights (float16)
    tokenizer/config.json   the image tokenizer, a directory that also stands alone
    tokenizer/model.safetensors
    text_tokenizer/         of families that are built around a pretrained language model
    README.md, samples.png  the model card

The frozen caption encoder is not in the bundle: its id and content digest are, and are checked when
the bundle is loaded. Weights are safetensors, so that loading a bundle cannot execute code.

    generator = load_generator("path/or/asset:base", pretrained_cache=home / "pretrained")
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import Tensor, nn

from pipeline.artifacts import WEIGHTS, bundle_digest, file_digest, resolve_path
from pipeline.config import CaptionEncoderConfig, Config, GeneratorConfig
from pipeline.contracts import ImageGenerator, ModelParts, ModelSpec
from pipeline.errors import BundleError
from pipeline.models import load_family
from pipeline.objective import GeneratorNetwork
from pipeline.runtime import cast_weights, choose_device
from pipeline.text.caption_encoder import load_caption_encoder
from pipeline.text.encoder_identity import EncoderIdentity, check_encoder
from pipeline.tokenizers._saved import (
    FORMAT,
    check_files,
    copy_tokenizer,
    load_tokenizer,
    load_weights,
    read_manifest,
    save_weights,
    write_manifest,
)

TEXT_TOKENIZER = "text_tokenizer"


class BundleManifest(Config):
    """The content of a bundle's config.json."""

    format: int = FORMAT
    image_size: int
    generator: GeneratorConfig
    spec: dict[str, Any] = Field(description="ModelSpec")
    caption_encoder: CaptionEncoderConfig
    encoder_identity: dict[str, Any] = Field(description="EncoderIdentity")
    split: str | None = Field(None, description="DataConfig.split that it was trained with")
    pretrained_features: dict[str, str] = Field(
        {},
        description="the pretrained image features that the generator's training used, sha256 by "
        "name; its tokenizer's are in the tokenizer's own manifest",
    )
    files: dict[str, str] = Field(description="sha256 by file name")

    @property
    def model_spec(self) -> ModelSpec:
        spec = {"image_size": self.image_size, **self.spec}
        return ModelSpec(**spec | {k: tuple(spec[k]) for k in ("levels", "styles")})

    @property
    def encoder(self) -> EncoderIdentity:
        """The caption encoder it was trained with."""
        return EncoderIdentity.from_dict(self.encoder_identity)


@dataclass
class Bundle:
    """A bundle in memory, without its caption encoder.

    Attributes:
        manifest: what config.json says.
        model: the generator's network.
        tokenizer: the image tokenizer.
        digest: see `artifacts.bundle_digest`.
    """

    manifest: BundleManifest
    model: GeneratorNetwork
    tokenizer: Any
    digest: str


def save_bundle(
    directory: Path,
    *,
    weights: Mapping[str, Tensor],
    tokenizer: Path,
    image_size: int,
    config: GeneratorConfig,
    spec: ModelSpec,
    caption_encoder: CaptionEncoderConfig,
    identity: EncoderIdentity,
    text_tokenizer: str | None = None,
    split: str | None = None,
    pretrained_features: Mapping[str, str] | None = None,
) -> None:
    """Write a bundle's directory.

    Args:
        weights: of the generator's network.
        tokenizer: an image tokenizer's directory, which is copied.
        config: the recipe's section, complete.
        spec: the sizes that the network was built by.
        caption_encoder: the recipe's section.
        identity: of the caption encoder.
        text_tokenizer: where the text tokenizer of a pretrained language model lies; it is copied.
        split: DataConfig.split of the training.
        pretrained_features: the pretrained image features that the training used, sha256 by name.
    """
    directory.mkdir(parents=True, exist_ok=True)
    copy_tokenizer(tokenizer, directory / "tokenizer")
    files = {WEIGHTS: save_weights(directory, weights)}
    if text_tokenizer is not None:
        from transformers import AutoTokenizer  # a second to import, for a few bundles alone

        reader = AutoTokenizer.from_pretrained(text_tokenizer)
        reader.save_pretrained(directory / TEXT_TOKENIZER)
        copied = sorted(p for p in (directory / TEXT_TOKENIZER).rglob("*") if p.is_file())
        files |= {p.relative_to(directory).as_posix(): file_digest(p) for p in copied}
    manifest = BundleManifest(
        image_size=image_size,
        generator=config,
        spec=asdict(spec),
        caption_encoder=caption_encoder,
        encoder_identity=asdict(identity),
        split=split,
        pretrained_features=dict(pretrained_features or {}),
        files=files,
    )
    write_manifest(directory, manifest)


def read_bundle(bundle: str | Path) -> BundleManifest:
    """A bundle's manifest; no weights are read.

    Raises:
        BundleError: it is missing, or of another format.
    """
    return read_manifest(resolve_path(bundle), BundleManifest)


def load_bundle(bundle: str | Path) -> Bundle:
    """The networks of a bundle, on the CPU, in float32.

    Raises:
        BundleError: it is missing, damaged, or of another format.
    """
    path = resolve_path(bundle)
    manifest = read_manifest(path, BundleManifest)
    family = load_family(manifest.generator.family)
    model = family.build(manifest.generator, manifest.model_spec)
    load_weights(model, path, manifest.files)
    return Bundle(manifest, model, load_tokenizer(path / "tokenizer"), bundle_digest(path))


def check_bundle(bundle: Path) -> None:
    """Check that every file of a bundle is the one that its manifest names.

    Raises:
        BundleError: one is missing or another one, or the manifest cannot be read.
    """
    check_files(bundle, read_bundle(bundle).files)


def load_generator(
    bundle: str | Path, *, pretrained_cache: Path, device: str = "auto"
) -> ImageGenerator:
    """A bundle as a generator, with the caption encoder that it was trained with.

    Raises:
        BundleError: the bundle is unusable, weights of it are no finite numbers, or the caption
            encoder found is another one.
        PretrainedNotFoundError: the caption encoder cannot be found.
    """
    loaded = load_bundle(bundle)
    manifest = loaded.manifest
    for network in (loaded.model, loaded.tokenizer):
        _check_finite(network, bundle)
    target = choose_device(device)
    encoder = load_caption_encoder(
        manifest.caption_encoder, cache=pretrained_cache, device=str(target)
    )
    check_encoder(manifest.encoder, encoder)
    for network in (loaded.model, loaded.tokenizer):
        cast_weights(network, target)
    family = load_family(manifest.generator.family)
    caption_tokenizer = family.caption_tokenizer(
        manifest.generator, text_tokenizer_of(resolve_path(bundle))
    )
    parts = ModelParts(loaded.tokenizer.to(target), encoder, target, caption_tokenizer)
    return family.generator(loaded.model, manifest.generator, manifest.model_spec, parts)


def _check_finite(network: nn.Module, bundle: str | Path) -> None:
    for name, weight in network.named_parameters():
        if not weight.isfinite().all():
            raise BundleError(
                f"{bundle}: the weights {name} are not finite numbers, so nothing can be drawn "
                "with it: its training diverged; use another version, or train it anew with a "
                "smaller learning rate"
            )


def text_tokenizer_of(bundle: Path) -> str | None:
    """Where a bundle keeps the text tokenizer of its language model; None if it has none, because
    it reads UTF-8 bytes or the caption encoder's states."""
    directory = bundle / TEXT_TOKENIZER
    return str(directory) if directory.is_dir() else None
