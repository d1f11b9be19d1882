"""Whether a judge can judge: its floors have to be in order on the data at hand.

A judge that was never shown this kind of image, or that forgives what people do not, ranks
reconstructions, blurred or untuned images above the real ones. Its numbers then say nothing of
which of two models is better, and no rule of the promotion gate may use them.

    found = validity_of(["aligner", "imagenet"], measured, bootstrap=1000, seed=0)
    found["aligner"].valid, found["aligner"].reason, found["aligner"].remedy
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipeline.evaluation.measured import SHUFFLED, Measured

FLOORS = ("tokenizer", "blurred", "untuned", SHUFFLED)
"""Subjects that a judge must not prefer to the real images."""
CHANCE_FACTOR = 3.0
"""The share of real images whose caption a judge finds must be this many times that of chance."""
REMEDIES = {
    "aligner": "tune the aligner on these captions (aligner.tune=true; aligner.source=null trains "
    "one from scratch), or leave its metrics out",
    "style_match": "evaluate styles that differ (evaluate.styles), or leave style_match out",
}
REMEDY = "train this judge on these captions, or leave its metrics out of promote"


@dataclass(frozen=True)
class Validity:
    """Whether a judge's metrics can be believed on this data.

    Attributes:
        valid: whether its floors are in order.
        reason: what was compared, with numbers.
        remedy: what to do; empty for a valid judge.
    """

    valid: bool
    reason: str
    remedy: str = ""


def validity_of(
    judges: Iterable[str], measured: Mapping[str, Measured], *, bootstrap: int, seed: int
) -> dict[str, Validity]:
    """Check every judge, and the style classifier where there is one.

    Args:
        judges: names of judges whose measures the tables hold.
        measured: by subject; "real" and "shuffled" are needed, the other floors are used where they
            are there.
        bootstrap, seed: of the intervals.
    """
    how = {"bootstrap": bootstrap, "seed": seed}
    found = {name: _judge(f"{name}_r1/all", name, measured, **how) for name in judges}
    if "style_match" in measured["real"].measures:
        floors = {name: m for name, m in measured.items() if name != SHUFFLED}
        found["style_match"] = _judge("style_match/all", "style_match", floors, **how)
    return found


def _judge(
    metric: str, name: str, measured: Mapping[str, Measured], *, bootstrap: int, seed: int
) -> Validity:
    from pipeline.evaluation.scores import Comparison  # with metrics: seconds to import

    remedy = REMEDIES.get(name, REMEDY)
    real = measured["real"]
    for floor in FLOORS:
        if floor not in measured:
            continue
        comparison = Comparison(measured[floor], real, real, bootstrap=bootstrap, seed=seed)
        gain, below = comparison.gain(metric), comparison.value("before", metric)
        own = comparison.value("after", metric)
        if gain.high < 0:
            return Validity(
                False,
                f"real images have {metric} {own}, less than {floor} {below}",
                remedy,
            )
        if floor == SHUFFLED:
            chance = max(below.value, 1 / comparison.count(metric))
            if gain.low <= 0 or own.low < CHANCE_FACTOR * chance:
                return Validity(
                    False,
                    f"real images have {metric} {own}, hardly above shuffled captions {below}",
                    remedy,
                )
    own = Comparison(real, real, real, bootstrap=bootstrap, seed=seed).value("after", metric)
    floors = ", ".join(name for name in FLOORS if name in measured)
    return Validity(True, f"real images have {metric} {own}, not below {floors}")
