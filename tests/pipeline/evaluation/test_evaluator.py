"""Evaluation sets are fair, and the evaluator tells good generators from bad ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline.config import AlignerConfig, EvaluateConfig
from pipeline.contracts import EvalReport, GenerationRequest
from pipeline.errors import DataError
from pipeline.evaluation.aligner import Aligner, AlignerObjective
from pipeline.evaluation.eval_set import EvalSet
from pipeline.evaluation.evaluator import Evaluator
from pipeline.evaluation.features import ImageNetFeatures
from pipeline.evaluation.reports import from_dict, markdown_table, metric_values, to_dict
from pipeline.images.pixels import to_float, to_uint8
from pipeline.text.caption_encoder import HFCaptionEncoder

CONFIG = EvaluateConfig(
    num_images=32, styles=("twemoji", "noto"), guidance_scales=(1.0,), bootstrap=100, batch_size=8
)


@pytest.fixture(scope="module")
def eval_set(pixels: Path) -> EvalSet:
    return EvalSet.from_parquet(pixels, CONFIG, image_size=64)


@pytest.fixture(scope="module")
def aligner(icon_images: Tensor, icons: list[dict], encoder: HFCaptionEncoder) -> Aligner:
    """Learned these very icons by heart."""
    torch.manual_seed(0)
    config = AlignerConfig(embedding=64, widths=(32, 48, 64), depths=(1, 1, 1), label_smoothing=0.0)
    objective = AlignerObjective(config, image_size=64, caption_width=encoder.width)
    groups = {group: i for i, group in enumerate(sorted({row["group"] for row in icons}))}
    batches = []
    for language in ("en", "zh"):
        texts = [
            next(c["text"] for c in row["captions"] if c["language"] == language) for row in icons
        ]
        states, mask = encoder.encode(texts)
        group = torch.tensor([groups[row["group"]] for row in icons])
        batches.append(
            {"images": icon_images, "caption_states": states, "caption_mask": mask, "group": group}
        )
    objective.model.standardise_captions(states, mask)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3)
    for step in range(60):
        optimizer.zero_grad()
        objective.losses(batches[step % 2], "align")["loss"].backward()
        optimizer.step()
    return objective.model.eval()


@pytest.fixture(scope="module")
def evaluator(eval_set: EvalSet, aligner: Aligner, encoder: HFCaptionEncoder) -> Evaluator:
    return Evaluator(
        eval_set, aligner=aligner, features=ImageNetFeatures(64), encoder=encoder, config=CONFIG
    )


class Oracle:
    """Draws the very image a caption belongs to, as well as `quality` allows."""

    image_size = 64
    tasks = frozenset({"text_to_image"})
    styles = ("noto", "twemoji")

    def __init__(self, eval_set: EvalSet, quality: float = 1.0) -> None:
        self.quality = quality
        self.calls: list[GenerationRequest] = []
        self.images = {
            (image_set.style, caption): image
            for image_set in eval_set.sets
            for captions in image_set.captions.values()
            for caption, image in zip(captions, image_set.images, strict=False)
        }

    def generate(self, requests: Sequence[GenerationRequest], *, on_step: object = None) -> Tensor:
        self.calls.extend(requests)
        drawn = []
        for request in requests:
            quality = 0.3 if request.guidance_scale == 1.0 else self.quality
            generator = torch.Generator().manual_seed(request.seed)
            noise = torch.randint(0, 256, (3, 64, 64), generator=generator)
            image = self.images[request.style, request.prompt].float()
            drawn.append(quality * image + (1 - quality) * noise)
        return torch.stack(drawn).to(torch.uint8)


class Coarse:
    """An image tokenizer that keeps one colour a cell, as 24 bits."""

    codebook_size, grid_size, image_size = 2**24, 16, 64

    def encode(self, images: Tensor) -> Tensor:
        colours = to_uint8(torch.nn.functional.avg_pool2d(images, 4)).long().flatten(2)
        return colours[:, 0] * 65_536 + colours[:, 1] * 256 + colours[:, 2]

    def decode(self, image_tokens: Tensor) -> Tensor:
        planes = [image_tokens // 65_536, image_tokens // 256 % 256, image_tokens % 256]
        colours = torch.stack(planes, 1).view(-1, 3, 16, 16)
        return to_float(colours.repeat_interleave(4, 2).repeat_interleave(4, 3))


# ---- The evaluation set --------------------------------------------------------------------------


def test_sets_are_chosen_by_split_and_have_one_right_answer(
    eval_set: EvalSet, pixels: Path
) -> None:
    split = {row["key"]: row["split"] for row in pq.read_table(pixels).to_pylist()}
    group = {row["key"]: row["group"] for row in pq.read_table(pixels).to_pylist()}
    assert [(s.style, s.name) for s in eval_set.sets] == [
        ("twemoji", "seen"), ("twemoji", "unseen"), ("noto", "seen"), ("noto", "unseen"),
    ]  # fmt: skip
    for image_set in eval_set.sets:
        wanted = {"seen": "train", "unseen": "test"}[image_set.name]
        assert {split[key] for key in image_set.keys} == {wanted}
        assert (
            len({group[key] for key in image_set.keys}) == len(image_set) == len(image_set.images)
        )
        for captions in image_set.captions.values():
            assert len(set(captions)) == len(captions) == CONFIG.num_images
    assert len(eval_set.sets[1]) < CONFIG.num_images, "distractors must have filled it up"
    assert len(eval_set.training["noto"]) == sum(
        key.startswith("noto") and s == "train" for key, s in split.items()
    )


def test_the_choice_depends_on_the_seed_alone(eval_set: EvalSet, pixels: Path) -> None:
    again = EvalSet.from_parquet(pixels, CONFIG, image_size=64)
    other = EvalSet.from_parquet(pixels, CONFIG.model_copy(update={"seed": 1}), image_size=64)
    assert again.digest == eval_set.digest != other.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"languages": ("de",)}, r"no caption in de; their captions are in en, zh"),
        ({"styles": ("fluent",)}, "fluent"),
    ],
)
def test_impossible_sets_are_refused(change: dict, message: str, pixels: Path) -> None:
    with pytest.raises(DataError, match=message):
        EvalSet.from_parquet(pixels, CONFIG.model_copy(update=change), image_size=64)


# ---- The evaluator -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reports(
    evaluator: Evaluator, eval_set: EvalSet, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, EvalReport]:
    grids = tmp_path_factory.mktemp("grids")
    found = {"real": evaluator.evaluate_real(), "tokenizer": evaluator.evaluate_tokenizer(Coarse())}
    for subject, quality in (("good", 0.9), ("bad", 0.3)):
        found[subject] = evaluator.evaluate_generator(
            Oracle(eval_set, quality), subject, validation_loss=3.5, tokenizer=Coarse(), grids=grids
        )
    return found


def test_floors_and_generators_come_in_the_right_order(reports: dict[str, EvalReport]) -> None:
    values = {name: metric_values(report) for name, report in reports.items()}
    for metric in ("retrieval", "noto/retrieval"):
        assert values["real"][metric] > 0.9
        assert values["good"][metric] > values["bad"][metric] + 0.2
        assert values["tokenizer"][metric] > values["bad"][metric]
    assert values["good"]["retrieval_seen_zh"] > 0.8
    assert values["good"]["kid_unseen"] < values["bad"]["kid_unseen"]
    assert values["real"]["retrieval_seen_shuffled"] < 0.1
    kid = reports["real"].metrics["kid_unseen"]
    assert kid.low < 0 < kid.high and "kid_seen" not in values["real"]
    assert values["tokenizer"]["psnr_unseen"] > 10 and 0 < values["tokenizer"]["ssim_seen"] < 1
    assert values["good"]["nearest_seen"] < values["good"]["nearest_unseen"]


def test_a_gain_is_of_the_same_images_together(
    reports: dict[str, EvalReport], evaluator: Evaluator
) -> None:
    good, bad = reports["good"].metrics, reports["bad"].metrics
    gains = evaluator.with_gains(reports["good"], ["bad"]).metrics
    for name in ("kid", "kid_unseen", "noto/kid_seen"):
        gain = gains[f"over_bad/{name}"]
        assert gain.value == pytest.approx(bad[name].value - good[name].value)
        assert 0 < gain.low < gain.value < gain.high
    for name in ("retrieval", "retrieval_seen_zh", "noto/retrieval"):
        gain = gains[f"over_bad/{name}"].value
        assert gain == pytest.approx(good[name].value - bad[name].value) and gain > 0
    same = evaluator.with_gains(reports["good"], ["good"]).metrics
    assert all(gain.value == 0 for name, gain in same.items() if name.startswith("over_good/"))
    assert good.items() <= same.items() and len(same) > len(good)


def test_further_styles_and_languages_may_have_fewer_images(
    pixels: Path, aligner: Aligner, encoder: HFCaptionEncoder, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"num_other_images": 8, "guidance_scales": ()})
    sets = EvalSet.from_parquet(pixels, config, image_size=64)
    assert [len(s.captions["en"]) for s in sets.sets] == [32, 32, 8, 8]
    generator = Oracle(sets)
    evaluator = Evaluator(
        sets, aligner=aligner, features=ImageNetFeatures(64), encoder=encoder, config=config
    )
    report = evaluator.evaluate_generator(generator, "candidate", grids=tmp_path)
    chinese = [call for call in generator.calls if call.prompt in sets.sets[0].captions["zh"]]
    assert len(chinese) == 8 and report.metrics["retrieval_seen_zh"].value > 0.7
    names = ("candidate-noto-seen.png", "candidate-twemoji-seen.png")
    heights = {Image.open(tmp_path / name).height for name in names}
    assert len(heights) == 1, "as many rows as there are of every language"


class Small(Oracle):
    """Draws at half the size."""

    image_size = 32

    def generate(self, requests: Sequence[GenerationRequest], *, on_step: object = None) -> Tensor:
        return super().generate(requests)[:, :, ::2, ::2]


def test_a_generator_of_another_size_is_evaluated_at_the_size_of_the_real_images(
    eval_set: EvalSet, evaluator: Evaluator, tmp_path: Path
) -> None:
    report = evaluator.evaluate_generator(Small(eval_set), "small", grids=tmp_path)
    assert report.metrics["retrieval"].value > 0.7
    with Image.open(report.grids["noto-seen"]) as small:
        full = evaluator.evaluate_generator(Oracle(eval_set), "full", grids=tmp_path).grids[
            "noto-seen"
        ]
        assert small.size == Image.open(full).size


def test_guidance_scales_are_reported_beside(reports: dict[str, EvalReport]) -> None:
    values = metric_values(reports["good"])
    assert values["guidance_1/retrieval_seen"] < values["retrieval_seen"]
    assert values["guidance_1/kid_seen"] > values["kid_seen"]


def test_speed_and_validation_loss_are_in_the_report(reports: dict[str, EvalReport]) -> None:
    metrics = reports["good"].metrics
    assert metrics["seconds_per_image"].value > 0 and metrics["latency_s"].value > 0
    assert metrics["validation_loss"].value == 3.5


def test_reports_survive_json_and_make_a_table(reports: dict[str, EvalReport]) -> None:
    report = reports["good"]
    assert from_dict(json.loads(json.dumps(to_dict(report)))) == report
    table = markdown_table(list(reports.values()))
    assert table.startswith("| metric | real | tokenizer | good | bad |\n|---|---|")
    assert table.count("\n| retrieval |") == 1
    with pytest.raises(DataError, match="evaluate again"):
        from_dict({"subject": "x"})


def test_grids_show_real_tokens_and_every_language(reports: dict[str, EvalReport]) -> None:
    grids = reports["good"].grids
    assert set(grids) == {"twemoji-seen", "twemoji-unseen", "noto-seen", "noto-unseen"}
    with Image.open(grids["twemoji-seen"]) as wide, Image.open(grids["noto-seen"]) as narrow:
        assert wide.width > narrow.width > 3 * 128


def test_requests_carry_style_and_seed_and_only_known_styles(
    evaluator: Evaluator, eval_set: EvalSet
) -> None:
    class NotoOnly(Oracle):
        styles = ("noto",)

        def generate(self, requests: Sequence[GenerationRequest], **_: object) -> Tensor:
            self.calls.extend(requests)
            return torch.zeros(len(requests), 3, 64, 64, dtype=torch.uint8)

    generator = NotoOnly(eval_set)
    unguided = Evaluator(
        eval_set, aligner=evaluator.aligner, features=evaluator.features,
        encoder=_Same(evaluator), config=CONFIG.model_copy(update={"guidance_scales": ()}),
    )  # fmt: skip
    report = unguided.evaluate_generator(generator, "untuned")
    assert {request.style for request in generator.calls} == {None, "noto"}
    first = generator.calls[: len(eval_set.sets[0])]
    assert [request.seed for request in first] == list(range(len(first)))
    assert report.metrics["retrieval"].value < 0.1, "black images show nothing"


class _Same:
    """Stands in for the encoder, whose captions the evaluator has already embedded."""

    width, max_tokens = 384, 24

    def __init__(self, evaluator: Evaluator) -> None:
        self.width = evaluator.aligner.caption_width

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        states = torch.randn(
            len(captions), 2, self.width, generator=torch.Generator().manual_seed(0)
        )
        return states, torch.ones(len(captions), 2, dtype=torch.bool)
