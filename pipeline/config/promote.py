"""The recipe's section `promote`: the rules by which a candidate becomes champion.

promote:
  improve:                                  # at least one of these beyond chance
    - {metric: imagenet_r1/all}
    - {metric: kid/all, by: 0.01}
  keep:                                     # none of these worse than by its margin
    - {metric: sharpness/all, margin: 0.05}
  limits:                                   # bounds of the candidate's own numbers
    - {metric: copies/unseen, at_most: 0.1}
  slices:                                   # no slice clearly worse than by the margin
    - {metric: aligner_r1, of: [language, style], margin: 0.1}

A metric is MEASURE/SLICE ("imagenet_r1/all", "kid/unseen", "aligner_r1/language:zh"), or a number
of the whole model ("size_mb"). A list that a recipe gives replaces the default list.
pipeline/chain/promotion.py says how each kind of rule is tested.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from pipeline.config.judges import HUB_JUDGES, TRAINED_JUDGES
from pipeline.config.section import Config

LOG_SUFFIX = "-decisions"
"""Of the registered model that is the log of decisions about another one."""
OF_JUDGES = ("r1", "r5", "alignment")
MEASURES = (
    *(f"{judge}_{name}" for judge in (*TRAINED_JUDGES, *HUB_JUDGES) for name in OF_JUDGES),
    "style_match", "composition", "guidance_gain", "kid", "fid", "precision", "recall", "density",
    "coverage", "diversity", "sharpness", "psnr", "ssim", "nearest", "copies",
)  # fmt: skip
"""Measures of images (pipeline/evaluation/scores.py describes them)."""
SCALARS = ("latency_s", "images_per_s", "size_mb", "validation_loss")
"""Numbers of the whole model."""
WITHOUT_DIRECTION = ("nearest",)
WITHOUT_INTERVAL = ("latency_s", "images_per_s", "validation_loss", "fid")
OF_THE_WHOLE_SET = ("precision", "recall", "density", "coverage", "diversity")
"""Measures of an image that depend on all others of its set, which the bootstrap over images does
not see: between equal models they differ by up to three times what their interval says (recall;
coverage 1.7 times; tests/benchmarks/RESULTS.md)."""
SLICES = ("all", "seen", "unseen", "compositions")
Dimension = Literal["language", "style", "topic", "words"]
DIMENSIONS: tuple[Dimension, ...] = ("language", "style", "topic", "words")
OTHER_DIMENSIONS = ("guidance", "compositions", "kind")
"""Of compositions, "compositions:zh" is a language and "kind:colour" a kind."""


def judge_of(metric: str) -> str | None:
    """The judge whose comparison of images with captions a metric is; None for other metrics."""
    judge, _, kind = metric.partition("/")[0].rpartition("_")
    return judge if kind in OF_JUDGES else None


def _measure(name: str) -> str:
    known = (*MEASURES, *SCALARS)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
        raise ValueError(f"there is no measure {name!r}; {hint}")
    return name


def _metric(name: str) -> str:
    measure, slash, of = name.partition("/")
    dimension, colon, value = of.partition(":")
    dimensions = (*DIMENSIONS, *OTHER_DIMENSIONS)
    known = of in SLICES or (colon and value and dimension in dimensions)
    _measure(measure)
    if not slash and measure not in SCALARS:
        raise ValueError(f"{name!r} does not say of which images: write '{name}/all', for example")
    if slash and measure in SCALARS:
        raise ValueError(f"{measure!r} is a number of the whole model: write it without '/{of}'")
    if slash and not known:
        close = difflib.get_close_matches(of, SLICES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "for example 'style:noto'"
        raise ValueError(
            f"there is no slice {of!r}: a slice is {', '.join(SLICES)} or one of "
            f"{', '.join(f'{name}:VALUE' for name in dimensions)}; {hint}"
        )
    return name


def _compared(name: str) -> str:
    if _metric(name).partition("/")[0] in WITHOUT_DIRECTION:
        raise ValueError(f"{name!r} is better in neither direction: it can have `limits` alone")
    return name


def _tested(name: str) -> str:
    measure = _compared(name).partition("/")[0]
    if measure in WITHOUT_INTERVAL:
        raise ValueError(
            f"{measure!r} is measured once, so that no improvement of it is beyond chance: use it "
            "in `keep` or `limits`"
        )
    if measure in OF_THE_WHOLE_SET:
        raise ValueError(
            f"{measure!r} depends on all images together, so that its interval is too narrow to "
            "show an improvement: use it in `keep`, with a wide margin, or in `limits`"
        )
    return name


def _sliced(name: str) -> str:
    if "/" in name:
        raise ValueError(f"{name!r} names a slice: write {name.partition('/')[0]!r} alone")
    if name in (*SCALARS, *WITHOUT_DIRECTION, *OF_THE_WHOLE_SET):
        raise ValueError(f"{name!r} has no slices that could be compared")
    return _measure(name)


Metric = Annotated[str, AfterValidator(_metric)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class ImproveRule(Config):
    """At least one metric of the list `improve` must get better beyond chance."""

    metric: Annotated[str, AfterValidator(_tested)]
    by: Finite = Field(
        0.0,
        ge=0,
        description="the gain must be more than this, beyond chance; in the metric's unit",
    )


class KeepRule(Config):
    """The metric must not get worse than by a margin, which has to be shown beyond chance."""

    metric: Annotated[str, AfterValidator(_compared)]
    margin: Finite = Field(gt=0, description="largest loss that is tolerated; in the metric's unit")


class LimitRule(Config):
    """A bound of the candidate's own number, whatever the champion's is."""

    metric: Metric
    at_most: Finite | None = Field(None, description="the number may be this at most")
    at_least: Finite | None = Field(None, description="the number must be this at least")

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError(f"limit of {self.metric}: give either at_most or at_least")
        return self


class SliceRule(Config):
    """No slice may get worse than by the margin beyond chance."""

    metric: Annotated[str, AfterValidator(_sliced)]
    of: tuple[Dimension, ...] = Field(
        DIMENSIONS, min_length=1, description="what the images are sliced by"
    )
    margin: Finite = Field(
        0.1, ge=0, description="largest loss that is tolerated; in the metric's unit"
    )
    min_images: int = Field(
        20, ge=2, description="slices of fewer images are skipped, and the decision says so"
    )

    @model_validator(mode="after")
    def _distances_are_sliced_by_style(self) -> Self:
        if self.metric in ("kid", "fid") and self.of != ("style",):
            raise ValueError(f"{self.metric} is measured per style alone: write of: [style]")
        return self


class CanaryConfig(Config):
    """What a model must do in the real service before it becomes champion (serve/canary.py)."""

    prompts: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        ("a red apple", "a smiling cat", "three blue stars", "一个红苹果", "一只猫", "太阳"),
        min_length=1,
        description="what is drawn, in the default style; and one image in every style",
    )
    max_latency_s: float = Field(
        30.0, gt=0, description="seconds within which 95 % of the images must come, one at a time"
    )
    timeout_s: float = Field(
        600.0, gt=0, description="seconds that the whole check may take, the start included"
    )


def _no_log(name: str) -> str:
    if name.endswith(LOG_SUFFIX):
        raise ValueError(
            f"a name that ends in {LOG_SUFFIX} is that of another model's log of decisions: "
            "choose another name"
        )
    return name


class PromoteConfig(Config):
    """The rules by which a candidate becomes champion (pipeline/chain/promotion.py)."""

    model_name: Annotated[str, AfterValidator(_no_log)] = Field(
        "tessera", pattern=r"^[^/:@']+$", description="name in the model registry"
    )
    level: float = Field(
        0.02,
        gt=0,
        lt=0.5,
        description="largest probability that chance alone promotes a model which is no better; "
        "tests on paired bootstrap intervals keep to it closely from about 100 images on, so that "
        "0.05 would promote one equal model in twenty",
    )
    harm_level: float = Field(
        0.05,
        gt=0,
        lt=0.5,
        description="probability of an error about harm: that `keep` passes a loss as large as its "
        "margin, or that any slice refuses a model whose loss is within it",
    )
    improve: tuple[ImproveRule, ...] = Field(
        (
            ImproveRule(metric="imagenet_r1/all"),
            ImproveRule(metric="kid/all"),
            ImproveRule(metric="style_match/all"),
        ),
        min_length=1,
        description="at least one of these must get better beyond chance",
    )
    keep: tuple[KeepRule, ...] = Field(
        (
            KeepRule(metric="aligner_r1/all", margin=0.1),
            KeepRule(metric="imagenet_r1/all", margin=0.1),
            KeepRule(metric="kid/all", margin=0.02),
            KeepRule(metric="sharpness/all", margin=0.05),
            KeepRule(metric="coverage/all", margin=0.15),
        ),
        description="each of these must be shown not to get worse than by its margin; the margins "
        "are at least four standard deviations of the gain between two equal models on 356 images",
    )
    limits: tuple[LimitRule, ...] = Field(
        (LimitRule(metric="copies/unseen", at_most=0.2),),
        description="bounds of the candidate's own numbers",
    )
    slices: tuple[SliceRule, ...] = Field(
        (SliceRule(metric="aligner_r1"), SliceRule(metric="imagenet_r1")),
        description="measures that no slice may clearly lose",
    )
    choose_by: Annotated[str, AfterValidator(_compared)] = Field(
        "imagenet_r1/all", description="metric by which the best of several candidates is chosen"
    )
    min_images: int = Field(
        60,
        ge=2,
        description="images that a rule of `improve` or `keep` needs at least; with fewer it fails",
    )
    canary: CanaryConfig = CanaryConfig()
    unjudged: bool = Field(
        False,
        description="promote whatever the rules say; to try out the plumbing, never for a model "
        "that is used",
    )

    @property
    def metrics(self) -> list[tuple[str, str]]:
        """What every rule is about: its list and its metric, or, of slices, its measure."""
        return [
            *(("improve", rule.metric) for rule in self.improve),
            *(("keep", rule.metric) for rule in self.keep),
            *(("limits", rule.metric) for rule in self.limits),
            *(("slices", rule.metric) for rule in self.slices),
        ]

    @model_validator(mode="after")
    def _no_rule_twice(self) -> Self:
        rules: dict[str, tuple[Any, ...]] = {
            "improve": self.improve, "keep": self.keep, "slices": self.slices
        }  # fmt: skip
        for name, listed in rules.items():
            metrics = [rule.metric for rule in listed]
            for metric in metrics:
                if metrics.count(metric) > 1:
                    raise ValueError(f"{name} lists {metric} more than once")
        return self
