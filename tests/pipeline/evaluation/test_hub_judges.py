"""Pretrained judges and features, on tiny models with random weights that are saved here."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import CaptionEncoderConfig
from pipeline.errors import MissingExtraError, PretrainedNotFoundError
from pipeline.evaluation.features import FeaturesSpec
from pipeline.evaluation.judges import judge_specs
from pipeline.evaluation.judges.hub import HubFeatures, HubJudge
from pipeline.runtime import autocast

WORDS = ["[PAD]", "[EOS]", "[UNK]", "a", "red", "green", "apple", "dog"]
CAPTIONS = ["a red apple", "a green dog", "a green apple"]


def save_clip(directory: Path, seed: int = 0) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        CLIPConfig,
        CLIPImageProcessorPil,
        CLIPModel,
        PreTrainedTokenizerFast,
    )

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("$A [EOS]", special_tokens=[("[EOS]", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]"
    ).save_pretrained(directory)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    torch.manual_seed(seed)
    config = CLIPConfig(
        text_config={
            **sizes,
            "vocab_size": len(WORDS),
            "max_position_embeddings": 8,
            "eos_token_id": 1,
            "bos_token_id": 1,
            "pad_token_id": 0,
        },
        vision_config={**sizes, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(directory)
    side = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=side).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


def load(setting: str, cache: Path) -> HubJudge:
    (spec,) = judge_specs(
        [setting], trained={}, caption_encoder=CaptionEncoderConfig(), cache=cache
    )
    judge = spec.load()
    assert isinstance(judge, HubJudge) and judge.name == spec.name == "clip"
    return judge


def test_clip_embeds_images_and_captions_as_transformers_does(
    clip: Path, icon_images: Tensor, tmp_path: Path
) -> None:
    from transformers import AutoModel, AutoProcessor

    judge = load(f"clip:{clip}", tmp_path)
    images, captions = judge.embed_images(icon_images[:3]), judge.embed_captions(CAPTIONS)
    processor = AutoProcessor.from_pretrained(clip)
    read = processor(
        text=CAPTIONS, images=list(icon_images[:3].numpy()), padding=True, return_tensors="pt"
    )
    with torch.inference_mode(), autocast(torch.device("cpu")):
        found = AutoModel.from_pretrained(clip).eval()(**read)
    torch.testing.assert_close(images, found.image_embeds.float(), atol=2e-2, rtol=0)
    torch.testing.assert_close(captions, found.text_embeds.float(), atol=2e-2, rtol=0)
    torch.testing.assert_close(images.norm(dim=1), torch.ones(3))
    assert not torch.allclose(captions[0], captions[1], atol=1e-2)


def test_an_image_is_embedded_alike_in_any_batch(
    clip: Path, icon_images: Tensor, tmp_path: Path
) -> None:
    judge = load(f"clip:{clip}", tmp_path)
    together = judge.embed_images(icon_images[:5], batch_size=2)
    alone = torch.cat([judge.embed_images(icon_images[i : i + 1]) for i in range(5)])
    assert F.cosine_similarity(together, alone).min() > 0.9999
    assert judge.embed_images(icon_images[:0]).shape == (0, 8)


def test_the_digest_tells_weights_apart(clip: Path, tmp_path: Path) -> None:
    other = load(f"clip:{save_clip(tmp_path / 'other', seed=1)}", tmp_path)
    assert load(f"clip:{clip}", tmp_path).digest != other.digest
    assert other.trained_on is not None and other.trained_on.digest == other.digest


def test_a_model_that_is_nowhere_is_named_with_its_setting(tmp_path: Path) -> None:
    with pytest.raises(PretrainedNotFoundError, match=r"evaluate\.judges: clip:nobody/nothing"):
        load("clip:nobody/nothing", tmp_path)
    with pytest.raises(PretrainedNotFoundError, match=r"evaluate\.features: dinov2:nobody/nothing"):
        FeaturesSpec("dinov2:nobody/nothing").load()


def test_a_model_without_captions_is_no_judge(dino: Path, tmp_path: Path) -> None:
    with pytest.raises(PretrainedNotFoundError, match=r"Dinov2Model does not embed captions"):
        load(f"clip:{dino}", tmp_path)


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    directory = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained(directory)
    side = {"height": 28, "width": 28}
    BitImageProcessorPil(size={"shortest_edge": 28}, crop_size=side).save_pretrained(directory)
    return directory


def test_dinov2_gives_its_class_token(dino: Path, icon_images: Tensor) -> None:
    features = FeaturesSpec(f"dinov2:{dino}").load()
    assert isinstance(features, HubFeatures) and features.width == 16
    found = features(icon_images[:5], batch_size=2)
    assert found.shape == (5, 16) and found.dtype == torch.float32
    assert features.identity.name == str(dino) and len(features.identity.digest) == 64
    assert (found.std(0) > 0).any(), "images differ"


@pytest.mark.skipif(
    importlib.util.find_spec("torch_fidelity") is not None, reason="the extra is installed"
)
def test_inception_without_its_packages_names_the_extra() -> None:
    with pytest.raises(MissingExtraError, match=r"evaluate.features=inception.*tessera\[inception"):
        FeaturesSpec("inception").load()
