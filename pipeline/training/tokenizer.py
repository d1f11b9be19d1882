"""The image tokenizer's training: `tessera pretrain RECIPE`.

It is self-supervised: images in, the same images out, without captions. A tokenizer of any kind
(pipeline/tokenizers) trains by the same reconstruction losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from pipeline.artifacts import file_digest
from pipeline.config import TokenizerConfig
from pipeline.images.grid import grid
from pipeline.images.pixels import gradient_l1, to_float, to_uint8
from pipeline.objective import Objective, TokenizerNetwork
from pipeline.tokenizers import build_tokenizer
from pipeline.tokenizers._saved import (
    TokenizerManifest,
    load_tokenizer,
    read_manifest,
    save_tokenizer,
)
from pipeline.tracking.steps import StepContext
from pipeline.training.checkpoint import best_weights
from pipeline.training.datasets import ImageDataset
from pipeline.training.loop import Training, fit
from pipeline.training.perceptual import PerceptualLoss
from pipeline.training.vgg import find_vgg


class PatchDiscriminator(nn.Module):
    """Tells real images from reconstructions, patch by patch.

    Sources: Isola et al. 2017, pix2pix (arXiv 1611.07004), section 3.2.2; Miyato et al. 2018 (arXiv
    1802.05957): spectral normalisation.

    Args:
        channels: of the first layer.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = (3, channels, 2 * channels, 4 * channels)
        layers: list[nn.Module] = []
        for inside, outside in pairwise(widths):
            layers += [nn.Conv2d(inside, outside, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        layers.append(nn.Conv2d(widths[-1], 1, 3, padding=1))
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                spectral_norm(layer)
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """float (B, 3, H, W) in [-1, 1] -> logits (B, 1, H / 8, W / 8), higher for real ones."""
        logits: Tensor = self.layers(images)
        return logits


class TokenizerObjective(Objective):
    """A tokenizer with its reconstruction losses: L1, L2, image gradients, perceptual, adversarial.

    The last two act where the recipe gives them weight. The adversarial term follows Esser et al.
    2021, VQGAN (arXiv 2012.09841), section 3.1, with hinge losses.

    A batch holds "images" uint8 (B, 3, H, W).

    Args:
        config: the recipe's section, with the weights of the losses.
        image_size: H = W.
        perceptual: a distance of two batches of images, a scalar; None leaves the term out.
    """

    phases: tuple[str, ...]
    model: TokenizerNetwork
    discriminator: PatchDiscriminator | None

    def __init__(
        self, config: TokenizerConfig, image_size: int, perceptual: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.model = build_tokenizer(config, image_size)
        self.perceptual = perceptual
        self.phases, self.discriminator = ("reconstruct",), None
        if config.adversarial_weight:
            self.phases = ("discriminate", "reconstruct")
            self.discriminator = PatchDiscriminator(config.adversarial_channels)

    def trained_network(self, phase: str) -> nn.Module:
        """See `Objective.trained_network`."""
        if phase == "discriminate":
            assert self.discriminator is not None
            return self.discriminator
        return self.model

    def losses(self, batch: Mapping[str, Tensor], phase: str) -> dict[str, Tensor]:
        """ "loss", its parts, and "psnr" in dB of the batch's mean squared error."""
        images = to_float(batch["images"])
        if phase == "discriminate":
            return self._discriminate(images)
        parts, reconstruction = self._reconstruct(images)
        if self.discriminator is not None:
            parts["adversarial"] = -self.discriminator(reconstruction).float().mean()
            parts["loss"] = parts["loss"] + self.config.adversarial_weight * parts["adversarial"]
        return parts

    def validate(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The reconstruction losses without the adversarial one, which cannot be compared between
        steps: the discriminator changes."""
        return self._reconstruct(to_float(batch["images"]))[0]

    def _discriminate(self, images: Tensor) -> dict[str, Tensor]:
        discriminator = self.discriminator
        assert discriminator is not None
        with torch.no_grad():
            reconstruction = self.model(images)[0].float()
        parts = {
            "real": F.relu(1 - discriminator(images).float()).mean(),
            "fake": F.relu(1 + discriminator(reconstruction).float()).mean(),
        }
        return {"loss": parts["real"] + parts["fake"], **parts}

    def _reconstruct(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        config = self.config
        reconstruction, quantizer_loss = self.model(images)
        reconstruction = reconstruction.float()
        difference = reconstruction - images
        parts = {
            "l1": difference.abs().mean(),
            "l2": difference.square().mean(),
            "gradient": gradient_l1(reconstruction, images).mean(),
        }
        loss = (
            config.l1_weight * parts["l1"]
            + config.l2_weight * parts["l2"]
            + config.gradient_weight * parts["gradient"]
            + quantizer_loss
        )
        if self.perceptual is not None:
            seen = max(1, round(len(images) * config.perceptual_fraction))
            parts["perceptual"] = self.perceptual(reconstruction[:seen], images[:seen])
            loss = loss + config.perceptual_weight * parts["perceptual"]
        mse = parts["l2"].detach() / 4  # [-1, 1] -> [0, 1]
        parts["psnr"] = -10 * torch.log10(mse.clamp_min(1e-10))
        return {"loss": loss, **parts}, reconstruction


def build_training(
    pixels: Path,
    config: TokenizerConfig,
    image_size: int,
    *,
    cache: Path,
    source: Path | None = None,
) -> Training:
    """What every worker of the training builds: the objective and its data sets.

    Args:
        pixels: the output of preprocessing.
        cache: where pretrained weights are converted to.
        source: the directory of a trained tokenizer of the section's shape, from whose weights
            training goes on; None trains from scratch.

    Raises:
        TesseraError: perceptual features, data or the source cannot be used.
    """
    perceptual = (
        PerceptualLoss(config.perceptual_features, cache) if config.perceptual_weight else None
    )
    train, validation = (
        ImageDataset.from_parquet(
            pixels, image_size=image_size, split=split, image_filter=config.data
        )
        for split in ("train", "validation")
    )
    objective = TokenizerObjective(config, image_size, perceptual)
    if source is not None:
        objective.model.load_state_dict(load_tokenizer(source).state_dict())
    shown = validation.batch(np.arange(min(16, len(validation))), None)["images"]
    return Training(objective, train, validation, sample=partial(reconstruction_grid, images=shown))


def train_tokenizer(
    context: StepContext,
    pixels: Path,
    config: TokenizerConfig,
    image_size: int,
    *,
    cache: Path,
    source: Path | None = None,
) -> dict[str, float]:
    """Train a tokenizer on Ray and save it as "bundle" in the step's directory.

    The arguments are those of `build_training`.

    Returns:
        The metrics of the checkpoint that it is made of.

    Raises:
        TesseraError: as `build_training` and `loop.fit`.
    """
    result = fit(
        partial(build_training, pixels, config, image_size, cache=cache, source=source),
        config.train,
        storage=context.path,
        name="tokenizer",
        run=context.run,
        on_progress=context.on_progress,
    )
    save_tokenizer(
        context.path / "bundle", best_weights(result.checkpoint), config, image_size,
        pretrained_features=features_used(config, cache=cache, source=source),
    )  # fmt: skip
    return result.metrics


def features_used(
    config: TokenizerConfig, *, cache: Path, source: Path | None = None
) -> dict[str, str]:
    """The pretrained image features that a training sees through, sha256 by name: its perceptual
    loss', and those of the tokenizer that it goes on from.

    Raises:
        TesseraError: the features or the source cannot be read.
    """
    used = {} if source is None else dict(read_manifest(source, TokenizerManifest).trained_on)
    if config.perceptual_weight:
        file = find_vgg(config.perceptual_features, cache=cache)
        used[config.perceptual_features] = file_digest(file)
    return used


@torch.no_grad()
def reconstruction_grid(objective: TokenizerObjective, *, images: Tensor) -> Image.Image:
    """Images uint8 (B, 3, H, W), each above its reconstruction, eight per row."""
    device = next(objective.model.parameters()).device
    tokens = objective.model.encode(to_float(images.to(device)))
    decoded = to_uint8(objective.model.decode(tokens)).cpu()
    pairs = zip(torch.split(images, 8), torch.split(decoded, 8), strict=True)
    rows = [row for pair in pairs for row in pair]
    return grid(torch.cat(rows), columns=8)
