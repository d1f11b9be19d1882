"""Text-conditional GAN: a caption and noise become an image in one pass.

Sources: Tao et al. 2022, DF-GAN (arXiv 2008.05865): deep affine fusion of the caption, the
matching-aware hinge loss and its gradient penalty (equations 1 and 2); Zhang et al. 2021, XMC-GAN
(arXiv 2101.04702): the discriminator finds each image's caption among the batch's, and the
generator makes it findable; Isola et al. 2017, pix2pix (arXiv 1611.07004), section 3.1: a pixel
loss beside the adversarial one; Karras et al. 2020, StyleGAN2 (arXiv 1912.04958), section 3.1: a
penalty need not see everything; Zhao et al. 2020, "Differentiable Augmentation for Data-Efficient
GAN Training" (arXiv 2006.10738); Brock et al. 2019, BigGAN (arXiv 1809.11096): truncation, which a
request's temperature is here; KID of the validation (Binkowski et al. 2018, arXiv 1801.01401) on
plain pixels, so that the features which evaluation judges by stay unseen.

Shapes: B images, H = W = image_size, L caption tokens, C caption width, D condition width.
Both networks work on patches of gan.patch pixels per side: full resolution is too slow on CPUs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import GeneratorConfig
from pipeline.contracts import GenerationRequest, ModelParts, ModelSpec, OnStep, PromptTokens
from pipeline.errors import RecipeError
from pipeline.images.augment import differentiable_augmentation
from pipeline.images.pixels import gradient_l1, to_float, to_uint8
from pipeline.models.decoding import sampling
from pipeline.models.decoding.requests import resolve_requests
from pipeline.models.gan import GanConfig
from pipeline.objective import GeneratorNetwork, Objective
from pipeline.runtime import autocast
from pipeline.text.caption_encoder import masked_mean, standardise
from pipeline.text.caption_readers import CaptionReader, count_prompt

GUIDANCE_SCALE = 1.0  # off: it is trained without
SHARPNESS = 10.0  # of the contrastive loss when training begins; its inverse is the temperature
SMALLEST = 4  # pixels per side where the generator starts and the discriminator ends


class CaptionCondition(nn.Module):
    """A caption's states and a style -> one vector; without a caption a learned one."""

    def __init__(self, spec: ModelSpec, num_styles: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(spec.caption_width)
        self.read = nn.Linear(spec.caption_width, width)
        self.no_caption = nn.Parameter(torch.zeros(width))
        self.style = nn.Embedding(num_styles + 1, width)
        nn.init.normal_(self.style.weight, std=0.02)

    def forward(self, states: Tensor, mask: Tensor, style: Tensor) -> Tensor:
        """(B, L, C), bool (B, L), int64 (B,) -> (B, D)."""
        pooled = self.read(self.norm(masked_mean(states.float(), mask)))
        given = mask.any(1, keepdim=True)
        caption = torch.where(given, pooled, self.no_caption.to(pooled.dtype))
        condition: Tensor = caption + self.style(style)
        return condition


class FusionBlock(nn.Module):
    """Twice the resolution; two convolutions, before each of which the condition scales and
    shifts every channel."""

    def __init__(self, inside: int, outside: int, condition: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            [nn.Conv2d(inside, outside, 3, padding=1), nn.Conv2d(outside, outside, 3, padding=1)]
        )
        self.affines = nn.ModuleList(
            nn.Sequential(
                nn.Linear(condition, condition), nn.SiLU(), nn.Linear(condition, 2 * w)
            )
            for w in (inside, outside)
        )  # fmt: skip
        self.skip = (
            nn.Conv2d(inside, outside, 1, bias=False) if inside != outside else nn.Identity()
        )

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0)
        h = x
        for affine, conv in zip(self.affines, self.convs, strict=True):
            scale, shift = affine(condition)[:, :, None, None].chunk(2, 1)
            h = conv(F.leaky_relu(h * (1 + scale) + shift, 0.2))
        grown: Tensor = self.skip(x) + h
        return grown


class OnePassGenerator(GeneratorNetwork):
    """Noise, caption and style -> image."""

    def __init__(self, config: GeneratorConfig, spec: ModelSpec) -> None:
        super().__init__()
        gan = config.options(GanConfig)
        widths = _widths(gan.channels, _doublings(spec.image_size, gan.patch))[::-1]
        self.spec, self.no_style, self.noise_width = spec, config.num_styles, gan.noise_width
        self.caption = CaptionCondition(spec, config.num_styles, config.width)
        condition = config.width + gan.noise_width
        self.first = nn.Linear(gan.noise_width, widths[0] * SMALLEST**2)
        self.blocks = nn.ModuleList(
            FusionBlock(inside, outside, condition)
            for inside, outside in zip(widths, [*widths[1:], widths[-1]], strict=True)
        )
        self.last = nn.Conv2d(widths[-1], 3 * gan.patch**2, 3, padding=1)
        self.to_pixels = nn.PixelShuffle(gan.patch)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def text_modules(self) -> list[nn.Module]:
        """What reads the caption; the policy `frozen` leaves it alone."""
        return [self.caption.norm, self.caption.read]

    def style_rows(self) -> Tensor:
        """The styles' vectors, one per row in the order of their ids."""
        return self.caption.style.weight

    def head_modules(self) -> list[nn.Module]:
        """What the policy `head` trains: styles, the last block, the layer that gives colours."""
        return [self.caption.style, self.blocks[-1], self.last]

    def standardise_captions(self, states: Tensor, mask: Tensor) -> None:
        """Start from these captions' statistics; states (B, L, C), mask bool (B, L)."""
        standardise(self.caption.norm, masked_mean(states.float(), mask))

    def forward(self, noise: Tensor, condition: Tensor) -> Tensor:
        """noise (B, noise_width), condition (B, D) -> float (B, 3, H, W) in [-1, 1]."""
        x = self.first(noise).view(len(noise), -1, SMALLEST, SMALLEST)
        both = torch.cat([condition, noise], 1)
        for block in self.blocks:
            x = block(x, both)
        return torch.tanh(self.to_pixels(self.last(F.leaky_relu(x, 0.2))).float())


class Discriminator(nn.Module):
    """Image and caption -> one number: real and matching, or not."""

    def __init__(self, config: GeneratorConfig, spec: ModelSpec) -> None:
        super().__init__()
        gan = config.options(GanConfig)
        widths = _widths(gan.channels, _doublings(spec.image_size, gan.patch))
        self.caption = CaptionCondition(spec, config.num_styles, config.width)
        self.to_patches = nn.PixelUnshuffle(gan.patch)
        self.first = nn.Conv2d(3 * gan.patch**2, widths[0], 3, padding=1)
        pairs = zip(widths, [*widths[1:], widths[-1]], strict=True)
        self.blocks = nn.ModuleList(_DownBlock(inside, outside) for inside, outside in pairs)
        self.score = nn.Sequential(
            nn.Conv2d(widths[-1] + config.width, widths[-1], 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(widths[-1], 1, SMALLEST),
        )
        self.project_image = nn.Linear(widths[-1], config.width)
        self.project_caption = nn.Linear(config.width, config.width)
        self.sharpness = nn.Parameter(torch.tensor(SHARPNESS).log())
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def features(self, images: Tensor) -> Tensor:
        """float (B, 3, H, W) -> (B, channels, SMALLEST, SMALLEST): what the image shows."""
        x: Tensor = self.first(self.to_patches(images))
        for block in self.blocks:
            x = block(x)
        return x

    def compare(self, features: Tensor, condition: Tensor) -> Tensor:
        """`features`' result, (B, D) -> (B, B): how well each image (row) fits each condition."""
        seen = self.project_image(F.leaky_relu(features, 0.2).float().mean((2, 3)))
        read = self.project_caption(condition)
        cosines = F.normalize(seen.float(), dim=1) @ F.normalize(read.float(), dim=1).T
        return cosines.float() * self.sharpness.exp()

    def match(self, features: Tensor, condition: Tensor) -> Tensor:
        """`features`' result, (B, D) -> (B,): real, and what the condition says?"""
        spread = condition[:, :, None, None].expand(-1, -1, SMALLEST, SMALLEST)
        matched: Tensor = self.score(torch.cat([features, spread], 1))
        return matched.flatten()

    def forward(self, images: Tensor, condition: Tensor) -> Tensor:
        """float (B, 3, H, W), (B, D) -> (B,)."""
        return self.match(self.features(images), condition)


class _DownBlock(nn.Module):
    """Half the resolution, residual."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 4, stride=2, padding=1)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1)
        self.skip = (
            nn.Conv2d(inside, outside, 1, bias=False) if inside != outside else nn.Identity()
        )
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.leaky_relu(self.conv1(F.leaky_relu(x, 0.2)), 0.2))
        shrunk: Tensor = self.skip(F.avg_pool2d(x, 2)) + self.gate * h
        return shrunk


class GanObjective(Objective):
    """Matching-aware hinge losses (DF-GAN, equation 2) and a contrastive loss (XMC-GAN, section 4)
    on differentiably augmented images; for the generator also a pixel loss to the caption's image.
    """

    phases = ("discriminator", "generator")
    model: OnePassGenerator
    min_validation_rows = 2  # of KID

    def __init__(self, model: OnePassGenerator, config: GeneratorConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.options = config.options(GanConfig)
        self.discriminator = Discriminator(config, model.spec)
        self.discriminator.caption.norm.load_state_dict(model.caption.norm.state_dict())
        self.augment = differentiable_augmentation() if self.options.augment else nn.Identity()

    def trained_network(self, phase: str) -> nn.Module:
        """See `Objective.trained_network`."""
        return self.discriminator if phase == "discriminator" else self.model

    def learning_rate_ratio(self, phase: str) -> float:
        """See `Objective.learning_rate_ratio`."""
        ratio = self.options.discriminator_learning_rate_ratio
        return ratio if phase == "discriminator" else 1.0

    def losses(self, batch: Mapping[str, Tensor], phase: str) -> dict[str, Tensor]:
        """ "loss" of the phase, and its parts.

        Both networks see the same captions and styles; some are dropped while training.
        """
        if self.training:
            mask, style = sampling.drop_conditions(
                batch["caption_mask"], batch["style"],
                config=self.config, no_style=self.model.no_style,
            )  # fmt: skip
            batch = {**batch, "caption_mask": mask, "style": style}
        if phase == "discriminator":
            return self._discriminator_losses(batch)
        fake, discriminator = self._draw(batch), self.discriminator
        with _still(discriminator):
            condition = self._condition(batch, discriminator)
            features = discriminator.features(self._changed(fake))
            parts = {
                "adversarial": -discriminator.match(features, condition).float().mean(),
                "contrastive_drawn": self._contrastive(features, condition, batch),
                "reconstruction": self._reconstruction(fake, batch),
            }
        return {"loss": torch.stack(list(parts.values())).sum(), **parts}

    def _discriminator_losses(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        discriminator, images = self.discriminator, to_float(batch["images"])
        with torch.no_grad():
            fake = self._draw(batch)
        condition = self._condition(batch, discriminator)
        other = _of_other_groups(batch["group"])
        differ = batch["group"][other] != batch["group"]
        wrongly = differ & batch["caption_mask"].any(1)[other]  # no caption fits every image
        features = discriminator.features(self._changed(images))
        real = discriminator.match(features, condition).float()
        wrong = discriminator.match(features, condition[other]).float()
        penalised = math.ceil(self.options.penalty_fraction * len(images))
        drawn = discriminator(self._changed(fake), condition).float()
        parts = {
            "real": F.relu(1 - real).mean(),
            "mismatched": _mean_where(wrongly, F.relu(1 + wrong)) / 2,
            "fake": F.relu(1 + drawn).mean() / 2,
            "penalty": self._penalty(images[:penalised], condition[:penalised]),
            "contrastive_real": self._contrastive(features, condition, batch),
        }
        return {"loss": torch.stack(list(parts.values())).sum(), **parts}

    def _contrastive(
        self, features: Tensor, condition: Tensor, batch: Mapping[str, Tensor]
    ) -> Tensor:
        """Cross-entropy of finding each image's caption in the batch, and each caption's image.

        Images of the same group count as neither right nor wrong; images without a caption are left
        out.
        """
        given, group = batch["caption_mask"].any(1), batch["group"]
        own = torch.arange(len(group), device=group.device)
        alike = (group[:, None] == group) & (own[:, None] != own)
        fits = self.discriminator.compare(features, condition)
        fits = fits.masked_fill(alike | ~given | ~given[:, None], -1e4)
        by_image, by_caption = (F.cross_entropy(x, own, reduction="none") for x in (fits, fits.T))
        lost = (by_image + by_caption) / 2
        return self.options.contrastive_weight * _mean_where(given, lost)

    def _reconstruction(self, fake: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """L1 of pixels and of image gradients to the image that the caption is of."""
        given, weight = batch["caption_mask"].any(1), self.options.reconstruction_weight
        drawn, real = fake.float(), to_float(batch["images"])
        lost = (drawn - real).abs().mean((1, 2, 3)) + gradient_l1(drawn, real)
        return weight * _mean_where(given, lost)

    def _penalty(self, images: Tensor, condition: Tensor) -> Tensor:
        """weight * |gradient of D at real, matching pairs| ** power (DF-GAN, equation 1)."""
        gan = self.options
        images = images.detach().requires_grad_()
        condition = condition.float()
        with torch.autocast(images.device.type, enabled=False):
            said = self.discriminator(images, condition)
            gradients = torch.autograd.grad(said.sum(), (images, condition), create_graph=True)
        squared = sum(g.flatten(1).square().sum(1) for g in gradients)
        assert isinstance(squared, Tensor)
        return gan.penalty_weight * ((squared + 1e-12) ** (gan.penalty_power / 2)).mean()

    def validate(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """ "loss" is the KID of drawn against real images, on pixels shrunk to 16 x 16."""
        small = [
            F.adaptive_avg_pool2d(x.float(), 16).flatten(1)
            for x in (to_float(batch["images"]), self._draw(batch))
        ]
        return {"loss": _kid(*small)}

    def _draw(self, batch: Mapping[str, Tensor]) -> Tensor:
        condition = self._condition(batch, self.model)
        noise = torch.randn(len(condition), self.model.noise_width, device=condition.device)
        drawn: Tensor = self.model(noise, condition)
        return drawn

    @staticmethod
    def _condition(
        batch: Mapping[str, Tensor], network: OnePassGenerator | Discriminator
    ) -> Tensor:
        condition: Tensor = network.caption(
            batch["caption_states"], batch["caption_mask"], batch["style"]
        )
        return condition

    def _changed(self, images: Tensor) -> Tensor:
        if not self.training:
            return images
        changed: Tensor = self.augment((images.float() + 1) / 2)
        return changed * 2 - 1


def _mean_where(chosen: Tensor, values: Tensor) -> Tensor:
    """Mean of the chosen values, 0 if there are none; bool (B,), (B,) -> ()."""
    return (values * chosen).sum() / chosen.sum().clamp_min(1)


def _of_other_groups(group: Tensor) -> Tensor:
    """By row, the number of a row of another group, or its own if there is none: int64 (B,)."""
    B = len(group)
    other = torch.arange(B, device=group.device)
    for shift in range(1, B):
        rolled = (torch.arange(B, device=group.device) + shift) % B
        same = group[other] == group
        other = torch.where(same, rolled, other)
        if not bool((group[other] == group).any()):
            break
    return other


def _kid(x: Tensor, y: Tensor) -> Tensor:
    """metrics.kid of (B, d) and (B, d) as a tensor ()."""
    from pipeline.metrics import kid  # not needed to generate

    return torch.tensor(kid(x.detach().cpu(), y.detach().cpu()), device=x.device)


@contextmanager
def _still(network: nn.Module) -> Iterator[None]:
    """Within the block the network's weights get no gradients, which nothing would use."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)


def _doublings(image_size: int, patch: int) -> int:
    doublings = (image_size // (SMALLEST * patch)).bit_length() - 1
    if doublings < 1 or SMALLEST * 2**doublings * patch != image_size:
        raise RecipeError(
            f"preprocess.image_size={image_size}: the gan family doubles from {SMALLEST} patches a "
            f"side, of generator.gan.patch={patch} pixels, so the size must be "
            f"{2 * SMALLEST * patch}, {4 * SMALLEST * patch}, {8 * SMALLEST * patch} and so on"
        )
    return doublings


def _widths(channels: int, doublings: int) -> list[int]:
    """Channels from the finest grid to the coarsest: doubling, at most eightfold."""
    return [channels * min(2**i, 8) for i in range(doublings)]


class GanGenerator:
    """contracts.ImageGenerator in one pass."""

    tasks = frozenset({"text_to_image"})

    def __init__(
        self, model: OnePassGenerator, config: GeneratorConfig, spec: ModelSpec, parts: ModelParts
    ) -> None:
        self.model = model.to(parts.device).eval()
        self.config, self.spec, self.parts = config, spec, parts
        self.read_captions = CaptionReader(parts.encoder)
        self.styles, self.image_size = spec.styles, spec.image_size

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[GenerationRequest], *, on_step: OnStep | None = None
    ) -> Tensor:
        """See contracts.ImageGenerator.generate.

        temperature truncates: the noise is scaled by it. guidance_scale moves the condition away
        from that of no caption or of negative_prompt; 1, which is off, is what the network was
        trained for.

        Raises:
            RequestError: also for num_steps other than 1: there is one pass.
        """
        resolved = resolve_requests(
            requests, self.config, self.styles, fixed_steps=1, guidance_scale=GUIDANCE_SCALE
        )
        device, width = self.parts.device, self.model.noise_width
        noise = torch.stack(
            [torch.randn(width, generator=sampling.seeded_rng(r.seed)) for r in resolved]
        )
        temperature = torch.tensor([request.temperature for request in resolved])[:, None]
        caption = self.read_captions([request.prompt for request in resolved])
        negative = self.read_captions([request.negative_prompt for request in resolved])
        style = torch.tensor([request.style_id for request in resolved])
        scale = torch.tensor([request.guidance_scale for request in resolved])
        columns = noise * temperature, *caption, *negative, style, scale
        # on a CPU one by one: an image's last bits would depend on those beside it
        size = 1 if device.type == "cpu" else len(requests)
        with autocast(device):
            batches = zip(*(column.to(device).split(size) for column in columns), strict=True)
            images = [self._decode(*batch) for batch in batches]
        if on_step is not None:
            on_step(1, 1)
        return to_uint8(torch.cat(images)).cpu()

    def count_prompt(self, prompt: str) -> PromptTokens:
        """See contracts.PromptCountingGenerator.count_prompt."""
        return count_prompt(self.read_captions.encoder, prompt)

    def _decode(
        self,
        noise: Tensor,
        states: Tensor,
        mask: Tensor,
        negative_states: Tensor,
        negative_mask: Tensor,
        style: Tensor,
        scale: Tensor,
    ) -> Tensor:
        """float (B, 3, H, W) in [-1, 1], with guidance applied to the condition."""
        conditional = self.model.caption(states, mask, style)
        unconditional = self.model.caption(negative_states, negative_mask, style)
        condition = sampling.classifier_free_guidance(conditional, unconditional, scale)
        images: Tensor = self.model(noise, condition)
        return images
