"""From measurements to numbers: metrics with intervals, and paired gains of one subject over
another.

    numbers = scores(candidate, real, bootstrap=1000, seed=0)   # {"imagenet_r1/all": Interval, ...}
    comparison = Comparison(champion, candidate, real, bootstrap=1000, seed=0)
    comparison.gain("kid/unseen", level=0.99)             # above zero: the candidate is better

A metric is called MEASURE/SLICE, or by the name of a number of the whole subject ("latency_s").
MEASURES says of each what it is and in which direction it is better.

Shapes: N images of a slice, D features, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline import metrics
from pipeline.contracts import Interval
from pipeline.errors import DataError
from pipeline.evaluation.measured import DIMENSIONS, Measured, check_paired

Array = NDArray[np.float64]
FEATURE_SLICES = ("all", "seen", "unseen")
"""Slices that distances between sets are computed of, besides every style."""
FEWEST_FOR_FID = 50
"""Images of a set; FID of fewer says nothing."""
RESAMPLES_BEYOND = 20  # expected beyond each end of an interval


@dataclass(frozen=True)
class Measure:
    """What a measure says.

    Attributes:
        better: the direction in which it is better; None where neither is.
        description: one sentence.
        unit: empty for shares and distances without one.
        group: what of an image it is about; reports show it together with its like.
    """

    better: Literal["higher", "lower"] | None
    description: str
    unit: str = ""
    group: str = "distribution"


_JUDGE = {
    "r1": Measure("higher", "how often the judge finds an image's own caption first", "", "judges"),
    "r5": Measure("higher", "how often it is among the judge's first five", "", "judges"),
    "alignment": Measure(
        "higher", "the judge's similarity of an image and its own caption, -1 to 1", "", "judges"
    ),
}
MEASURES: Mapping[str, Measure] = {
    **{f"aligner_{name}": measure for name, measure in _JUDGE.items()},
    **{f"imagenet_{name}": measure for name, measure in _JUDGE.items()},
    "style_match": Measure(
        "higher", "how often a classifier of the real styles names the style that was asked for",
        "", "judges",
    ),
    "composition": Measure(
        "higher", "how well images of compositions that are in no training set have the colours, "
        "counts and places that were asked for, 0 to 1", "", "judges",
    ),
    "guidance_gain": Measure(
        "higher", "what guidance adds to the second judge's similarity", "", "judges"
    ),
    "kid": Measure("lower", "Kernel Inception Distance to the real images; 0 is best"),
    "fid": Measure(
        "lower", "Frechet Inception Distance to the real images; biased upwards for few images, so "
        "compare it only between sets of one size",
    ),
    "precision": Measure("higher", "share of images that lie among the real ones"),
    "recall": Measure("higher", "share of real images that lie among these"),
    "density": Measure("higher", "how many real neighbourhoods an image lies in; real images: 1"),
    "coverage": Measure("higher", "share of real images with one of these among their nearest"),
    "diversity": Measure(
        "higher", "mean distance between the images, as a share of that between the real ones"
    ),
    "sharpness": Measure(
        "higher", "1: as sharp as the real image of the same caption; less: blurrier or noisier",
        "", "images",
    ),
    "psnr": Measure("higher", "of reconstructions, against the original", "dB", "images"),
    "ssim": Measure("higher", "of reconstructions, against the original", "", "images"),
    "nearest": Measure(None, "distance to the nearest training image, 0 to 1", "", "memory"),
    "copies": Measure(
        "lower", "share of images nearer to a training image than 95 % of new real images are",
        "", "memory",
    ),
    "latency_s": Measure("lower", "seconds of a single request", "s", "cost"),
    "images_per_s": Measure("higher", "images per second of one worker, in batches", "1/s", "cost"),
    "size_mb": Measure("lower", "size of the bundle", "MB", "cost"),
    "validation_loss": Measure("lower", "as training measured it", "", "cost"),
}  # fmt: skip
"""By name. Judges that a recipe adds have the same three measures with their own names before."""

SET_MEASURES = ("kid", "fid")
"""Measures of a set of images as a whole; all others are means over images."""


def measure_of(metric: str) -> Measure:
    """What the measure of a metric says.

    Raises:
        KeyError: there is no such measure.
    """
    name = metric.partition("/")[0]
    if name in MEASURES:
        return MEASURES[name]
    return _JUDGE[name.rpartition("_")[2]]


def scores(
    measured: Measured, real: Measured, *, bootstrap: int, seed: int, level: float = 0.95
) -> dict[str, Interval]:
    """Every metric of a subject, with its bootstrap interval.

    Args:
        real: of the real images, whose features distances are measured to.
        bootstrap: R, resamples per interval.
        seed: of the resamples.
        level: probability of the intervals.
    """
    found: dict[str, Interval] = {}
    how = {"bootstrap": bootstrap, "seed": seed}
    for measure in measured.measures:
        for name in measured.slices:
            values = measured.values(measure, name)
            if len(values):
                found[f"{measure}/{name}"] = metrics.mean_interval(values, level=level, **how)
    for name in _feature_slices(measured):
        found |= _distances(measured, real, name, level=level, **how)
    found |= {name: Interval(*[value] * 3) for name, value in measured.scalars.items()}
    return found


def _distances(
    measured: Measured, real: Measured, name: str, *, bootstrap: int, seed: int, level: float
) -> dict[str, Interval]:
    """The distances of a slice to the real images, where it has enough images with features."""
    ours, theirs = measured.features_of(name), real.features_of(name)
    if len(ours) < 2 or measured.subject == real.subject:
        return {}
    pair = torch.from_numpy(theirs), torch.from_numpy(ours)
    kid = metrics.kid_interval(*pair, bootstrap=bootstrap, seed=seed, level=level)
    if name != "all" or len(ours) < FEWEST_FOR_FID:
        return {f"kid/{name}": kid}
    return {f"kid/{name}": kid, f"fid/{name}": Interval(*[metrics.fid(*pair)] * 3)}


def _feature_slices(measured: Measured) -> list[str]:
    return [n for n in measured.slices if n in FEATURE_SLICES or n.startswith("style:")]


class Comparison:
    """Two subjects on the same captions, resampled together.

    Args:
        before, after: what is compared.
        real: of the real images.
        bootstrap: resamples per interval; more are taken for intervals of a high level.
        seed: of the resamples.

    Raises:
        DataError: the subjects were evaluated on different images.
    """

    def __init__(
        self, before: Measured, after: Measured, real: Measured, *, bootstrap: int, seed: int
    ) -> None:
        check_paired(before, after, "all")
        self.subjects = {"before": before, "after": after}
        self.before, self.after, self.real = before, after, real
        self.bootstrap, self.seed = bootstrap, seed
        self._known_distances: dict[tuple[str, str], dict[str, Interval]] = {}

    def gain(self, metric: str, level: float = 0.95) -> Interval:
        """By how much `after` is better than `before`, whatever the metric's direction.

        The interval is two-sided of probability `level`; metrics that are numbers of the whole
        subject, and FID, have no interval: both its ends are the value.

        Raises:
            DataError: one of the two lacks the metric.
        """
        measure, _, name = metric.partition("/")
        sign = -1.0 if measure_of(metric).better == "lower" else 1.0
        if not name or measure == "fid":
            after = self.value("after", metric).value
            gain = sign * (after - self.value("before", metric).value)
            return Interval(gain, gain, gain)
        how = {"bootstrap": self._resamples(level), "seed": self.seed}
        self._check(metric)
        if measure == "kid":
            return self._kid_gain(name, level)
        before, after_values = self.before.values(measure, name), self.after.values(measure, name)
        if len(before) != len(after_values):
            raise DataError(f"{metric} was not measured of the same images of both subjects")
        return metrics.paired_gain(sign * before, sign * after_values, level=level, **how)

    def value(self, which: Literal["before", "after"], metric: str) -> Interval:
        """A subject's own number, with its 95 % interval.

        Raises:
            DataError: it lacks the metric.
        """
        subject = self.subjects[which]
        measure, _, name = metric.partition("/")
        if not name and metric in subject.scalars:
            return Interval(*[subject.scalars[metric]] * 3)
        if name in _feature_slices(subject) and measure in SET_MEASURES:
            found = self._distances(which, name)
            if metric in found:
                return found[metric]
        if name in subject.slices and measure in subject.measures:
            values = subject.values(measure, name)
            if len(values):
                return metrics.mean_interval(values, bootstrap=self.bootstrap, seed=self.seed)
        raise DataError(f"{subject.subject} has no {metric}: {self._known(subject)}")

    def count(self, metric: str) -> int:
        """The number of images that a metric of `after` is of; 0 if it has none."""
        measure, _, name = metric.partition("/")
        if name not in self.after.slices:
            return 0
        if measure in SET_MEASURES:
            return len(self.after.features_of(name))
        return len(self.after.values(measure, name)) if measure in self.after.measures else 0

    def slices(self, dimension: str) -> list[str]:
        """The names of the slices of a dimension, as "language:zh"; of `split` "seen", "unseen".

        Raises:
            DataError: there is no such dimension.
        """
        if dimension not in DIMENSIONS:
            raise DataError(f"images have no {dimension}: slice by {', '.join(DIMENSIONS)}")
        if dimension == "split":
            return [name for name in ("seen", "unseen") if name in self.after.slices]
        return [name for name in self.after.slices if name.startswith(f"{dimension}:")]

    def gains(self, level: float = 0.95) -> dict[str, Interval]:
        """The gain of every metric that both have."""
        common = self._scores["before"].keys() & self._scores["after"].keys()
        return {
            metric: self.gain(metric, level)
            for metric in self._scores["after"]
            if metric in common and measure_of(metric).better is not None
        }

    def _distances(self, which: Literal["before", "after"], name: str) -> dict[str, Interval]:
        if (which, name) not in self._known_distances:
            self._known_distances[which, name] = _distances(
                self.subjects[which], self.real, name,
                bootstrap=self.bootstrap, seed=self.seed, level=0.95,
            )  # fmt: skip
        return self._known_distances[which, name]

    @cached_property
    def _scores(self) -> dict[str, dict[str, Interval]]:
        how = {"bootstrap": self.bootstrap, "seed": self.seed}
        return {which: scores(s, self.real, **how) for which, s in self.subjects.items()}

    def _resamples(self, level: float) -> int:
        return max(self.bootstrap, math.ceil(2 * RESAMPLES_BEYOND / (1 - level)))

    def _check(self, metric: str) -> None:
        measure, _, name = metric.partition("/")
        for subject in self.subjects.values():
            known = (*subject.measures, *SET_MEASURES)
            if measure not in known or name not in subject.slices:
                raise DataError(f"{subject.subject} has no {metric}: {self._known(subject)}")
        check_paired(self.before, self.after, name)

    def _known(self, subject: Measured) -> str:
        names = ", ".join([*subject.measures, *SET_MEASURES])
        return f"its measures are {names}; its slices {', '.join(subject.slices)}"

    def _kid_gain(self, name: str, level: float) -> Interval:
        real, before, after = (
            torch.from_numpy(s.features_of(name)) for s in (self.real, self.before, self.after)
        )
        if min(len(real), len(before), len(after)) < 2:
            raise DataError(f"kid/{name} needs at least two images with features of each subject")
        return metrics.kid_gain(
            real, before, after, bootstrap=self._resamples(level), seed=self.seed, level=level
        )
