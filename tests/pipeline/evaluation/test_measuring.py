"""Evaluation sets are fair, and what is measured tells good generators from bad ones."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from ray import cloudpickle
from torch import Tensor

from pipeline.config import EvaluateConfig
from pipeline.contracts import GenerationRequest
from pipeline.errors import DataError, user_error
from pipeline.evaluation.eval_set import EvalSet
from pipeline.evaluation.measured import Measured
from pipeline.evaluation.measuring import Instruments, count_words, measure, measure_here
from pipeline.evaluation.reports import Evaluation, markdown_table
from pipeline.evaluation.scores import Comparison, measure_of, scores
from pipeline.evaluation.subjects import (
    BlurredImages,
    Images,
    RealImages,
    Subject,
    images_of,
)  # fmt: skip
from pipeline.evaluation.validity import validity_of
from pipeline.text.caption_encoder import HFCaptionEncoder

CONFIG = EvaluateConfig(
    num_images=32, num_other_images=16, styles=("twemoji", "noto"), guidance_scales=(1.0,),
    bootstrap=200, batch_size=8,
)  # fmt: skip
HOW = {"bootstrap": CONFIG.bootstrap, "seed": CONFIG.seed}


@pytest.fixture(scope="module")
def eval_set(pixels: Path) -> EvalSet:
    return EvalSet.from_parquet(pixels, CONFIG, image_size=64)


@dataclass(frozen=True)
class PixelJudge:
    """A judge and features that look at colours: it knows the real image of every caption."""

    known: dict[str, Tensor]
    name: str = "imagenet"
    digest: str = "pixels"
    side: int = 8

    def load(self, device: str = "cpu") -> PixelJudge:
        return self

    @property
    def identity(self) -> PixelJudge:
        return self

    def __call__(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images.float() / 255, self.side).flatten(1)

    def embed_images(self, images: Tensor) -> Tensor:
        return F.normalize(self(images) - 0.9, dim=-1)

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        grey = torch.full((3, 64, 64), 128, dtype=torch.uint8)
        return self.embed_images(torch.stack([self.known.get(c, grey) for c in captions]))


@pytest.fixture(scope="module")
def instruments(eval_set: EvalSet, encoder: HFCaptionEncoder) -> Instruments:
    known: dict[str, Tensor] = {}
    for image_set in eval_set.sets:  # the gated style's first: it knows no other drawing
        for captions in image_set.captions.values():
            for caption, image in zip(captions, image_set.images, strict=False):
                known.setdefault(caption, image)
    judge: Any = PixelJudge(known)
    return Instruments.prepare(eval_set, [judge], features=judge, encoder=encoder, config=CONFIG)


@dataclass(frozen=True)
class Oracle(Subject):
    """Draws the very image a caption belongs to, as well as `quality` allows."""

    name: str
    eval_set: EvalSet
    quality: float = 1.0
    size: int = 64
    offset: int = 0
    generates: bool = True

    def open(self) -> Images:
        return images_of(OracleGenerator(self.eval_set, self.quality, self.size))


class OracleGenerator:
    tasks = frozenset({"text_to_image"})
    styles = ("noto", "twemoji")

    def __init__(self, eval_set: EvalSet, quality: float, size: int) -> None:
        self.quality, self.image_size = quality, size
        self.images = {
            (image_set.style, caption): image
            for image_set in eval_set.sets
            for captions in image_set.captions.values()
            for caption, image in zip(captions, image_set.images, strict=False)
        }

    def generate(self, requests: Sequence[GenerationRequest], *, on_step: object = None) -> Tensor:
        drawn = []
        for request in requests:
            quality = 0.3 * self.quality if request.guidance_scale == 1.0 else self.quality
            generator = torch.Generator().manual_seed(request.seed)
            noise = torch.randint(0, 256, (3, 64, 64), generator=generator)
            unknown = torch.full((3, 64, 64), 255, dtype=torch.uint8)  # a composition
            image = self.images.get((request.style, request.prompt), unknown).float()
            drawn.append(quality * image + (1 - quality) * noise)
        step = 64 // self.image_size
        return torch.stack(drawn).to(torch.uint8)[:, :, ::step, ::step]


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
            gated = image_set.style == eval_set.style
            wanted_count = CONFIG.num_images if gated else CONFIG.num_other_images
            assert len(set(captions)) == len(captions) == wanted_count
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


# ---- Measuring -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subjects(eval_set: EvalSet) -> list[Subject]:
    return [
        RealImages(),
        BlurredImages(),
        RealImages("shuffled", offset=1),
        Oracle("good", eval_set, 0.9),
        Oracle("bad", eval_set, 0.3),
    ]


@pytest.fixture(scope="module")
def measured(subjects: list[Subject], instruments: Instruments) -> dict[str, Measured]:
    return measure_here(subjects, instruments)


def test_floors_and_generators_come_in_the_right_order(measured: dict[str, Measured]) -> None:
    found = {name: scores(m, measured["real"], **HOW) for name, m in measured.items()}
    value = {name: {k: v.value for k, v in numbers.items()} for name, numbers in found.items()}
    for slice_name in ("all", "seen", "unseen", "language:zh"):
        metric = f"imagenet_r1/{slice_name}"
        assert value["real"][metric] == 1.0
        assert value["good"][metric] > value["bad"][metric] + 0.1
        assert value["shuffled"][metric] == 0
    assert value["good"]["kid/unseen"] < value["bad"]["kid/unseen"]
    assert value["real"]["sharpness/all"] == 1.0
    assert value["blurred"]["sharpness/all"] < 0.8 and value["bad"]["sharpness/all"] < 0.9
    assert value["bad"]["imagenet_alignment/all"] < value["good"]["imagenet_alignment/all"] <= 1
    for name in ("precision", "recall", "coverage", "density", "diversity"):
        assert value["good"][f"{name}/all"] >= 0
    assert value["good"]["nearest/seen"] < value["good"]["nearest/unseen"]
    assert value["good"]["guidance_gain/seen"] > 0.05
    assert value["good"]["composition/kind:count"] == 0, "nothing is drawn on white"
    assert "composition/compositions:zh" in value["good"]
    assert value["good"]["imagenet_r1/guidance:1"] < value["good"]["imagenet_r1/seen"]
    assert value["good"]["latency_s"] > 0 and value["good"]["images_per_s"] > 0
    assert "kid/all" not in value["real"] and "latency_s" not in value["real"]
    for numbers in found.values():
        assert all(n.low <= n.value <= n.high for n in numbers.values())
        assert all(measure_of(name) for name in numbers), "each is described"


def test_slices_part_the_images(measured: dict[str, Measured], eval_set: EvalSet) -> None:
    good = measured["good"]
    assert len(good.values("imagenet_r1", "seen")) == len(eval_set.sets[0])
    assert len(good.values("imagenet_r1", "all")) == sum(map(len, eval_set.sets[:2]))
    both = sum(good.mask(name).sum() for name in ("seen", "unseen"))
    assert both == good.mask("all").sum()
    words = [name for name in good.slices if name.startswith("words:")]
    assert sum(good.mask(name).sum() for name in words) == good.mask("all").sum()
    topics = [name for name in good.slices if name.startswith("topic:")]
    assert len(topics) >= 2
    assert sum(good.mask(name).sum() for name in topics) == good.mask("all").sum()
    with pytest.raises(KeyError):
        good.mask("language:de")


@pytest.mark.parametrize(("text", "words"), [("red apple", 2), ("红苹果", 3), ("", 0), ("a-b", 2)])
def test_words_of_any_language_are_counted(text: str, words: int) -> None:
    assert count_words(text) == words


def test_a_gain_is_of_the_same_images_together(measured: dict[str, Measured]) -> None:
    real = measured["real"]
    comparison = Comparison(measured["bad"], measured["good"], real, **HOW)
    for metric in ("kid/all", "imagenet_r1/all", "imagenet_r1/language:zh", "sharpness/all"):
        gain = comparison.gain(metric)
        before, after = (comparison.value(w, metric).value for w in ("before", "after"))
        sign = -1 if metric.startswith("kid") else 1
        assert gain.value == pytest.approx(sign * (after - before)) and gain.value > 0
        assert gain.low <= gain.value <= gain.high
        wider = comparison.gain(metric, level=0.999)
        assert wider.low <= gain.low and wider.high >= gain.high
    same = Comparison(measured["good"], measured["good"], real, **HOW)
    assert all(g.value == g.low == g.high == 0 for g in same.gains().values())
    assert comparison.count("imagenet_r1/all") == len(real.values("imagenet_r1", "all"))
    assert comparison.slices("language") == ["language:en", "language:zh"]
    with pytest.raises(DataError, match=r"good has no|bad has no"):
        comparison.gain("aligner_r1/all")


def test_subjects_of_other_images_are_not_compared(measured: dict[str, Measured]) -> None:
    good = measured["good"]
    other = replace(good, rows=good.rows.slice(1))
    with pytest.raises(DataError, match="different images"):
        Comparison(good, other, measured["real"], **HOW)


def test_a_generator_of_another_size_is_measured_at_the_size_of_the_real_images(
    eval_set: EvalSet, instruments: Instruments
) -> None:
    small = measure_here([RealImages(), Oracle("small", eval_set, size=32)], instruments)["small"]
    assert small.values("imagenet_r1", "all").mean() > 0.9


def test_the_numbers_are_the_same_on_any_number_of_workers(
    subjects: list[Subject], instruments: Instruments, measured: dict[str, Measured],
    ray_session: None,
) -> None:  # fmt: skip
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
    shares = []
    alone, both = (
        measure(
            subjects[:4], instruments, num_workers=n, on_progress=lambda p: shares.append(p.share)
        )
        for n in (1, 2)
    )
    for name, subject in both.items():
        assert subject.rows.equals(alone[name].rows), name
        assert subject.rows.equals(measured[name].rows), name
    assert shares[-1] == pytest.approx(0.95) and min(shares) > 0


@dataclass(frozen=True)
class Broken(Subject):
    error: Exception
    name: str = "broken"
    offset: int = 0
    generates: bool = True

    def open(self) -> Images:
        raise self.error


@pytest.mark.parametrize("error", [DataError("no such bundle"), ValueError("a fault of ours")])
def test_a_workers_error_is_told_as_itself(
    error: Exception, instruments: Instruments, ray_session: None
) -> None:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with pytest.raises(type(error), match=str(error)) as told:
        measure([Broken(error)], instruments, num_workers=1)
    assert (user_error(told.value) is told.value) == isinstance(error, DataError)


# ---- Judges that cannot judge --------------------------------------------------------------------


def test_a_judge_whose_floors_are_out_of_order_is_invalid(measured: dict[str, Measured]) -> None:
    assert validity_of(["imagenet"], measured, **HOW)["imagenet"].valid
    swapped = {**measured, "real": measured["bad"], "untuned": measured["real"]}
    found = validity_of(["imagenet"], swapped, **HOW)["imagenet"]
    assert not found.valid and "less than blurred" in found.reason and found.remedy
    chance = {**measured, "real": measured["shuffled"]}
    found = validity_of(["imagenet"], chance, **HOW)["imagenet"]
    assert not found.valid and "real images have imagenet_r1/all 0.000" in found.reason


# ---- Files ---------------------------------------------------------------------------------------


def test_an_evaluation_survives_its_files(measured: dict[str, Measured], tmp_path: Path) -> None:
    made = Evaluation.make(
        tmp_path, measured, validity_of(["imagenet"], measured, **HOW),
        pairs=[("bad", "good")], details={"style": "twemoji"}, **HOW,
    )  # fmt: skip
    found = Evaluation.load(tmp_path)
    assert found == made
    assert found.gains["good"]["bad"]["imagenet_r1/all"].value > 0
    assert found.measured("good").rows.equals(measured["good"].rows)
    assert found.comparison("bad", "good").gain("kid/all").value > 0
    table = markdown_table(found.reports.values())
    assert table.startswith("| metric | real | blurred | shuffled | good | bad |\n|---|---|")
    assert table.count("\n| imagenet_r1/all |") == 1
    (tmp_path / "measurements" / "good.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="evaluate again"):
        found.measured("good")
    (tmp_path / "evaluation.json").write_text(json.dumps({"reports": {"x": {}}}))
    with pytest.raises(DataError, match="evaluate again"):
        Evaluation.load(tmp_path)


def test_a_measure_that_is_not_a_number_stays_one(measured: dict[str, Measured]) -> None:
    good = measured["good"]
    values = good.rows["imagenet_r1"].to_numpy().copy()
    values[0] = np.nan
    index = good.rows.column_names.index("imagenet_r1")
    broken = replace(good, rows=good.rows.set_column(index, "imagenet_r1", [values]))
    assert np.isnan(scores(broken, measured["real"], **HOW)["imagenet_r1/all"].value)
    gain = Comparison(good, broken, measured["real"], **HOW).gain("imagenet_r1/all")
    assert np.isnan([gain.value, gain.low, gain.high]).all()
