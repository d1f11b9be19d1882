"""The aligner: InfoNCE is CLIP's, groups are positives, it overfits a batch, it saves whole."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.config import AlignerConfig, TrainConfig
from pipeline.errors import BundleError, RecipeError
from pipeline.evaluation.aligner import (
    Aligner,
    AlignerObjective,
    aligner_shape_of_source,
    degraded_info_nce,
    group_info_nce,
)
from pipeline.images.degrade import blur
from pipeline.images.pixels import to_float, to_uint8
from pipeline.text.caption_encoder import HFCaptionEncoder
from pipeline.text.encoder_identity import EncoderIdentity, identify
from pipeline.training.aligner import build_aligner_training

TINY = AlignerConfig(
    embedding=32, widths=(16, 24, 32), depths=(1, 1, 1), label_smoothing=0.0, degraded=0.5
)
PLAIN = TINY.model_copy(update={"degraded": 0.0})
IDENTITY = EncoderIdentity("some/model", "0" * 64, ((1.0, 0.0), (0.0, 1.0)))


def batch(images: Tensor, *, width: int = 16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    count = len(images)
    return {
        "images": images,
        "caption_states": torch.randn(count, 5, width, generator=generator).half(),
        "caption_mask": torch.arange(5) < torch.arange(count)[:, None] % 5 + 1,
        "group": torch.arange(count),
    }


def objective(config: AlignerConfig = TINY) -> AlignerObjective:
    torch.manual_seed(0)
    return AlignerObjective(config, image_size=64, caption_width=16)


def test_embeddings_are_unit_vectors_and_blind_to_padding(icon_images: Tensor) -> None:
    model, rows = objective().model, batch(icon_images[:6])
    images = model.embed_images(rows["images"], batch_size=4)
    captions = model.embed_captions(rows["caption_states"], rows["caption_mask"])
    assert images.shape == captions.shape == (6, 32)
    torch.testing.assert_close(images.norm(dim=1), torch.ones(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(captions.norm(dim=1), torch.ones(6), atol=1e-4, rtol=0)
    padding = torch.where(rows["caption_mask"][..., None], rows["caption_states"].float(), 99.0)
    again = model.embed_captions(padding, rows["caption_mask"])
    torch.testing.assert_close(again, captions)


def test_images_of_any_size_are_embedded(icon_images: Tensor) -> None:
    model = objective().model
    large = icon_images[:2].repeat_interleave(2, 2).repeat_interleave(2, 3)
    close = F.cosine_similarity(model.embed_images(large), model.embed_images(icon_images[:2]))
    assert (close > 0.95).all()


def test_without_common_groups_the_loss_is_clips() -> None:
    logits = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(6)
    clip = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(group_info_nce(logits, torch.eye(6, dtype=torch.bool)), clip)


def test_images_of_a_group_do_not_repel_each_others_captions() -> None:
    group = torch.tensor([0, 0, 1, 2])
    same = group[:, None] == group
    logits = torch.zeros(4, 4, requires_grad=True)
    group_info_nce(logits, same).backward()
    assert (logits.grad[same] < 0).all() and (logits.grad[~same] > 0).all()


def test_degraded_copies_are_negatives_of_every_caption_and_fit_none_alone() -> None:
    good, worse, none = (torch.zeros(shape, requires_grad=True) for shape in ((3, 3), (2, 3), (5,)))
    degraded_info_nce(good, worse, none, torch.eye(3, dtype=torch.bool)).backward()
    own = torch.eye(3, dtype=torch.bool)
    assert (good.grad[own] < 0).all() and (good.grad[~own] > 0).all()
    assert (worse.grad > 0).all(), "the own caption is no exception"
    assert (none.grad[:3] > 0).all() and (none.grad[3:] < 0).all()


def test_without_copies_and_none_the_loss_is_the_plain_one() -> None:
    logits = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    group = torch.tensor([0, 0, 1, 2, 3, 4])
    same = group[:, None] == group
    never = torch.full((6,), -1e4)
    found = degraded_info_nce(logits, torch.zeros(0, 6), never, same)
    torch.testing.assert_close(found, group_info_nce(logits, same))


def test_what_is_learned_by_heart_is_not_recognised_blurred(icon_images: Tensor) -> None:
    config = TINY.model_copy(update={"degraded": 1.0})
    model, rows = objective(config), batch(icon_images[:16])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        torch.manual_seed(step)
        losses = model.losses(rows, "align")
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    assert losses["accuracy"].item() > 0.9 and losses["forgiven"].item() < 0.1
    captions = model.model.embed_captions(rows["caption_states"], rows["caption_mask"])
    sharp, blurred = (
        (model.model.embed_images(images) * captions).sum(1)
        for images in (rows["images"], to_uint8(blur(to_float(rows["images"]), 2.0)))
    )
    assert (blurred < sharp).float().mean() > 0.9
    assert blurred.mean() < 0.8 * sharp.mean()


def test_captions_in_a_narrow_cone_are_spread_at_the_start() -> None:
    model = objective().model
    generator = torch.Generator().manual_seed(0)
    cone = torch.randn(16, generator=generator) + 0.1 * torch.randn(50, 3, 16, generator=generator)
    mask = torch.ones(50, 3, dtype=torch.bool)
    before = model.embed_captions(cone, mask)
    model.standardise_captions(cone, mask)
    after = model.embed_captions(cone, mask)
    assert (before @ before.T).mean() > 0.9 and (after @ after.T).mean() < 0.3
    features = model.caption_head[0](cone.mean(1))
    torch.testing.assert_close(features.mean(0), torch.zeros(16), atol=1e-4, rtol=0)
    torch.testing.assert_close(features.std(0), torch.ones(16), atol=0.05, rtol=0)


def test_one_batch_is_learned_by_heart(icon_images: Tensor) -> None:
    model, rows = objective(PLAIN), batch(icon_images[:24])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = model.losses(rows, "align")["loss"].item()
    assert first == pytest.approx(math.log(24), rel=0.6)
    for _ in range(60):
        losses = model.losses(rows, "align")
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    assert losses["loss"].item() < 0.2 * first
    assert losses["accuracy"].item() > 0.9


def test_a_saved_aligner_is_the_same(icon_images: Tensor, tmp_path: Path) -> None:
    model = objective().model.eval()
    model.save(tmp_path / "aligner", IDENTITY)
    loaded = Aligner.load(tmp_path / "aligner")
    assert loaded.encoder == IDENTITY and loaded.config == TINY
    expected, found = (m.embed_images(icon_images[:4]) for m in (model, loaded))
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)


def test_an_aligner_of_before_degraded_copies_loads(icon_images: Tensor, tmp_path: Path) -> None:
    model = objective().model.eval()
    model.save(tmp_path, IDENTITY)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("no_caption")
    save_file(weights, tmp_path / "model.safetensors")
    found = Aligner.load(tmp_path).embed_images(icon_images[:4])
    torch.testing.assert_close(found, model.embed_images(icon_images[:4]), atol=0.02, rtol=0)


def test_tuning_starts_from_the_sources_weights_in_its_shape(
    pixels: Path, captions: Path, encoder: HFCaptionEncoder, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    before = Aligner(TINY, image_size=32, caption_width=encoder.width)
    before.save(tmp_path, identify(encoder))
    wanted = AlignerConfig(source=str(tmp_path), tune=True, train=TrainConfig(batch_size=8))
    config = aligner_shape_of_source(wanted, Aligner.load(tmp_path))
    assert (config.widths, config.embedding) == (TINY.widths, 32)
    split = pq.read_table(pixels)
    held_out = pa.array(["validation", *split["split"].to_pylist()[1:]])
    (tmp_path / "pixels").mkdir()
    pq.write_table(
        split.set_column(split.column_names.index("split"), "split", held_out),
        tmp_path / "pixels" / "part-0.parquet",
    )
    training = build_aligner_training(
        tmp_path / "pixels", captions, config, image_size=64, caption_width=encoder.width,
        max_tokens=24, source=tmp_path,
    )  # fmt: skip
    for name, weight in training.objective.model.state_dict().items():
        torch.testing.assert_close(weight, before.state_dict()[name], atol=1e-3, rtol=1e-3)
    with pytest.raises(RecipeError, match=r"aligner\.embedding=64 is not that of aligner\.source"):
        aligner_shape_of_source(
            AlignerConfig(source=str(tmp_path), tune=True, embedding=64), before
        )


def test_what_is_tuned_needs_a_source() -> None:
    with pytest.raises(ValidationError, match=r"aligner\.tune=true needs aligner\.source"):
        AlignerConfig(tune=True)
    assert AlignerConfig().is_trained and not AlignerConfig(source="asset:aligner").is_trained


@pytest.mark.parametrize("damage", ["missing", "config", "weights"])
def test_a_damaged_aligner_is_refused(damage: str, tmp_path: Path) -> None:
    if damage != "missing":
        objective().model.save(tmp_path, IDENTITY)
        name = {"config": "config.json", "weights": "model.safetensors"}[damage]
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:100])
    with pytest.raises(BundleError, match="holds no aligner"):
        Aligner.load(tmp_path)
