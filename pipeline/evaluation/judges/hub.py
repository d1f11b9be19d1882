"""Judges and features that come pretrained, from a model hub or a directory.

    judge = load_hub_judge("clip:openai/clip-vit-base-patch32")
    judge.embed_images(images) @ judge.embed_captions(["a red apple"]).T
    features = load_hub_features("dinov2:facebook/dinov2-small")       # for KID, FID, CMMD
    features = load_hub_features("inception")                          # extra: inception

CLIP and DINOv2 are loaded by transformers, with the preprocessing that their own files describe.
Inception-v3 with the weights of the FID literature is torchmetrics', which needs torch-fidelity and
torchvision: these come built for CUDA, and beside PyTorch's CPU build torchvision does not import.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.judges import HUB_FEATURES, HUB_JUDGES
from pipeline.errors import MissingExtraError, PretrainedNotFoundError
from pipeline.evaluation.features import Features, FeaturesIdentity, in_batches
from pipeline.evaluation.judges.judge import Judge
from pipeline.runtime import autocast

INCEPTION_WIDTH = 2048


def load_hub_judge(setting: str, *, device: str | torch.device = "cpu") -> HubJudge:
    """The judge that `evaluate.judges` calls "clip:ID" or "siglip:ID".

    Raises:
        PretrainedNotFoundError: it is neither in a directory, nor in the hub's cache, nor on the
            hub; or what is there is no image-text model.
    """
    kind, _, model = setting.partition(":")
    assert kind in HUB_JUDGES and model, "the recipe was checked"
    return HubJudge(kind, model, device=device)


def load_hub_features(setting: str, *, device: str | torch.device = "cpu") -> Features:
    """The features that `evaluate.features` calls "dinov2:ID" or "inception".

    Raises:
        PretrainedNotFoundError: they cannot be found.
        MissingExtraError: inception without its packages.
    """
    if setting == "inception":
        return InceptionFeatures(device)
    kind, _, model = setting.partition(":")
    assert kind in HUB_FEATURES and model, "the recipe was checked"
    return HubFeatures(model, device=device)


class HubJudge(Judge):
    """CLIP, SigLIP or another dual encoder that `transformers.AutoModel` loads.

    Sources: Radford et al. 2021 (CLIP), arXiv 2103.00020; Zhai et al. 2023 (SigLIP), arXiv
    2303.15343. Most of them read English alone; validity is judged per language for that reason.

    Args:
        name: "clip" or "siglip".
        model: a hub id or a directory.
        device: where it runs.

    Raises:
        PretrainedNotFoundError: there is no such model, or it embeds no images and captions.
    """

    def __init__(self, name: str, model: str, *, device: str | torch.device = "cpu") -> None:
        from transformers import AutoTokenizer

        setting = f"evaluate.judges: {name}:{model}"
        self.name, self.device = name, torch.device(device)
        self._model, self._pixels = _load(setting, model, self.device)
        if not hasattr(self._model, "get_text_features"):
            raise PretrainedNotFoundError(
                f"{setting}: a {type(self._model).__name__} does not embed captions; name a CLIP "
                "or SigLIP model"
            )
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise _not_found(setting, error) from error
        self.trained_on = FeaturesIdentity(model, _weights_digest(self._model))
        self.digest = self.trained_on.digest

    @torch.inference_mode()
    def embed_images(self, images: Tensor, *, batch_size: int = 32) -> Tensor:
        """See Judge.embed_images."""
        width = self._model.config.projection_dim if len(images) == 0 else 0
        return in_batches(self._embed_images, images, batch_size, width)

    def _embed_images(self, images: Tensor) -> Tensor:
        with autocast(self.device):
            found = self._model.get_image_features(pixel_values=self._pixels(images))
        return F.normalize(found.pooler_output.float(), dim=-1).cpu()

    @torch.inference_mode()
    def embed_captions(self, texts: Sequence[str], *, batch_size: int = 64) -> Tensor:
        """See Judge.embed_captions. Captions are padded to the model's full length, as SigLIP was
        trained; to CLIP it makes no difference."""
        batches = [texts[i : i + batch_size] for i in range(0, len(texts), batch_size)]
        return torch.cat([self._embed_captions(batch) for batch in batches])

    def _embed_captions(self, texts: Sequence[str]) -> Tensor:
        length = self._model.config.text_config.max_position_embeddings
        read = self._tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=length,
            return_tensors="pt",
        )  # fmt: skip
        inputs = {k: v.to(self.device) for k, v in read.items() if k != "token_type_ids"}
        with autocast(self.device):
            found = self._model.get_text_features(**inputs)
        return F.normalize(found.pooler_output.float(), dim=-1).cpu()


class HubFeatures:
    """The pooled output of DINOv2 or another image model that `transformers.AutoModel` loads.

    Source: Oquab et al. 2023, DINOv2 (arXiv 2304.07193).

    Args:
        model: a hub id or a directory.
        device: where it runs.

    Raises:
        PretrainedNotFoundError: there is no such model.
    """

    def __init__(self, model: str, *, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self._model, self._pixels = _load(f"evaluate.features: dinov2:{model}", model, self.device)
        self.width: int = self._model.config.hidden_size
        self.identity = FeaturesIdentity(model, _weights_digest(self._model))

    @torch.inference_mode()
    def __call__(self, images: Tensor, batch_size: int = 32) -> Tensor:
        """See Features.__call__."""
        return in_batches(self._features, images, batch_size, self.width)

    def _features(self, images: Tensor) -> Tensor:
        with autocast(self.device):
            found = self._model(pixel_values=self._pixels(images))
        pooled: Tensor = found.pooler_output.float().cpu()
        return pooled


class InceptionFeatures:
    """The 2,048 pooled features of Inception-v3 that published FIDs are computed of.

    Source: Heusel et al. 2017 (arXiv 1706.08500); the weights are those of its TensorFlow graph, as
    torch-fidelity converted them.

    Args:
        device: where it runs.

    Raises:
        MissingExtraError: torch-fidelity or torchvision is not installed, or does not import.
        PretrainedNotFoundError: the weights cannot be downloaded.
    """

    width = INCEPTION_WIDTH

    def __init__(self, device: str | torch.device = "cpu") -> None:
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3

            self._model = NoTrainInceptionV3(
                name="inception-v3-compat", features_list=[str(INCEPTION_WIDTH)]
            ).to(device)
        except (ImportError, RuntimeError) as error:
            raise MissingExtraError(
                f"evaluate.features=inception ({str(error).splitlines()[0]})", "inception"
            ) from error
        except OSError as error:
            raise _not_found("evaluate.features: inception", error) from error
        self.device = torch.device(device)
        self.identity = FeaturesIdentity("inception-v3-compat", _weights_digest(self._model))

    @torch.inference_mode()
    def __call__(self, images: Tensor, batch_size: int = 32) -> Tensor:
        """See Features.__call__."""
        return in_batches(self._features, images, batch_size, self.width)

    def _features(self, images: Tensor) -> Tensor:
        features: Tensor = self._model(images.to(self.device)).float().cpu()
        return features


class _Pixels:
    """uint8 (N, 3, H, W) -> what a model takes as pixel_values, as its own files describe."""

    def __init__(self, processor: Any, device: torch.device) -> None:
        self.processor, self.device = processor, device

    def __call__(self, images: Tensor) -> Tensor:
        arrays: list[Any] = list(np.ascontiguousarray(images.cpu().numpy()))
        read = self.processor(
            images=arrays, return_tensors="pt", input_data_format="channels_first"
        )
        pixels: Tensor = read["pixel_values"].to(self.device)
        return pixels


def _load(setting: str, model: str, device: torch.device) -> tuple[Any, _Pixels]:
    """The model in evaluation mode, and its preprocessing."""
    from transformers import AutoImageProcessor, AutoModel

    path = Path(model).expanduser()
    source = str(path) if path.is_dir() else model
    try:
        network = AutoModel.from_pretrained(source, dtype=torch.float32)
        processor = AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise _not_found(setting, error) from error
    return network.to(device).eval().requires_grad_(False), _Pixels(processor, device)


def _not_found(setting: str, error: Exception) -> PretrainedNotFoundError:
    return PretrainedNotFoundError(
        f"{setting} could not be loaded ({str(error).splitlines()[0]}): reach a model hub (unset "
        "HF_HUB_OFFLINE), name a directory that save_pretrained wrote, or leave it out"
    )


def _weights_digest(model: nn.Module) -> str:
    """sha256 over every weight in float16, by name, whatever file format they came in."""
    sha = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        sha.update(f"{name}{tuple(weight.shape)}".encode())
        sha.update(weight.detach().to("cpu", torch.float16).contiguous().numpy().tobytes())
    return sha.hexdigest()
