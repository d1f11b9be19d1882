"""The two judges that are trained on the data at hand, and share neither network nor training.

`AlignerJudge` is a small convolutional network trained from scratch on pixels
(pipeline/evaluation/aligner.py). `ImageNetJudge` sees through frozen ImageNet features and trains
two small heads over them, on real images alone, without blur or noise among them: what ImageNet
features do not recognise any more, it does not forgive. pipeline/training/aligner.py and
pipeline/training/imagenet_judge.py train them; the frozen caption encoder reads for both.

    judge = ImageNetJudge.load(directory, encoder=encoder, device=choose_device())
    features = judge.features(images)                     # (N, 1280), to be computed only once
    judge.embed_features(features) @ judge.embed_captions(captions).T
    judge.match_styles(features, styles)

Shapes: N images, M captions, D features, C channels of a caption's state, E = config.embedding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.artifacts import WEIGHTS, bundle_digest
from pipeline.config import ImageNetJudgeConfig
from pipeline.errors import BundleError, DataError
from pipeline.evaluation.aligner import Aligner
from pipeline.evaluation.features import FeaturesIdentity, ImageNetFeatures, imagenet_identity
from pipeline.evaluation.judges.judge import Judge
from pipeline.text.caption_encoder import HFCaptionEncoder, masked_mean
from pipeline.text.encoder_identity import EncoderIdentity, check_encoder, identify
from pipeline.tokenizers._saved import MANIFEST, save_weights


class AlignerJudge(Judge):
    """The aligner with the caption encoder that reads for it.

    Args:
        aligner: on the device where it runs.
        encoder: the one that the aligner was trained with.
        digest: of the aligner's directory.

    Raises:
        BundleError: the encoder is not the one that the aligner was trained with.
    """

    name = "aligner"
    trained_on = None

    def __init__(self, aligner: Aligner, encoder: HFCaptionEncoder, *, digest: str) -> None:
        if aligner.encoder is not None:
            check_encoder(aligner.encoder, encoder)
        self.aligner, self.encoder = aligner, encoder
        self.digest = _joint_digest(digest, encoder.digest)

    @classmethod
    def load(
        cls, directory: Path, *, encoder: HFCaptionEncoder, device: str | torch.device = "cpu"
    ) -> AlignerJudge:
        """Read what `Aligner.save` wrote.

        Raises:
            BundleError: no aligner that this version loads, or one of another caption encoder.
        """
        aligner = Aligner.load(directory, device=device)
        return cls(aligner, encoder, digest=bundle_digest(directory))

    def embed_images(self, images: Tensor) -> Tensor:
        """See Judge.embed_images."""
        return self.aligner.embed_images(images)

    def embed_captions(self, texts: Sequence[str]) -> Tensor:
        """See Judge.embed_captions."""
        return self.aligner.embed_captions(*self.encoder.encode(texts))


class JudgeHeads(nn.Module):
    """The part of `ImageNetJudge` that trains: an image head, a caption head, a style classifier.

    Args:
        config: sizes.
        width: D of the features.
        caption_width: C of the caption encoder's states.
        num_styles: of the classifier.
    """

    def __init__(
        self, config: ImageNetJudgeConfig, *, width: int, caption_width: int, num_styles: int
    ) -> None:
        super().__init__()
        E = config.embedding
        self.image_norm, self.caption_norm = Standardised(width), Standardised(caption_width)
        self.dropout = nn.Dropout(config.dropout)
        self.image_head = nn.Linear(width, E)
        self.caption_head = nn.Sequential(
            nn.Linear(caption_width, 2 * E), nn.GELU(), nn.Linear(2 * E, E)
        )
        self.style_head = nn.Linear(width, num_styles)

    def images_to_embeddings(self, features: Tensor) -> Tensor:
        """float (N, D) -> (N, E), l2-normalised."""
        return F.normalize(self.image_head(self.dropout(self.image_norm(features))), dim=-1)

    def captions_to_embeddings(self, means: Tensor) -> Tensor:
        """Mean states of captions, float (M, C) -> (M, E), l2-normalised."""
        return F.normalize(self.caption_head(self.caption_norm(means)), dim=-1)

    def features_to_styles(self, features: Tensor) -> Tensor:
        """float (N, D) -> int64 (N,), the number of the likeliest style."""
        logits: Tensor = self.style_head(self.image_norm(features))
        return logits.argmax(1)


class Standardised(nn.Module):
    """Inputs with mean 0 and deviation 1 over the rows that `fit` saw, channel by channel."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))

    def fit(self, rows: Tensor) -> None:
        """Take the statistics of float (rows, width), at least two rows."""
        deviation, mean = torch.std_mean(rows, dim=0)
        self.mean.copy_(mean)
        self.deviation.copy_(deviation + 1e-3)

    def forward(self, rows: Tensor) -> Tensor:
        standardised: Tensor = (rows - self.mean) / self.deviation
        return standardised


class ImageNetJudge(Judge):
    """Frozen EfficientNet-Lite0 features under an image head, beside a caption head.

    Args:
        heads: trained.
        features: frozen, at the resolution that the heads were trained with.
        encoder: the caption encoder that the heads were trained with.
        styles: that the style classifier knows; there is none of fewer than two.
        held_out: how often each image of groups that a second pair of heads was not shown finds
            its caption among theirs, and how many captions those are.

    Attributes:
        features: uint8 (N, 3, H, W) -> (N, D); what is embedded, compared and told by style can be
            computed of one pass.
    """

    name = "imagenet"

    def __init__(
        self,
        heads: JudgeHeads,
        features: ImageNetFeatures,
        encoder: HFCaptionEncoder,
        *,
        config: ImageNetJudgeConfig,
        styles: Sequence[str],
        held_out: Mapping[str, float],
        digest: str,
    ) -> None:
        # In float64, whose rounding does not show in float32: embeddings are the same in any batch.
        self.heads = heads.double().eval().requires_grad_(False)
        self.features, self.encoder, self.config = features, encoder, config
        self.styles, self.held_out = tuple(styles), dict(held_out)
        self.trained_on = features.identity
        self.digest = _joint_digest(digest, encoder.digest, features.identity.digest)

    def embed_images(self, images: Tensor) -> Tensor:
        """See Judge.embed_images."""
        return self.embed_features(self.features(images))

    def embed_features(self, features: Tensor) -> Tensor:
        """What `embed_images` makes of images with these features, float (N, D) -> (N, E)."""
        return self.heads.images_to_embeddings(features.double()).float()

    def embed_captions(self, texts: Sequence[str]) -> Tensor:
        """See Judge.embed_captions."""
        means = masked_mean(*self.encoder.encode(texts))
        return self.heads.captions_to_embeddings(means.double()).float()

    def style_match(self, images: Tensor, styles: Sequence[str]) -> Tensor:
        """Whether the classifier takes each image for the style of its row: float32 (N,), 1 or 0.

        Args:
            images: uint8 (N, 3, H, W).
            styles: N names among `self.styles`.

        Raises:
            DataError: the classifier does not know a style.
        """
        return self.match_styles(self.features(images), styles)

    def match_styles(self, features: Tensor, styles: Sequence[str]) -> Tensor:
        """`style_match` of images with these features, float (N, D)."""
        unknown = sorted(set(styles) - set(self.styles))
        if unknown or len(self.styles) < 2:
            known = ", ".join(self.styles) or "none"
            raise DataError(
                f"no classifier tells the styles {', '.join(unknown or styles[:1])}: it was "
                f"trained on {known}, and needs two; train the judge on data that has them"
            )
        found = self.heads.features_to_styles(features.double())
        wanted = torch.tensor([self.styles.index(style) for style in styles])
        return (found == wanted).float()

    @classmethod
    def load(
        cls, directory: Path, *, encoder: HFCaptionEncoder, device: str | torch.device = "cpu"
    ) -> ImageNetJudge:
        """Read what `save_heads` wrote.

        Raises:
            BundleError: there is no such judge in the directory, a damaged one, or one that was
                trained with another caption encoder or other features.
        """
        try:
            values = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
            config = ImageNetJudgeConfig.model_validate(values["imagenet_judge"])
            seen_through = FeaturesIdentity(**values["features"])
            identity = EncoderIdentity.from_dict(values["encoder"])
            styles, held_out = values["styles"], values["held_out"]
            heads = JudgeHeads(
                config,
                width=ImageNetFeatures.width,
                caption_width=identity.width,
                num_styles=len(styles),
            )
            weights = load_file(directory / WEIGHTS)
            heads.load_state_dict({name: weight.float() for name, weight in weights.items()})
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise BundleError(
                f"{directory} holds no ImageNet judge that this version loads ({error}); evaluate "
                "again with the recipe that made it, which trains one"
            ) from error
        if seen_through != imagenet_identity():
            raise BundleError(
                f"the judge in {directory} was trained on {seen_through}; installed here is "
                f"{imagenet_identity()}: train it again"
            )
        check_encoder(identity, encoder)
        return cls(
            heads,
            ImageNetFeatures(config.resolution, device),
            encoder,
            config=config,
            styles=styles,
            held_out=held_out,
            digest=bundle_digest(directory),
        )


def save_heads(
    directory: Path,
    heads: JudgeHeads,
    *,
    config: ImageNetJudgeConfig,
    encoder: HFCaptionEncoder,
    styles: Sequence[str],
    held_out: Mapping[str, float],
) -> None:
    """Write config.json and model.safetensors (float16) into a new or empty directory."""
    directory.mkdir(parents=True, exist_ok=True)
    values = {
        "imagenet_judge": config.model_dump(mode="json"),
        "features": asdict(imagenet_identity()),
        "encoder": asdict(identify(encoder)),
        "styles": list(styles),
        "held_out": dict(held_out),
    }
    save_weights(directory, heads.state_dict())
    (directory / MANIFEST).write_text(json.dumps(values, indent=2), encoding="utf-8")


def _joint_digest(*digests: str) -> str:
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()
