"""Bundles: a trained generator as one self-contained directory.

    config.json             what was built, for which captions, styles and picture size; digests
    model.safetensors       the generator's weights (float16)
    tokenizer/config.json   the image tokenizer, a directory that also stands alone
    tokenizer/model.safetensors
    text_tokenizer/         of families that grow out of a pretrained language model
    README.md, samples.png  the model card

A frozen caption encoder is named by id and content digest, checked at load, instead of carried.
Weights are safetensors alone: nothing in a bundle can execute.

    generator = load_generator("path/or/asset:base", pretrained_cache=home / "pretrained")
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from pipeline import registry
from pipeline.artifacts import WEIGHTS, bundle_digest, file_digest, resolve_path
from pipeline.config import CaptionEncoderConfig, Config, GeneratorConfig, TokenizerConfig
from pipeline.contracts import ImageGenerator
from pipeline.errors import BundleError, RecipeError
from pipeline.models._captions import CaptionTokenizer
from pipeline.models._spec import ModelParts, ModelSpec
from pipeline.overrides import shaped_like
from pipeline.runtime import cast_weights, choose_device
from pipeline.text import EncoderIdentity, check_encoder, load_caption_encoder

FORMAT = 1
TEXT_TOKENIZER = "text_tokenizer"
TOKENIZER_SHAPE = (
    "name", "levels", "codebook_size", "code_width", "downsample", "patch", "widths",
    "encoder_depths", "decoder_depths",
)  # fmt: skip


class TokenizerManifest(Config):
    """tokenizer/config.json."""

    format: int = FORMAT
    image_size: int
    tokenizer: TokenizerConfig
    files: dict[str, str] = Field(description="sha256 by file name")


class BundleManifest(Config):
    """config.json of a bundle."""

    format: int = FORMAT
    image_size: int
    generator: GeneratorConfig
    spec: dict[str, Any] = Field(description="ModelSpec")
    caption_encoder: CaptionEncoderConfig
    encoder_identity: dict[str, Any] = Field(description="EncoderIdentity")
    split: str | None = Field(None, description="DataConfig.split that it was trained with")
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
    """A bundle in memory: networks without the caption encoder."""

    manifest: BundleManifest
    model: nn.Module
    tokenizer: Any
    digest: str


def resolve_tokenizer(source: str | Path) -> Path:
    """A tokenizer's directory, a bundle's directory or asset:NAME: the tokenizer's directory.

    Raises:
        BundleError: there is neither at that place.
    """
    path = resolve_path(source)
    inner = path / "tokenizer"
    return inner.absolute() if inner.is_dir() else path.absolute()


def tokenizer_source(base: Path | None, config: TokenizerConfig, image_size: int) -> Path | None:
    """Where the tokenizer lies that is taken or trained on: the base's, or the recipe's source;
    None: one is trained from scratch.

    Raises:
        BundleError: there is none at `config.source`.
        RecipeError: its tokens are kept, and are of pictures of another size.
    """
    if base is not None:
        path = base / "tokenizer"
    elif config.source is not None:
        path = resolve_tokenizer(config.source)
    else:
        return None
    if base is None and not config.freeze:
        return path
    made_for = _read_manifest(path, TokenizerManifest).image_size
    if made_for != image_size:
        raise RecipeError(
            f"preprocess.image_size={image_size}: the tokenizer at {path} was made for {made_for}; "
            "set that, or train a tokenizer (without base and tokenizer.freeze)"
        )
    return path


def tokenizer_shape_of_source(config: TokenizerConfig, source: Path | None) -> TokenizerConfig:
    """The recipe's section with what it leaves open of the network's shape from the source; as it
    is without one.

    Raises:
        RecipeError: the recipe sets a shape that is not the source's.
        BundleError: the source cannot be read.
    """
    if source is None:
        return config
    built = _read_manifest(source, TokenizerManifest).tokenizer
    whose = f"that of the tokenizer in {source}"
    values = shaped_like(config, built, TOKENIZER_SHAPE, section="tokenizer", whose=whose)
    return TokenizerConfig.model_validate(values)


def save_tokenizer(
    directory: Path, weights: Mapping[str, Tensor], config: TokenizerConfig, image_size: int
) -> None:
    """Write a tokenizer directory; where its training started from is the card's to say."""
    directory.mkdir(parents=True, exist_ok=True)
    config = config.model_copy(update={"source": None, "freeze": False})
    files = {WEIGHTS: _save_weights(directory / WEIGHTS, weights)}
    manifest = TokenizerManifest(image_size=image_size, tokenizer=config, files=files)
    (directory / "config.json").write_text(manifest.model_dump_json(indent=2))


def load_tokenizer(directory: Path) -> Any:
    """The ImageTokenizer of a tokenizer directory, in evaluation mode.

    Raises:
        BundleError: it is missing, damaged, or of another format.
    """
    manifest = _read_manifest(directory, TokenizerManifest)
    module = registry.load("tokenizers", manifest.tokenizer.name)
    tokenizer = module.build(manifest.tokenizer, manifest.image_size)
    _load_weights(tokenizer, directory, manifest.files)
    return tokenizer.eval()


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
) -> None:
    """Write a bundle around a copy of the tokenizer directory `tokenizer`.

    Args:
        split: DataConfig.split of its training.
        text_tokenizer: where the tokenizer of a pretrained language model lies, to be copied too.
    """
    directory.mkdir(parents=True, exist_ok=True)
    copy_tokenizer(tokenizer, directory / "tokenizer")
    files = {WEIGHTS: _save_weights(directory / WEIGHTS, weights)}
    if text_tokenizer is not None:
        reader = transformers.AutoTokenizer.from_pretrained(text_tokenizer)
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
        files=files,
    )
    (directory / "config.json").write_text(manifest.model_dump_json(indent=2))


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer directory's files, and those alone."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", WEIGHTS):
        (target / name).write_bytes((source / name).read_bytes())


def read_bundle(bundle: str | Path) -> BundleManifest:
    """What a bundle says of itself, without its weights.

    Raises:
        BundleError: it is missing, or of another format.
    """
    return _read_manifest(resolve_path(bundle), BundleManifest)


def load_bundle(bundle: str | Path) -> Bundle:
    """The networks of a bundle, on the CPU, in float32.

    Raises:
        BundleError: it is missing, damaged, or of another format.
    """
    path = resolve_path(bundle)
    manifest = _read_manifest(path, BundleManifest)
    family = registry.load("models", manifest.generator.family)
    model = family.build(manifest.generator, manifest.model_spec)
    _load_weights(model, path, manifest.files)
    return Bundle(manifest, model, load_tokenizer(path / "tokenizer"), bundle_digest(path))


def load_generator(
    bundle: str | Path, *, pretrained_cache: Path, device: str = "auto"
) -> ImageGenerator:
    """A bundle ready to draw, with the caption encoder it was trained on.

    Raises:
        BundleError: the bundle is unusable, or the caption encoder found is another one.
        PretrainedNotFoundError: the caption encoder cannot be found.
    """
    loaded = load_bundle(bundle)
    manifest = loaded.manifest
    target = choose_device(device)
    encoder = load_caption_encoder(
        manifest.caption_encoder, cache=pretrained_cache, device=str(target)
    )
    check_encoder(manifest.encoder, encoder)
    for network in (loaded.model, loaded.tokenizer):
        cast_weights(network, target)
    family = registry.load("models", manifest.generator.family)
    caption_ids = None
    if family.CAPTIONS == "ids":
        source = text_tokenizer_of(resolve_path(bundle))
        caption_ids = CaptionTokenizer(source, manifest.generator.causal.max_prompt_tokens)
    parts = ModelParts(loaded.tokenizer.to(target), encoder, target, caption_ids)
    generator: ImageGenerator = family.Generator(
        loaded.model, manifest.generator, manifest.model_spec, parts
    )
    return generator


def text_tokenizer_of(bundle: Path) -> str | None:
    """A bundle's tokenizer of its language model; None if it reads bytes, or encoder states."""
    directory = bundle / TEXT_TOKENIZER
    return str(directory) if directory.is_dir() else None


M = TypeVar("M", bound=Config)


def _read_manifest(directory: Path, kind: type[M]) -> M:
    path = directory / "config.json"
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BundleError(f"cannot read {path}: {error}") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else None
        raise BundleError(f"{path} has format {found!r}; this version of Tessera reads {FORMAT}")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise BundleError(f"{path} is not a bundle of this version: {error}") from error


def _save_weights(path: Path, weights: Mapping[str, Tensor]) -> str:
    """float16 on disk; returns the file's sha256."""
    halved = {
        name: (t.half() if t.is_floating_point() else t).cpu().contiguous()
        for name, t in weights.items()
    }
    path.write_bytes(save(halved))  # save_file's are for nobody but their owner to read
    return file_digest(path)


def _load_weights(model: nn.Module, directory: Path, files: Mapping[str, str]) -> None:
    for name in {WEIGHTS, *files}:
        path = directory / name
        if not path.is_file():
            raise BundleError(f"{path} is missing: copy the bundle again")
        if file_digest(path) != files.get(name):
            raise BundleError(
                f"{path} is not the file its config.json names: copy the bundle again"
            )
    path = directory / WEIGHTS
    try:
        weights = load_file(path)
        model.load_state_dict(
            {n: t.float() if t.dtype == torch.float16 else t for n, t in weights.items()}
        )
    except (SafetensorError, RuntimeError) as error:
        raise BundleError(f"{path} does not fit its config.json: {error}") from error
