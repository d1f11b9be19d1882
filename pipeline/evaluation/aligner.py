"""The aligner tells how well an image fits a caption: a contrastive model of both.

It follows CLIP (Radford et al. 2021, "Learning Transferable Visual Models From Natural Language
Supervision", section 2.3) at the size of icons: images pass a small convolutional network trained
from scratch, captions the frozen caption encoder and a two-layer perceptron over its states. Only
evaluation uses it; no generator ever trains on it. pipeline/training/aligner.py trains it.

A degraded image is no longer a good one of its caption: training also shows degraded copies of some
images (pipeline/images/degrade.py), which must lose to the images for every caption, and fit no
caption themselves.

    aligner = Aligner.load(resolve_path("asset:aligner"))
    similarity = aligner.embed_images(images) @ aligner.embed_captions(states, mask).T  # (B, B)

Shapes: B images or captions, S = image_size pixels per side, L caption tokens, C channels of their
states, E = config.embedding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.artifacts import WEIGHTS
from pipeline.config import AlignerConfig
from pipeline.config.overrides import shaped_like
from pipeline.errors import BundleError
from pipeline.images.degrade import degrade
from pipeline.images.pixels import to_float
from pipeline.objective import Objective, TrainableNetwork
from pipeline.runtime import autocast
from pipeline.text.caption_encoder import masked_mean, standardise
from pipeline.text.encoder_identity import EncoderIdentity
from pipeline.tokenizers._blocks import ChannelNorm, ResidualBlock
from pipeline.tokenizers._saved import MANIFEST, save_weights

PATCH = 4  # pixels per side
MAX_LOGIT_SCALE = math.log(100)  # Radford et al. 2021, section 2.5
START_TEMPERATURE = 0.07  # as there
SHAPE_FIELDS = ("embedding", "widths", "depths")
COPIES_WEIGHT = 0.5  # of a degraded copy's loss, beside an image's


class Aligner(TrainableNetwork):
    """Embeds images and captions in one space, where their dot product is their similarity.

    Args:
        config: sizes.
        image_size: S of the images that it trains on; others are resized to it.
        caption_width: C of the caption encoder's states.

    Attributes:
        encoder: identity of the caption encoder that it was trained with; None unless it was
            loaded.
    """

    encoder: EncoderIdentity | None = None

    def __init__(self, config: AlignerConfig, *, image_size: int, caption_width: int) -> None:
        super().__init__()
        self.config, self.image_size, self.caption_width = config, image_size, caption_width
        stages: list[nn.Module] = []
        channels, stride = 3, PATCH
        for width, depth in zip(config.widths, config.depths, strict=True):
            stages.append(nn.Conv2d(channels, width, stride, stride=stride))
            stages.extend(ResidualBlock(width) for _ in range(depth))
            channels, stride = width, 2
        self.trunk = nn.Sequential(*stages, ChannelNorm(channels))
        self.trunk.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.image_head = nn.Linear(channels, config.embedding)
        self.caption_head = nn.Sequential(
            nn.LayerNorm(caption_width),
            nn.Linear(caption_width, 2 * config.embedding),
            nn.GELU(),
            nn.Linear(2 * config.embedding, config.embedding),
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / START_TEMPERATURE)))
        self.no_caption = nn.Parameter(torch.randn(config.embedding))

    def standardise_captions(self, states: Tensor, mask: Tensor) -> None:
        """Start from the statistics of these captions: states (B, L, C) and mask bool (B, L)."""
        norm = self.caption_head[0]
        assert isinstance(norm, nn.LayerNorm)
        standardise(norm, masked_mean(states.float(), mask))

    def images_to_embeddings(self, images: Tensor) -> Tensor:
        """float (B, 3, S, S) in [-1, 1] -> (B, E), l2-normalised float32; for training."""
        features = self.trunk(images.contiguous(memory_format=torch.channels_last))
        return F.normalize(self.image_head(features.mean((2, 3))).float(), dim=-1)

    def captions_to_embeddings(self, states: Tensor, mask: Tensor) -> Tensor:
        """float (B, L, C), bool (B, L) -> (B, E), l2-normalised float32; for training."""
        return F.normalize(self.caption_head(masked_mean(states.float(), mask)).float(), dim=-1)

    @torch.inference_mode()
    def embed_images(self, images: Tensor, *, batch_size: int = 128) -> Tensor:
        """uint8 (B, 3, H, W) of any size -> (B, E) on the CPU, l2-normalised."""
        return torch.cat([self._embed(batch) for batch in torch.split(images, batch_size)])

    def _embed(self, images: Tensor) -> Tensor:
        device = self.logit_scale.device
        floats, size = to_float(images.to(device)), (self.image_size, self.image_size)
        if floats.shape[-2:] != size:
            floats = F.interpolate(floats, size, mode="bilinear", antialias=True)
        with autocast(device):
            return self.images_to_embeddings(floats).cpu()

    @torch.inference_mode()
    def embed_captions(self, states: Tensor, mask: Tensor) -> Tensor:
        """The encoder's states (B, L, C) and mask (B, L) -> (B, E) on the CPU, l2-normalised."""
        device = self.logit_scale.device
        return self.captions_to_embeddings(states.to(device), mask.to(device)).cpu()

    def save(self, directory: Path, encoder: EncoderIdentity) -> None:
        """Write config.json and model.safetensors (float16) into a new or empty directory."""
        directory.mkdir(parents=True, exist_ok=True)
        values = {
            "aligner": self.config.model_dump(mode="json"),
            "image_size": self.image_size,
            "caption_width": self.caption_width,
            "encoder": asdict(encoder),
        }
        save_weights(directory, self.state_dict())
        (directory / MANIFEST).write_text(json.dumps(values, indent=2), encoding="utf-8")

    @classmethod
    def load(cls, directory: Path, *, device: str | torch.device = "cpu") -> Aligner:
        """Read what `save` wrote.

        Raises:
            BundleError: there is no aligner in the directory, or a damaged one.
        """
        try:
            values = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
            aligner = cls(
                AlignerConfig.model_validate(values["aligner"]),
                image_size=values["image_size"],
                caption_width=values["caption_width"],
            )
            weights = load_file(directory / WEIGHTS)
            weights.setdefault("no_caption", aligner.no_caption.detach())  # read by training alone
            aligner.load_state_dict({name: weight.float() for name, weight in weights.items()})
            aligner.encoder = EncoderIdentity.from_dict(values["encoder"])
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise BundleError(
                f"{directory} holds no aligner that this version loads ({error}); train one with "
                "`tessera align RECIPE`"
            ) from error
        return aligner.to(device).eval()


def aligner_shape_of_source(config: AlignerConfig, source: Aligner | None) -> AlignerConfig:
    """The recipe's section; what it leaves open of the network's shape is taken from the source.

    It no longer names the source, since an aligner that was tuned is complete without it.

    Raises:
        RecipeError: the recipe sets a shape that is not the source's.
    """
    if source is None:
        return config
    whose = f"that of aligner.source={config.source}"
    values = shaped_like(config, source.config, SHAPE_FIELDS, section="aligner", whose=whose)
    return AlignerConfig.model_validate({**values, "source": None, "tune": False})


class AlignerObjective(Objective):
    """Symmetric InfoNCE in which images of the same group are each other's positives.

    A batch holds "images" uint8 (B, 3, S, S), "caption_states" (B, L, C), "caption_mask" bool
    (B, L) and "group" int64 (B,).
    """

    phases = ("align",)
    model: Aligner

    def __init__(self, config: AlignerConfig, *, image_size: int, caption_width: int) -> None:
        super().__init__()
        self.model = Aligner(config, image_size=image_size, caption_width=caption_width)
        self.config = config

    def losses(self, batch: Mapping[str, Tensor], phase: str) -> dict[str, Tensor]:
        """ "loss"; "accuracy", how often an image's best caption is one of its own group; and,
        where copies are degraded, "forgiven", how often one fits the image's caption no worse."""
        images = to_float(batch["images"])
        count = round(self.config.degraded * len(images))
        shown = torch.cat([images, degrade(images[:count])])
        embedded = self.model.images_to_embeddings(shown)
        captions = self.model.captions_to_embeddings(batch["caption_states"], batch["caption_mask"])
        scale = self.model.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
        none = F.normalize(self.model.no_caption.float(), dim=0)
        similarity = embedded @ captions.T
        good, worse = similarity[: len(images)], similarity[len(images) :]
        same = batch["group"][:, None] == batch["group"]
        loss = degraded_info_nce(
            scale * good, scale * worse, scale * embedded @ none, same, self.config.label_smoothing
        )
        accuracy = same.gather(1, good.argmax(1, keepdim=True)).float().mean()
        parts = {"loss": loss, "accuracy": accuracy}
        if count:
            parts["forgiven"] = (worse.diagonal() >= good.diagonal()[:count]).float().mean()
        return parts


def group_info_nce(logits: Tensor, same: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Contrastive loss with several positives per row, a scalar.

    Source: Yang et al. 2022, "Unified Contrastive Learning in Image-Text-Label Space" (UniCL),
    equations 3 to 5. Where no two rows are of the same group it is CLIP's loss (Radford et al.
    2021, figure 3).

    Args:
        logits: (B, B), images by captions.
        same: bool (B, B), symmetric, True on the diagonal: pairs that belong together.
        label_smoothing: 0 to 1, of the targets.
    """
    targets = same.float() / same.sum(1, keepdim=True)
    by_image = F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)
    by_caption = F.cross_entropy(logits.float().T, targets, label_smoothing=label_smoothing)
    return (by_image + by_caption) / 2


def degraded_info_nce(
    good: Tensor, worse: Tensor, none: Tensor, same: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """`group_info_nce` of B images beside degraded copies of the first K, which must lose.

    The copies are negatives of every caption, their own included; and one more caption, that says
    nothing, is the only one that fits them and fits no image.

    Args:
        good: (B, B), images by captions.
        worse: (K, B), degraded copies by captions; K may be 0.
        none: (B + K,), images and copies by the caption that says nothing.
        same: bool (B, B), as `group_info_nce` takes it.
        label_smoothing: 0 to 1, of the targets.
    """
    B, K = len(good), len(worse)
    targets = same.float() / same.sum(1, keepdim=True)
    logits = torch.cat([good, worse]).float()
    with_none = torch.cat([logits, none.float()[:, None]], 1)
    nothing = F.one_hot(torch.full((K,), B, device=logits.device), B + 1).float()
    wanted = torch.cat([F.pad(targets, (0, 1)), nothing])
    losses = F.cross_entropy(with_none, wanted, label_smoothing=label_smoothing, reduction="none")
    by_image = losses[:B].mean() + COPIES_WEIGHT * losses[B:].sum() / max(1, K)
    by_caption = F.cross_entropy(logits.T, F.pad(targets, (0, K)), label_smoothing=label_smoothing)
    return (by_image + by_caption) / 2
