"""A population of captions and models whose truth is known, to test the promotion gate on.

    simulate(PromoteConfig(), trials=200, shift=0.4)     # decisions on a candidate that is better

Every caption has a difficulty by each measure, which two models share, so that their measurements
of one caption are correlated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.chain.promotion import decide
from pipeline.config import PromoteConfig
from pipeline.contracts import Decision
from pipeline.evaluation.measured import COLUMNS, Measured
from pipeline.evaluation.scores import Comparison
from pipeline.evaluation.validity import Validity

Array = NDArray[np.float64]
VALID = {name: Validity(True, "") for name in ("aligner", "imagenet", "style_match")}


@dataclass(frozen=True)
class Shares:
    """A measure that is 0 or 1: its mean of seen and of unseen captions, and how much captions
    differ (standard deviation of the logit)."""

    seen: float
    unseen: float
    spread: float = 3.0


MEASURES = {
    "imagenet_r1": Shares(0.30, 0.14),
    "aligner_r1": Shares(0.95, 0.35),
    "style_match": Shares(0.80, 0.80, 2.0),
    "coverage": Shares(0.60, 0.50, 1.5),
    "copies": Shares(0.03, 0.03, 1.0),
}
"""Near what the shipped base has (tests/benchmarks/RESULTS.md)."""
FEATURES = 8


class Population:
    """Captions of an evaluation set, each with its difficulty by every measure.

    Args:
        num_images: per set of the gated style.
        num_other_images: per set of the second language and of the second style.
    """

    def __init__(self, rng: np.random.Generator, num_images: int, num_other_images: int) -> None:
        rows: list[dict[str, Any]] = []
        parts = [("twemoji", "en", num_images), ("twemoji", "zh", num_other_images),
                 ("noto", "en", num_other_images)]  # fmt: skip
        for style, language, count in parts:
            for split in ("seen", "unseen"):
                rows += [
                    {
                        "set": f"{style}/{split}", "style": style, "split": split,
                        "language": language, "key": f"{style}-{split}-{i}",
                        "topic": f"topic {i % 6}" if style == "twemoji" else "",
                        "words": 1 + i % 5,
                    }
                    for i in range(count)
                ]  # fmt: skip
        self.rows = pa.Table.from_pylist(rows, pa.schema(list(COLUMNS.items())))
        self.unseen = np.array([row["split"] == "unseen" for row in rows])
        self.first = np.array([row["language"] == "en" for row in rows])
        self.difficulty = {name: rng.normal(size=len(rows)) for name in MEASURES}
        self.sharpness = rng.normal(0.7, 0.2, len(rows))
        self.content = rng.normal(size=(len(rows), FEATURES))

    def model(
        self,
        subject: str,
        rng: np.random.Generator,
        shift: Mapping[str, float] | float = 0.0,
        *,
        only: str = "",
    ) -> Measured:
        """Measurements of a model.

        Args:
            shift: of the logits, by measure or of all but copies; of "features", how much nearer
                to the real images they are; of "sharpness", in its unit.
            only: a slice outside of which nothing is shifted.
        """
        shifts = (
            dict(shift) if isinstance(shift, Mapping)
            else {name: shift for name in MEASURES if name != "copies"}
        )  # fmt: skip
        measured = Measured(subject, self.rows, {}, "twemoji", "en")
        where = measured.mask(only) if only else np.ones(len(self.unseen), bool)
        columns = {}
        for name, shares in MEASURES.items():
            mean = np.where(self.unseen, _logit(shares.unseen), _logit(shares.seen))
            scale = math.sqrt(1 + math.pi * shares.spread**2 / 8)
            logits = mean * scale + shares.spread * self.difficulty[name]
            logits = logits + np.where(where, shifts.get(name, 0.0) * scale, 0)
            columns[name] = (rng.random(len(logits)) < 1 / (1 + np.exp(-logits))).astype(float)
        columns["copies"] = np.where(self.unseen, columns["copies"], np.nan)
        noise = rng.normal(0, 0.1, len(self.sharpness))
        columns["sharpness"] = (
            self.sharpness + noise + np.where(where, shifts.get("sharpness", 0), 0)
        )
        if "style_match" in columns:
            columns["style_match"] = np.where(self.first, columns["style_match"], np.nan)
        away = np.where(where, 1 - shifts.get("features", 0.0), 1)[:, None]
        features = 0.7 * self.content + rng.normal(0, 0.7, self.content.shape) + 0.35 * away
        return replace(measured, rows=self._table(columns, features))

    def real(self) -> Measured:
        """The real images."""
        return Measured("real", self._table({}, self.content), {}, "twemoji", "en")

    def _table(self, columns: Mapping[str, Array], features: Array) -> pa.Table:
        given = [
            row.astype(np.float32) if f else None
            for row, f in zip(features, self.first, strict=True)
        ]
        index = self.rows.column_names.index("features")
        field = pa.field("features", COLUMNS["features"])
        table = self.rows.set_column(index, field, pa.array(given, COLUMNS["features"]))
        for name, values in columns.items():
            table = table.append_column(name, pa.array(values, pa.float64(), from_pandas=True))
        return table


def _logit(share: float) -> float:
    return math.log(share / (1 - share))


def simulate(
    config: PromoteConfig,
    *,
    trials: int,
    num_images: int = 180,
    num_other_images: int = 24,
    shift: Mapping[str, float] | float = 0.0,
    only: str = "",
    seed: int = 0,
    bootstrap: int = 1_000,
) -> list[Decision]:
    """Decisions on a candidate that is shifted against the champion; each trial has captions of its
    own."""
    found = []
    for trial in range(trials):
        rng = np.random.default_rng((seed, trial))
        captions = Population(rng, num_images, num_other_images)
        champion = captions.model("champion", rng)
        candidate = captions.model("candidate", rng, shift, only=only)
        comparison = Comparison(champion, candidate, captions.real(), bootstrap=bootstrap, seed=0)
        found.append(decide(comparison, VALID, config))
    return found
