"""The judgement judges: models that are worse in one known way are caught by the rule for it.

The shipped base is the champion. Every candidate is the same base, harmed in one way: what it draws
is measured by both judges on the shipped drawings, and the gate decides with the rules below.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from pipeline.artifacts import resolve_path
from pipeline.bundles.bundle import load_generator
from pipeline.chain.plan import resolve
from pipeline.chain.promotion import decide
from pipeline.chain.table import JUDGE, pixels_of
from pipeline.chain.workflow import run_steps
from pipeline.config import EvaluateConfig, PromoteConfig, load_recipe
from pipeline.contracts import Decision, GenerationRequest, ImageGenerator
from pipeline.evaluation.eval_set import EvalSet
from pipeline.evaluation.features import FeaturesSpec
from pipeline.evaluation.judges.spec import judge_specs
from pipeline.evaluation.measuring import Instruments, measure_here
from pipeline.evaluation.scores import Comparison
from pipeline.evaluation.subjects import (
    BlurredImages,
    Images,
    RealImages,
    ReconstructedImages,
    Subject,
    images_of,
)
from pipeline.evaluation.validity import validity_of
from pipeline.images.degrade import blur
from pipeline.images.pixels import to_float, to_uint8
from pipeline.text.caption_encoder import HFCaptionEncoder
from pipeline.tracking.steps import Reporter

pytestmark = pytest.mark.slow
CONFIG = EvaluateConfig(
    num_images=160, num_other_images=100, styles=("noto", "twemoji"), guidance_scales=(1.0,),
    compositions=False,
)  # fmt: skip
HOW = {"bootstrap": CONFIG.bootstrap, "seed": CONFIG.seed}
RULES = PromoteConfig.model_validate(
    {
        "improve": [{"metric": "imagenet_r1/all"}],
        "keep": [
            {"metric": "imagenet_r1/all", "margin": 0.1},
            {"metric": "aligner_r1/all", "margin": 0.1},
            {"metric": "kid/all", "margin": 0.05},
            {"metric": "sharpness/all", "margin": 0.05},
            {"metric": "coverage/all", "margin": 0.1},
            {"metric": "guidance_gain/seen", "margin": 0.03},
        ],
        "limits": [{"metric": "copies/unseen", "at_most": 0.2}],
        "slices": [
            {"metric": "imagenet_r1", "of": ["language", "style"], "margin": 0.1},
            {"metric": "aligner_r1", "of": ["language", "style"], "margin": 0.1},
        ],
    }
)

Change = Callable[[Sequence[GenerationRequest]], list[GenerationRequest]]
Paint = Callable[[Sequence[GenerationRequest], Tensor], Tensor]
DECODING_STEPS = 6


def same(requests: Sequence[GenerationRequest]) -> list[GenerationRequest]:
    return list(requests)


def unpainted(requests: Sequence[GenerationRequest], images: Tensor) -> Tensor:
    return images


class Harmed:
    """A generator whose requests or images are changed."""

    def __init__(self, generator: ImageGenerator, change: Change, paint: Paint) -> None:
        self.generator, self.change, self.paint = generator, change, paint
        self.image_size, self.tasks = generator.image_size, generator.tasks
        self.styles = generator.styles

    def generate(self, requests: Sequence[GenerationRequest], *, on_step: Any = None) -> Tensor:
        asked = [
            r if r.num_steps else replace(r, num_steps=DECODING_STEPS)
            for r in self.change(requests)
        ]
        return self.paint(requests, self.generator.generate(asked))


@dataclass(frozen=True)
class HarmedImages(Subject):
    name: str
    generator: ImageGenerator
    change: Change = same
    paint: Paint = unpainted
    offset: int = 0
    generates: bool = True

    def open(self) -> Images:
        return images_of(Harmed(self.generator, self.change, self.paint))


def wrong(request: GenerationRequest) -> GenerationRequest:
    """Drawn as if something else had been asked for."""
    return replace(request, prompt="a blue car" if "car" not in request.prompt else "a flower")


def each(
    harmed: Callable[[GenerationRequest], bool],
    harm: Callable[[GenerationRequest], GenerationRequest] = wrong,
) -> Change:
    return lambda requests: [harm(r) if harmed(r) else r for r in requests]


def rolled(requests: Sequence[GenerationRequest]) -> list[GenerationRequest]:
    """Every image is drawn for its neighbour's caption."""
    prompts = [r.prompt for r in requests]
    return [
        replace(r, prompt=prompt)
        for r, prompt in zip(requests, prompts[1:] + prompts[:1], strict=True)
    ]


def blurred(requests: Sequence[GenerationRequest], images: Tensor) -> Tensor:
    return to_uint8(blur(to_float(images), 1.5))


def quantised(generator: ImageGenerator) -> ImageGenerator:
    """The same generator, its matrices rounded to int8 with one scale per row."""
    linear = [m for m in generator.model.modules() if isinstance(m, nn.Linear)]  # type: ignore[attr-defined]
    assert linear
    for module in linear:
        scale = module.weight.data.float().abs().amax(1, keepdim=True) / 127
        rounded = (module.weight.data / scale).round() * scale
        module.weight.data = rounded.to(module.weight.dtype)
    return generator


class Nobody(Reporter):
    def started(self, step: str) -> None: ...
    def progress(self, step: str, progress: Any) -> None: ...
    def finished(self, step: str, seconds: float, *, skipped: bool) -> None: ...


@pytest.fixture(scope="module")
def decisions(
    tmp_path_factory: pytest.TempPathFactory,
    pretrained_cache: Path,
    encoder: HFCaptionEncoder,
    ray_session: None,
) -> dict[str, Decision]:
    home = tmp_path_factory.mktemp("judgement")
    (home / "pretrained").symlink_to(pretrained_cache)
    plan = resolve(load_recipe("emoji-demo", environment={}), home)
    results = run_steps(plan, Nobody(), JUDGE)
    eval_set = EvalSet.from_parquet(pixels_of(results), CONFIG, image_size=64)
    specs = judge_specs(
        ["aligner", "imagenet"],
        trained={"aligner": resolve_path("asset:aligner"), "imagenet": results[JUDGE].bundle},
        caption_encoder=plan.encoder.config,
        cache=pretrained_cache,
    )
    instruments = Instruments.prepare(
        eval_set, specs, features=FeaturesSpec(), encoder=encoder, config=CONFIG
    )
    base, another = (
        load_generator("asset:base", pretrained_cache=pretrained_cache) for _ in range(2)
    )
    copies = copier(eval_set, encoder)
    subjects: list[Subject] = [
        RealImages(),
        ReconstructedImages(resolve_path("asset:base") / "tokenizer"),
        BlurredImages(),
        RealImages("shuffled", offset=1),
        HarmedImages("champion", base),
        HarmedImages("other-seeds", base, each(lambda r: True, reseed)),
        HarmedImages("quantised", quantised(another)),
        HarmedImages("one-step", base, each(lambda r: True, lambda r: replace(r, num_steps=1))),
        HarmedImages("blurring", base, paint=blurred),
        HarmedImages("shuffling", base, rolled),
        HarmedImages("copying", base, paint=copies),
        HarmedImages("collapsed", base, each(lambda r: True, collapse)),
        HarmedImages("unguided", base, each(lambda r: True, unguide)),
        HarmedImages("forgot-chinese", base, each(lambda r: bool(re.search("[一-鿿]", r.prompt)))),
        HarmedImages("forgot-style", base, each(lambda r: r.style is None)),
    ]  # fmt: skip
    measured = measure_here(subjects, instruments)
    validity = validity_of(["aligner", "imagenet"], measured, **HOW)
    print({name: found.reason for name, found in validity.items()})
    return {
        name: decide(
            Comparison(measured["champion"], subject, measured["real"], **HOW), validity, RULES
        )
        for name, subject in measured.items()
        if name not in ("real", "tokenizer", "blurred", "shuffled", "champion")
    }


def reseed(request: GenerationRequest) -> GenerationRequest:
    return replace(request, seed=request.seed + 100_000)


def unguide(request: GenerationRequest) -> GenerationRequest:
    return replace(request, guidance_scale=1.0)


def collapse(request: GenerationRequest) -> GenerationRequest:
    """One of a handful of images, whatever is asked for."""
    few = ("a red apple", "a blue car", "a yellow star", "a green tree")
    number = request.seed % len(few)
    return replace(request, prompt=few[number], seed=number)


def copier(eval_set: EvalSet, encoder: HFCaptionEncoder) -> Paint:
    """Gives the training image of the nearest seen caption instead of drawing."""
    seen = eval_set.sets[0]
    texts = seen.captions["en"][: len(seen)]
    known = encoder.embed(texts)

    def paint(requests: Sequence[GenerationRequest], images: Tensor) -> Tensor:
        wanted = encoder.embed([request.prompt for request in requests])
        return seen.images[(wanted @ known.T).argmax(1)]

    return paint


def refusals(decision: Decision) -> set[str]:
    return {f"{v.rule} {v.metric}" for v in decision.verdicts if v.outcome == "no"} - {
        "improve imagenet_r1/all"
    }


def test_equals_are_not_promoted_and_not_refused(decisions: dict[str, Decision]) -> None:
    for name in ("other-seeds", "quantised"):
        assert not decisions[name].promoted
        assert not refusals(decisions[name]), decisions[name].reasons


@pytest.mark.parametrize(
    ("name", "caught_by", "may_also"),
    [
        ("one-step", {"keep kid/all"}, {"keep"}),
        ("blurring", {"keep sharpness/all"}, {"keep"}),
        ("shuffling", {"keep imagenet_r1/all", "keep aligner_r1/all"}, {"slice", "keep guidance"}),
        ("copying", {"limit copies/unseen"}, {"keep", "slice"}),
        ("collapsed", {"keep coverage/all"}, {"keep", "slice"}),
        ("unguided", {"keep guidance_gain/seen"}, set()),
        ("forgot-chinese", {"slice imagenet_r1/language:zh"}, {"slice aligner_r1/language:zh"}),
        ("forgot-style", {"slice imagenet_r1/style:twemoji"}, {"slice aligner_r1/style:twemoji"}),
    ],
)
def test_each_harm_is_caught_by_its_rule(
    decisions: dict[str, Decision], name: str, caught_by: set[str], may_also: set[str]
) -> None:
    decision, found = decisions[name], refusals(decisions[name])
    assert not decision.promoted
    assert caught_by <= found, decision.reasons
    others = {rule for rule in found - caught_by if not rule.startswith(tuple(may_also) or "-")}
    assert not others, "no accident of another rule"
