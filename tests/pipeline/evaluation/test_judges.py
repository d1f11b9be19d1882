"""The two judges: what each sees, forgives and remembers; how they are saved and sent around."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pipeline.artifacts import resolve_path
from pipeline.config import CaptionEncoderConfig, EvaluateConfig, ImageNetJudgeConfig
from pipeline.errors import BundleError, DataError
from pipeline.evaluation.aligner import Aligner
from pipeline.evaluation.features import FeaturesSpec, ImageNetFeatures
from pipeline.evaluation.judges import AlignerJudge, ImageNetJudge, Judge, judge_specs
from pipeline.evaluation.judges.imagenet_training import (
    FEATURES,
    JudgeData,
    fit_heads,
    train_imagenet_judge,
)
from pipeline.metrics import recall_at_k
from pipeline.text.caption_encoder import HFCaptionEncoder
from pipeline.tracking.steps import StepContext

CONFIG = ImageNetJudgeConfig(resolution=128, num_views=2, steps=150, batch_size=64, dropout=0.0)
NOTO = slice(0, 64)


@pytest.fixture(scope="module")
def trained(
    pixels: Path,
    captions: Path,
    encoder: HFCaptionEncoder,
    tmp_path_factory: pytest.TempPathFactory,
    ray_session: None,
) -> tuple[Path, dict[str, float]]:
    """The step's directory and values."""
    path = tmp_path_factory.mktemp("judge")
    context = StepContext(path, None, lambda _: None, {}, {})  # type: ignore[arg-type]
    values = train_imagenet_judge(context, pixels, captions, CONFIG, image_size=64, encoder=encoder)
    return path, values


@pytest.fixture(scope="module")
def judge(trained: tuple[Path, dict[str, float]], encoder: HFCaptionEncoder) -> ImageNetJudge:
    return ImageNetJudge.load(trained[0] / "bundle", encoder=encoder)


@pytest.fixture(scope="module")
def english(icons: list[dict[str, Any]]) -> list[str]:
    return [row["captions"][0]["text"] for row in icons]


def r1(judge: Judge, images: Tensor, captions: Sequence[str]) -> float:
    hits = recall_at_k(judge.embed_images(images), judge.embed_captions(captions), k=1)
    return float(hits.mean())


def noised(images: Tensor) -> Tensor:
    noise = 25 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + noise).clamp(0, 255).byte()


def test_it_knows_real_images_and_does_not_forgive_noise(
    judge: ImageNetJudge, icon_images: Tensor, english: list[str]
) -> None:
    images, captions = icon_images[NOTO], english[NOTO]
    assert r1(judge, images, captions) > 0.9
    assert r1(judge, images, captions[1:] + captions[:1]) < 0.1
    assert r1(judge, noised(images), captions) < 0.7


def test_what_it_does_not_know_is_measured_on_groups_that_it_was_not_shown(
    trained: tuple[Path, dict[str, float]], judge: ImageNetJudge
) -> None:
    values = trained[1]
    assert values["images"] == 128 and values["held_out_captions"] == 6
    assert 0 <= values["held_out_r1"] <= 1 and values["held_out_style"] > 0.5
    assert judge.held_out == {k: v for k, v in values.items() if k != "images"}


def test_features_are_those_of_the_images_and_of_moved_ones(
    trained: tuple[Path, dict[str, float]],
    pixels: Path,
    captions: Path,
    icon_images: Tensor,
    icons: list[dict[str, Any]],
) -> None:
    data = JudgeData.read(trained[0] / FEATURES, pixels, captions)
    assert data.features.shape == (128, 2, 1280) and data.styles == ("noto", "twemoji")
    order = np.argsort([row["key"] for row in icons])
    known = ImageNetFeatures(128)(icon_images[torch.from_numpy(order[:8])])
    rows = np.arange(8)
    torch.testing.assert_close(data.features_of(rows, 0), known, atol=2e-3, rtol=2e-3)
    assert not torch.allclose(data.features_of(rows, 1), known, atol=1e-2)


def test_the_same_seed_trains_the_same_heads(
    trained: tuple[Path, dict[str, float]], pixels: Path, captions: Path
) -> None:
    data = JudgeData.read(trained[0] / FEATURES, pixels, captions)
    config = CONFIG.model_copy(update={"steps": 3, "dropout": 0.3})
    state = torch.get_rng_state()
    first, again, other = (
        fit_heads(data, np.arange(len(data)), config.model_copy(update={"seed": seed})).state_dict()
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["image_head.weight"], other["image_head.weight"])
    assert torch.equal(torch.get_rng_state(), state), "nobody else's random numbers are touched"


def test_an_image_is_embedded_alike_in_any_batch(judge: ImageNetJudge, icon_images: Tensor) -> None:
    together = judge.embed_images(icon_images[:7])
    alone = torch.cat([judge.embed_images(icon_images[i : i + 1]) for i in range(7)])
    assert torch.equal(together, alone)
    assert torch.equal(judge.embed_features(judge.features(icon_images[:7])), together)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(7))


def test_styles_are_told_apart(judge: ImageNetJudge, icon_images: Tensor) -> None:
    styles = ["noto"] * 64 + ["twemoji"] * 64
    assert judge.style_match(icon_images, styles).mean() > 0.95
    assert judge.style_match(icon_images, styles[::-1]).mean() < 0.05
    with pytest.raises(DataError, match="tells the styles fluent: it was trained on noto, twemoji"):
        judge.style_match(icon_images[:1], ["fluent"])


@pytest.mark.parametrize("damage", ["missing", "config", "weights", "features", "encoder"])
def test_a_judge_that_is_damaged_or_of_other_features_is_refused(
    damage: str,
    trained: tuple[Path, dict[str, float]],
    encoder: HFCaptionEncoder,
    tmp_path: Path,
) -> None:
    says = "holds no ImageNet judge"
    if damage != "missing":
        files = {n: (trained[0] / "bundle" / n).read_bytes() for n in ("config.json",)}
        values = json.loads(files["config.json"])
        weights = (trained[0] / "bundle" / "model.safetensors").read_bytes()
        if damage == "weights":
            weights = weights[:100]
        if damage == "features":
            values["features"]["digest"], says = "0" * 64, r"train it again"
        if damage == "encoder":
            probes = values["encoder"]["probes"]
            values["encoder"]["probes"] = [[-x for x in row] for row in probes]
            says = "reads captions differently"
        text = json.dumps(values)
        (tmp_path / "config.json").write_text(text[:50] if damage == "config" else text)
        (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(BundleError, match=says):
        ImageNetJudge.load(tmp_path, encoder=encoder)


def test_specs_travel_and_load_what_they_name(
    trained: tuple[Path, dict[str, float]],
    judge: ImageNetJudge,
    pretrained_cache: Path,
    icon_images: Tensor,
) -> None:
    specs = judge_specs(
        ["aligner", "imagenet"],
        trained={"aligner": resolve_path("asset:aligner"), "imagenet": trained[0] / "bundle"},
        caption_encoder=CaptionEncoderConfig(),
        cache=pretrained_cache,
    )
    first, second = (spec.load() for spec in pickle.loads(pickle.dumps(specs)))
    assert isinstance(first, AlignerJudge) and first.trained_on is None
    assert isinstance(second, ImageNetJudge)
    assert second.trained_on == second.features.identity
    assert second.digest == judge.digest != first.digest
    assert torch.equal(second.embed_images(icon_images[:2]), judge.embed_images(icon_images[:2]))
    plain = Aligner.load(resolve_path("asset:aligner")).embed_images(icon_images[:2])
    assert torch.equal(first.embed_images(icon_images[:2]), plain)
    assert pickle.loads(pickle.dumps(FeaturesSpec("imagenet", 128))).load().width == 1280


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"judges": ["alinger"]}, r"no judge 'alinger'; there are: aligner, imagenet, clip:ID"),
        ({"judges": ["clip"]}, "no judge 'clip'"),
        ({"judges": ["aligner:x"]}, "no judge 'aligner:x'"),
        ({"judges": ["clip:a/b", "clip:c/d"]}, "clip is there twice"),
        ({"judges": []}, "at least 1"),
        ({"features": "resnet"}, r"no image features 'resnet'; there are: imagenet, inception"),
    ],
)
def test_names_of_judges_and_features_are_checked(section: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        EvaluateConfig.model_validate(section)
    EvaluateConfig.model_validate(
        {"judges": ["aligner", "clip:openai/clip-vit-base-patch32"], "features": "dinov2:x/y"}
    )
