"""Trained tokenizers on disk: a directory that stands alone, or the folder tokenizer/ of a bundle.

    config.json         the manifest: the recipe's section it was built from, its image size
    model.safetensors   its weights (float16)

    save_tokenizer(directory, tokenizer.state_dict(), config, image_size=64)
    tokenizer = load_tokenizer(resolve_tokenizer("asset:base"))

A manifest names the sha256 of the weights, which is checked at load; safetensors cannot execute
anything. Bundles (pipeline/bundles/bundle.py) keep their manifest and weights by the same
functions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from pipeline.artifacts import WEIGHTS, file_digest, resolve_path
from pipeline.config.overrides import explain, shaped_like
from pipeline.config.section import Config
from pipeline.config.tokenizer import TokenizerConfig
from pipeline.errors import BundleError, RecipeError
from pipeline.objective import TokenizerNetwork
from pipeline.tokenizers import build_tokenizer, load_tokenizer_kind

FORMAT = 1
"""Of manifests; this version of Tessera reads no other."""
MANIFEST = "config.json"

M = TypeVar("M", bound=BaseModel)


class TokenizerManifest(Config):
    """config.json of a tokenizer's directory."""

    format: int = FORMAT
    image_size: int
    tokenizer: TokenizerConfig
    pretrained_features: dict[str, str] | None = Field(
        None,
        description="the pretrained image features that its training used, sha256 by name; None: "
        "of a version that did not record them",
    )
    files: dict[str, str] = Field(description="sha256 by file name")

    @property
    def trained_on(self) -> dict[str, str]:
        """The pretrained features that its training used; where they were not recorded, those of
        its settings, without a sha256."""
        if self.pretrained_features is not None:
            return self.pretrained_features
        return {self.tokenizer.perceptual_features: ""} if self.tokenizer.perceptual_weight else {}


def resolve_tokenizer(source: str | Path) -> Path:
    """The absolute tokenizer directory of a tokenizer, of a bundle or of asset:NAME.

    Raises:
        BundleError: there is neither at that place.
    """
    path = resolve_path(source)
    inner = path / "tokenizer"
    return inner.absolute() if inner.is_dir() else path.absolute()


def tokenizer_source(base: Path | None, config: TokenizerConfig, image_size: int) -> Path | None:
    """The directory of the tokenizer that a recipe takes as it is or trains on.

    Args:
        base: the bundle that the recipe goes on from; its tokenizer comes before `config.source`.
        image_size: pixels per side of the recipe's images.

    Returns:
        None if the recipe trains a tokenizer from scratch.

    Raises:
        BundleError: there is none at `config.source`.
        RecipeError: its tokens are kept, and are of images of another size.
    """
    if base is not None:
        path = base / "tokenizer"
    elif config.source is not None:
        path = resolve_tokenizer(config.source)
    else:
        return None
    if base is None and not config.freeze:
        return path
    made_for = read_manifest(path, TokenizerManifest).image_size
    if made_for != image_size:
        raise RecipeError(
            f"preprocess.image_size={image_size}: the tokenizer at {path} was made for {made_for}; "
            "set that, or train a tokenizer (without base and tokenizer.freeze)"
        )
    return path


def tokenizer_shape_of_source(config: TokenizerConfig, source: Path | None) -> TokenizerConfig:
    """The recipe's section; what it leaves open of the network's shape is taken from the source.

    Raises:
        RecipeError: the recipe sets a shape that is not the source's.
        BundleError: the source cannot be read.
    """
    if source is None:
        return config
    built = read_manifest(source, TokenizerManifest).tokenizer
    whose = f"that of the tokenizer in {source}"
    values = shaped_like(config, built, ("name",), section="tokenizer", whose=whose)
    config = TokenizerConfig.model_validate(values)
    fields = load_tokenizer_kind(built.name).shape_fields
    values = shaped_like(
        config.completed(), built.completed(), fields, section="tokenizer", whose=whose
    )
    return TokenizerConfig.model_validate(values)


def save_tokenizer(
    directory: Path,
    weights: Mapping[str, Tensor],
    config: TokenizerConfig,
    image_size: int,
    *,
    pretrained_features: Mapping[str, str] | None = None,
) -> None:
    """Write a tokenizer's directory. It does not say what its training started from.

    Args:
        pretrained_features: the pretrained image features that its training used, sha256 by name;
            None if that is not known.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = config.model_copy(update={"source": None, "freeze": False})
    files = {WEIGHTS: save_weights(directory, weights)}
    manifest = TokenizerManifest(
        image_size=image_size,
        tokenizer=config,
        pretrained_features=None if pretrained_features is None else dict(pretrained_features),
        files=files,
    )
    write_manifest(directory, manifest)


def load_tokenizer(directory: Path) -> TokenizerNetwork:
    """The tokenizer of a tokenizer directory, on the CPU, in float32 and evaluation mode.

    Raises:
        BundleError: it is missing, damaged, of another format, or of a kind of tokenizer that is
            not installed here.
    """
    manifest = read_manifest(directory, TokenizerManifest)
    tokenizer = build_tokenizer(manifest.tokenizer, manifest.image_size)
    load_weights(tokenizer, directory, manifest.files)
    return tokenizer.eval()


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer directory's files, and those alone."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (MANIFEST, WEIGHTS):
        (target / name).write_bytes((source / name).read_bytes())


# ---- Manifest and weights, of tokenizers and bundles alike ---------------------------------------


def read_manifest(directory: Path, kind: type[M]) -> M:
    """A directory's config.json, checked against its model.

    Raises:
        BundleError: it is missing, of another format, or not a manifest of that kind.
    """
    path = directory / MANIFEST
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
        said = explain(error, kind)
        raise BundleError(f"{path} is not a bundle of this version: {said}") from error


def write_manifest(directory: Path, manifest: BaseModel) -> None:
    """Write a directory's config.json."""
    (directory / MANIFEST).write_text(manifest.model_dump_json(indent=2))


def save_weights(directory: Path, weights: Mapping[str, Tensor]) -> str:
    """Write model.safetensors with all floats as float16; returns the file's sha256."""
    halved = {
        name: (t.half() if t.is_floating_point() else t).cpu().contiguous()
        for name, t in weights.items()
    }
    path = directory / WEIGHTS
    # Not safetensors' save_file, whose files nobody but their owner may read.
    path.write_bytes(save(halved))
    return file_digest(path)


def check_files(directory: Path, files: Mapping[str, str]) -> None:
    """A directory's files are whole.

    Args:
        files: sha256 by file name, as the directory's manifest says.

    Raises:
        BundleError: a file is missing or was changed.
    """
    for name in sorted({WEIGHTS, *files}):
        path = directory / name
        if not path.is_file():
            raise BundleError(f"{path} is missing: copy the bundle again")
        if file_digest(path) != files.get(name):
            raise BundleError(
                f"{path} is not the file its config.json names: copy the bundle again"
            )


def load_weights(network: nn.Module, directory: Path, files: Mapping[str, str]) -> None:
    """Load a directory's weights into a network, in float32.

    Args:
        files: sha256 by file name, as the directory's manifest says; every one is checked.

    Raises:
        BundleError: a file is missing or was changed, or the weights do not fit the network.
    """
    check_files(directory, files)
    path = directory / WEIGHTS
    try:
        weights = load_file(path)
        network.load_state_dict(
            {n: t.float() if t.dtype == torch.float16 else t for n, t in weights.items()}
        )
    except (SafetensorError, RuntimeError) as error:
        raise BundleError(f"{path} does not fit its config.json: {error}") from error
