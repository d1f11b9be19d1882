"""The judge of whether a picture shows its caption: a contrastive caption-picture model.

CLIP's recipe (Radford et al. 2021, section 2.3) at the size of icons: a small convolutional
network trained from scratch on one side, the frozen caption encoder's states under a two-layer
perceptron on the other. Only evaluation uses it; no generator ever trains on it.

    objective = AlignerObjective(recipe.aligner, image_size=64, caption_width=encoder.width)
    ...                                        # pipeline/train.py trains any objective
    objective.model.save(directory, identify(encoder))
    aligner = Aligner.load(directory)
    similarity = aligner.embed_images(images) @ aligner.embed_captions(states, mask).T  # (B, B)
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
from safetensors.torch import load_file, save
from torch import Tensor, nn

from pipeline.config import AlignerConfig
from pipeline.encoder_identity import EncoderIdentity
from pipeline.errors import BundleError
from pipeline.images import to_float
from pipeline.objective import Objective, TrainableNetwork
from pipeline.runtime import autocast
from pipeline.text import masked_mean, standardise
from pipeline.tokenizers._blocks import ChannelNorm, ResidualBlock

PATCH = 4
MAX_LOGIT_SCALE = math.log(100)  # Radford et al. 2021, section 2.5


class Aligner(TrainableNetwork):
    """Pictures and captions in one space, where the dot product says how well they fit.

    Args:
        config: sizes.
        image_size: pixels a side of the pictures it trains on; others are resized to it.
        caption_width: channels of the caption encoder's states.

    Attributes:
        encoder: identity of the caption encoder it was trained with; None before it is saved.
    """

    encoder: EncoderIdentity | None = None

    def __init__(self, config: AlignerConfig, *, image_size: int, caption_width: int) -> None:
        super().__init__()
        self.config, self.image_size, self.caption_width = config, image_size, caption_width
        stages, channels, stride = [], 3, PATCH
        for width, depth in zip(config.widths, config.depths, strict=True):
            stages.append(nn.Conv2d(channels, width, stride, stride=stride))
            stages.extend(ResidualBlock(width) for _ in range(depth))
            channels, stride = width, 2
        self.trunk = nn.Sequential(*stages, ChannelNorm(channels))
        self.trunk.to(memory_format=torch.channels_last)
        self.image_head = nn.Linear(channels, config.embedding)
        self.caption_head = nn.Sequential(
            nn.LayerNorm(caption_width),
            nn.Linear(caption_width, 2 * config.embedding),
            nn.GELU(),
            nn.Linear(2 * config.embedding, config.embedding),
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def standardise_captions(self, states: Tensor, mask: Tensor) -> None:
        """Start from these captions' statistics: states (B, L, C) and mask bool (B, L)."""
        standardise(self.caption_head[0], masked_mean(states.float(), mask))

    def images_to_embeddings(self, images: Tensor) -> Tensor:
        """float (B, 3, S, S) in [-1, 1] -> (B, embedding), l2-normalised float32."""
        features = self.trunk(images.contiguous(memory_format=torch.channels_last))
        return F.normalize(self.image_head(features.mean((2, 3))).float(), dim=-1)

    def captions_to_embeddings(self, states: Tensor, mask: Tensor) -> Tensor:
        """float (B, L, C), bool (B, L) -> (B, embedding), l2-normalised float32."""
        return F.normalize(self.caption_head(masked_mean(states.float(), mask)).float(), dim=-1)

    @torch.inference_mode()
    def embed_images(self, images: Tensor, *, batch_size: int = 128) -> Tensor:
        """uint8 (B, 3, H, W) -> (B, embedding) on the CPU, l2-normalised."""
        return torch.cat([self._embed(batch) for batch in images.split(batch_size)])

    def _embed(self, images: Tensor) -> Tensor:
        device = self.logit_scale.device
        pictures = to_float(images.to(device))
        if pictures.shape[-2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            pictures = F.interpolate(pictures, size, mode="bilinear", antialias=True)
        with autocast(device):
            return self.images_to_embeddings(pictures).cpu()

    @torch.inference_mode()
    def embed_captions(self, states: Tensor, mask: Tensor) -> Tensor:
        """The encoder's states (B, L, C) and mask (B, L) -> (B, embedding) on the CPU."""
        device = self.logit_scale.device
        return self.captions_to_embeddings(states.to(device), mask.to(device)).cpu()

    def save(self, directory: Path, encoder: EncoderIdentity) -> None:
        """Write config.json and model.safetensors (fp16) into a new or empty directory."""
        directory.mkdir(parents=True, exist_ok=True)
        values = {
            "aligner": self.config.model_dump(mode="json"),
            "image_size": self.image_size,
            "caption_width": self.caption_width,
            "encoder": asdict(encoder),
        }
        weights = {k: v.detach().cpu().half().contiguous() for k, v in self.state_dict().items()}
        (directory / "model.safetensors").write_bytes(save(weights))
        (directory / "config.json").write_text(json.dumps(values, indent=2), encoding="utf-8")

    @classmethod
    def load(cls, directory: Path, *, device: str | torch.device = "cpu") -> Aligner:
        """Read what `save` wrote.

        Raises:
            BundleError: there is no aligner in the directory, or a damaged one.
        """
        try:
            values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
            aligner = cls(
                AlignerConfig.model_validate(values["aligner"]),
                image_size=values["image_size"],
                caption_width=values["caption_width"],
            )
            weights = load_file(directory / "model.safetensors")
            aligner.load_state_dict({name: weight.float() for name, weight in weights.items()})
            aligner.encoder = EncoderIdentity.from_dict(values["encoder"])
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise BundleError(
                f"{directory} holds no aligner that this version loads ({error}); train one with "
                "`tessera align RECIPE`"
            ) from error
        return aligner.to(device).eval()


class AlignerObjective(Objective):
    """Symmetric InfoNCE in which pictures of the same group are each other's positives.

    Batch: "images" uint8 (B, 3, H, W), "caption_states" (B, L, C), "caption_mask" bool (B, L),
    "group" int64 (B,).
    """

    phases = ("align",)

    def __init__(self, config: AlignerConfig, *, image_size: int, caption_width: int) -> None:
        super().__init__()
        self.model = Aligner(config, image_size=image_size, caption_width=caption_width)
        self.label_smoothing = config.label_smoothing

    def losses(self, batch: Mapping[str, Tensor], phase: str) -> dict[str, Tensor]:
        """ "loss", and "accuracy": how often the best caption in the batch is of the own group."""
        images = self.model.images_to_embeddings(to_float(batch["images"]))
        captions = self.model.captions_to_embeddings(batch["caption_states"], batch["caption_mask"])
        scale = self.model.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
        logits = scale * images @ captions.T
        same = batch["group"][:, None] == batch["group"]
        loss = group_info_nce(logits, same, self.label_smoothing)
        accuracy = same.gather(1, logits.argmax(1, keepdim=True)).float().mean()
        return {"loss": loss, "accuracy": accuracy}


def group_info_nce(logits: Tensor, same: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Contrastive loss with several positives a row (Yang et al. 2022, UniCL, eqs. 3-5).

    With no two of the same group it is CLIP's (Radford et al. 2021, figure 3).

    Args:
        logits: (B, B), pictures by captions.
        same: bool (B, B), symmetric, true on the diagonal: pairs that belong together.
    """
    targets = same.float() / same.sum(1, keepdim=True)
    by_picture = F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)
    by_caption = F.cross_entropy(logits.float().T, targets, label_smoothing=label_smoothing)
    return (by_picture + by_caption) / 2
