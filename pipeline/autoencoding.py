"""Self-supervised training of an image tokenizer: pictures in, the same pictures out."""

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

from pipeline.checkpoint import best_weights
from pipeline.config import TokenizerConfig
from pipeline.datasets import ImageDataset
from pipeline.image_grid import grid
from pipeline.images import gradient_l1, to_float, to_uint8
from pipeline.objective import Objective
from pipeline.perceptual import PerceptualLoss
from pipeline.steps import StepContext
from pipeline.tokenizers import build_tokenizer
from pipeline.tokenizers._saved import load_tokenizer, save_tokenizer
from pipeline.train import Training, fit


class PatchDiscriminator(nn.Module):
    """Real or reconstructed, patch by patch: float (B, 3, H, W) -> (B, 1, H / 8, W / 8).

    Source: Isola et al. 2017, pix2pix (arXiv 1611.07004), section 3.2.2; Miyato et al. 2018 (arXiv
    1802.05957): spectral normalisation.
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
        said: Tensor = self.layers(images)
        return said


class TokenizerObjective(Objective):
    """Tokenizer and reconstruction losses: L1 + L2 + image gradients + perceptual + adversarial.

    Source of the last: Esser et al. 2021, VQGAN (arXiv 2012.09841), section 3.1; hinge losses.
    """

    phases: tuple[str, ...]

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
        model: nn.Module = self.model
        return model

    def losses(self, batch: Mapping[str, Tensor], phase: str) -> dict[str, Tensor]:
        """ "loss", its parts, and "psnr" in dB (peak 1) of the batch's mean squared error."""
        images = to_float(batch["images"])
        if phase == "discriminate":
            return self._discriminate(images)
        parts, reconstruction = self._reconstruct(images)
        if self.discriminator is not None:
            parts["adversarial"] = -self.discriminator(reconstruction).float().mean()
            parts["loss"] = parts["loss"] + self.config.adversarial_weight * parts["adversarial"]
        return parts

    def validate(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same without the discriminator, whose opinion of one step is not that of another."""
        return self._reconstruct(to_float(batch["images"]))[0]

    def _discriminate(self, images: Tensor) -> dict[str, Tensor]:
        judge = self.discriminator
        assert judge is not None
        with torch.no_grad():
            reconstruction = self.model(images)[0].float()
        parts = {
            "real": F.relu(1 - judge(images).float()).mean(),
            "fake": F.relu(1 + judge(reconstruction).float()).mean(),
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
    """What a worker trains: the tokenizer on the pictures of the preprocessed train split.

    With a `source`, the directory of a trained tokenizer of the section's shape, training goes on
    from its weights.
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
    return Training(
        objective, train, validation, sample=partial(draw_reconstructions, images=shown)
    )


def train_tokenizer(
    context: StepContext,
    pixels: Path,
    config: TokenizerConfig,
    image_size: int,
    *,
    cache: Path,
    source: Path | None = None,
) -> dict[str, float]:
    """Train on Ray and leave a tokenizer directory, "bundle" in the step's; its last metrics.

    Raises:
        TesseraError: as `build_training` and `train.fit`.
    """
    result = fit(
        partial(build_training, pixels, config, image_size, cache=cache, source=source),
        config.train,
        storage=context.path,
        name="tokenizer",
        run=context.run,
        on_progress=context.on_progress,
    )
    save_tokenizer(context.path / "bundle", best_weights(result.checkpoint), config, image_size)
    return result.metrics


@torch.no_grad()
def draw_reconstructions(objective: TokenizerObjective, *, images: Tensor) -> Image.Image:
    """Pictures uint8 (B, 3, H, W) above what the tokenizer makes of them, eight a row."""
    device = next(objective.model.parameters()).device
    tokens = objective.model.encode(to_float(images.to(device)))
    decoded = to_uint8(objective.model.decode(tokens)).cpu()
    rows = [t for pair in zip(images.split(8), decoded.split(8), strict=True) for t in pair]
    return grid(torch.cat(rows), columns=8)
