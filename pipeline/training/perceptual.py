"""How different two images look: a distance between VGG16 features, for the tokenizer's loss.

Losses over pixels reward blur; features of early convolutions do not. This is LPIPS (Zhang et al.
2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", equation 1) without
its learned weights, on the first three stages alone: deeper ones cost most of the time and see
little in 64 pixels. Evaluation uses another network (pipeline/evaluation/features.py), so that
nothing is evaluated by features that it trained on.

    perceptual = PerceptualLoss(config.perceptual_features, cache)
    loss = perceptual(reconstructed, original)  # float (B, 3, H, W) in [-1, 1] both
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.errors import PretrainedNotFoundError
from pipeline.training.vgg import find_vgg

CAFFE_MEAN_BGR = (104.00699, 116.66877, 122.67892)  # what Caffe's VGG16 was trained with
STAGES = (("conv1_1", "conv1_2"), ("conv2_1", "conv2_2"), ("conv3_1",))
PARTS = ("weight", "bias")
_EPSILON = 1e-2  # of squared norms; features are of the order of 100


class PerceptualLoss(nn.Module):
    """LPIPS over conv1_2, conv2_2 and conv3_1, weighted alike; its weights never train.

    Args:
        features: a name in `vgg.VGG_SOURCES`, or the path of a safetensors file with VGG16's
            convolutions.
        cache: where the weights of a name are converted to, once.

    Raises:
        PretrainedNotFoundError: the features cannot be had.
    """

    mean: Tensor

    def __init__(self, features: str, cache: Path) -> None:
        super().__init__()
        weights = _load(find_vgg(features, cache=cache))
        # Buffers, not parameters, and not persistent: no optimiser and no checkpoint sees them.
        for name in (name for stage in STAGES for name in stage):
            kernel = weights[f"{name}.weight"].float().contiguous(memory_format=torch.channels_last)
            self.register_buffer(f"{name}_weight", kernel, persistent=False)
            self.register_buffer(f"{name}_bias", weights[f"{name}.bias"].float(), persistent=False)
        mean = torch.tensor(CAFFE_MEAN_BGR).reshape(1, 3, 1, 1)
        self.register_buffer("mean", mean, persistent=False)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """The batch's mean distance; gradients flow into `images` alone.

        Args:
            images, targets: float (B, 3, H, W), RGB in [-1, 1].
        """
        return self.distance(images, targets).mean()

    def distance(self, images: Tensor, targets: Tensor) -> Tensor:
        """The distance of every pair: (B,), 0 for equal images."""
        with torch.no_grad():
            wanted = self.features(targets)
        pairs = zip(self.features(images), wanted, strict=True)
        return torch.stack([_unit_distance(a, b) for a, b in pairs]).sum(0)

    def features(self, images: Tensor) -> list[Tensor]:
        """RGB in [-1, 1] -> activations (B, 64, H, W), (B, 128, H/2, W/2), (B, 256, H/4, W/4)."""
        x = (images.flip(1) + 1) * 127.5 - self.mean
        x = x.contiguous(memory_format=torch.channels_last)
        found = []
        for index, stage in enumerate(STAGES):
            x = F.max_pool2d(x, 2) if index else x
            for name in stage:
                kernel, bias = self.get_buffer(f"{name}_weight"), self.get_buffer(f"{name}_bias")
                x = F.relu(F.conv2d(x, kernel, bias, padding=1))
            found.append(x)
        return found


def _load(path: Path) -> dict[str, Tensor]:
    """The convolutions of STAGES.

    Raises:
        PretrainedNotFoundError: the file does not hold them.
    """
    try:
        weights = load_file(path)
        names = [f"{name}.{part}" for stage in STAGES for name in stage for part in PARTS]
        return {name: weights[name] for name in names}
    except (SafetensorError, KeyError) as error:
        raise PretrainedNotFoundError(
            f"{path} does not hold VGG16's convolutions ({error}); remove it if it is damaged, or "
            'name a safetensors file with "conv1_1.weight" and so on'
        ) from error


def _unit_distance(a: Tensor, b: Tensor) -> Tensor:
    """Squared distance of channel-normalised features, averaged over positions.

    ||a/|a| - b/|b|||^2 = 2 - 2 cos(a, b), which needs no normalised copies; the epsilons make it
    zero, with a finite gradient, where both features are zero.

    Args:
        a, b: (B, C, H, W).

    Returns:
        (B,).
    """
    dot = (a * b).sum(1, dtype=torch.float32)
    squares_a = a.square().sum(1, dtype=torch.float32)
    squares_b = b.square().sum(1, dtype=torch.float32)
    norms = ((squares_a + _EPSILON) * (squares_b + _EPSILON)).sqrt()
    return (2 - 2 * (dot + _EPSILON) / norms).mean((1, 2))
