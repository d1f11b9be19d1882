"""The promotion gate: whether a candidate becomes champion, by the recipe's section `promote`.

    decision = decide(Comparison(champion, candidate, real, ...), validity, recipe.promote)
    for reason in decision.reasons: print(reason)
    winner, reasons = choose({"masked": Comparison(...), "gan": ...}, validity, recipe.promote)

The candidate is compared on the same captions with the champion, or without one with the untuned
base. It is promoted if a judge is valid, at least one rule of `improve` says yes and no other rule
says no. Each rule is a test on the bootstrap interval of the paired gain (above zero: the candidate
is better):

    improve   The gain's lower bound exceeds `by`. Any one of m rules is enough, so chance has m
              tries (times the number of candidates among which the best was chosen): each is tested
              at level / tries, so that a candidate which is no better is promoted with a
              probability of at most `level` (Bonferroni; Holm's method would not differ, since the
              first rejection decides).
    keep      The gain's lower bound exceeds -margin: not being worse has to be shown, so few images
              or much noise refuse (non-inferiority). All rules must hold; for a wrong promotion,
              each rule that ought to refuse must err. So each is tested at `harm_level` itself
              (intersection-union test; Berger 1982, "Multiparameter Hypothesis Testing and
              Acceptance Sampling", theorem 1).
    limits    The candidate's own number is within the bound.
    slices    No slice's upper bound lies below -margin: a slice is too small to show that it is not
              worse, so only evidence of harm refuses. With s slices, chance has s tries to refuse a
              good candidate: each is tested at harm_level / s (Bonferroni).

What cannot be read refuses: a metric that was not measured or is not a number, too few images. The
metrics of a judge whose floors are out of order on this data are not used: a rule of `improve`
cannot say yes by them, a limit refuses, `keep` and `slices` are skipped and say so. Without any
valid judge nothing is promoted.

Where there is neither champion nor base, the candidate is compared with the real images under other
images' captions (the subject "shuffled"): it must beat them by every valid judge that a rule names,
and keep to the limits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pipeline.config import PromoteConfig
from pipeline.config.promote import ImproveRule, KeepRule, LimitRule, SliceRule, judge_of
from pipeline.contracts import Decision, Interval, RuleVerdict
from pipeline.errors import DataError
from pipeline.evaluation.measured import SHUFFLED
from pipeline.evaluation.validity import Validity

if TYPE_CHECKING:
    from pipeline.evaluation.scores import Comparison

UNJUDGED = "promoted without being judged (promote.unjudged)"


def decide(
    comparison: Comparison,
    validity: Mapping[str, Validity],
    config: PromoteConfig,
    *,
    candidates: int = 1,
) -> Decision:
    """Whether the candidate becomes champion, with one verdict per rule.

    Args:
        comparison: of what the candidate must beat (`before`) and the candidate (`after`).
        validity: by judge: "aligner", "imagenet" ...
        config: the rules.
        candidates: among how many `after` was chosen as the best.
    """
    gate = _Gate(comparison, validity, config, candidates)
    first = comparison.before.subject == SHUFFLED
    verdicts = gate.first_model() if first else gate.successor()
    helped = [v for v in verdicts if v.rule in ("improve", "chance") and v.outcome == "yes"]
    refused = [v for v in verdicts if v.outcome == "no" and (v.rule != "improve" or _broken(v))]
    promoted = bool(helped) and not refused
    summary = "promoted: " if promoted else "not promoted: "
    if not helped:
        summary += "no rule of `improve` is met beyond chance" if not first else "no evidence"
    else:
        summary += f"{_names(helped)} beat {comparison.before.subject} beyond chance"
    if refused:
        summary += f"; refused by {_names(refused)}"
    if config.unjudged:
        promoted, summary = True, UNJUDGED
    return Decision(promoted, (summary, *_sentences(verdicts)), tuple(verdicts))


def choose(
    comparisons: Mapping[str, Comparison],
    validity: Mapping[str, Validity],
    config: PromoteConfig,
) -> tuple[str, tuple[str, ...]]:
    """Choose which of several candidates goes to the gate: the best by config.choose_by.

    Candidates that would pass the gate come before those that would not, and those without a number
    last; of equal ones the first listed is chosen. If the judge of config.choose_by is invalid, the
    metric of the first rule of `improve` that can be used takes its place.

    Args:
        comparisons: by candidate, each as `decide` takes it.

    Returns:
        The candidate's name, and what was compared: one sentence per candidate, the best first.

    Raises:
        DataError: no candidate has a number to be chosen by.
    """
    from pipeline.evaluation.scores import measure_of  # imports PyTorch: seconds

    gates = {
        name: _Gate(comparison, validity, config, len(comparisons))
        for name, comparison in comparisons.items()
    }
    metrics = dict.fromkeys((config.choose_by, *(rule.metric for rule in config.improve)))
    for metric in metrics:
        values = {name: gate.candidate_value(metric) for name, gate in gates.items()}
        usable = not any(gate.invalid(metric) for gate in gates.values())
        if usable and any(math.isfinite(number.value) for number in values.values()):
            break
    else:
        raise DataError(
            f"none of {', '.join(metrics)} is a number of a valid judge for any of "
            f"{', '.join(comparisons)}: set promote.choose_by to another metric, or train them anew"
        )
    sign = 1 if measure_of(metric).better == "lower" else -1
    passes = {
        name: decide(comparison, validity, config, candidates=len(comparisons)).promoted
        for name, comparison in comparisons.items()
    }
    ranked = sorted(
        comparisons,
        key=lambda name: (
            not math.isfinite(values[name].value), not passes[name], sign * values[name].value,
        ),
    )  # fmt: skip
    best = values[ranked[0]]
    instead = "" if metric == config.choose_by else f", since {config.choose_by} cannot be used"
    reasons = [f"{ranked[0]} is the best of {len(ranked)} candidates: {metric} {best}{instead}"]
    for name in ranked[1:]:
        number = values[name]
        apart = "apart" if number.high < best.low or best.high < number.low else "overlapping"
        fails = "" if passes[name] or not passes[ranked[0]] else ", and the gate would refuse it"
        reasons.append(f"{name}: {metric} {number}, intervals {apart}{fails}")
    return ranked[0], tuple(reasons)


class _Gate:
    """The rules of a recipe, applied to one comparison."""

    def __init__(
        self,
        comparison: Comparison,
        validity: Mapping[str, Validity],
        config: PromoteConfig,
        candidates: int,
    ) -> None:
        self.comparison, self.validity = comparison, validity
        self.config, self.candidates = config, candidates

    # ---- Rules -----------------------------------------------------------------------------------

    def successor(self) -> list[RuleVerdict]:
        """All rules, against a champion or the untuned base."""
        return [
            *self._judges(),
            *(self._improve(rule) for rule in self.config.improve),
            *(self._keep(rule) for rule in self.config.keep),
            *(self._limit(rule) for rule in self.config.limits),
            *self._slices(),
        ]

    def first_model(self) -> list[RuleVerdict]:
        """Against shuffled captions: by every valid judge that a rule names, and the limits."""
        judges = filter(None, (judge_of(metric) for _, metric in self.config.metrics))
        return [
            *self._judges(),
            *(self._chance(f"{judge}_r1/all") for judge in dict.fromkeys(judges)),
            *(self._limit(rule) for rule in self.config.limits),
        ]

    def _judges(self) -> list[RuleVerdict]:
        """A refusal if no judge that measured the candidate is valid."""
        measured = [n for n in self.validity if self.comparison.count(f"{n}_r1/all")]
        if any(self.validity[name].valid for name in measured):
            return []
        reason = "; ".join(self._why_invalid(name) for name in measured) or "no judge measured it"
        return [RuleVerdict("judges", "", "no", f"no judge is valid on this data: {reason}")]

    def _improve(self, rule: ImproveRule) -> RuleVerdict:
        level = self.config.level / (len(self.config.improve) * self.candidates)
        return self._tested(
            "improve", rule.metric, level, lambda gain: gain.low > rule.by, rule.by,
            f"more than {rule.by:g} has to be shown",
        )  # fmt: skip

    def _keep(self, rule: KeepRule) -> RuleVerdict:
        return self._tested(
            "keep", rule.metric, self.config.harm_level, lambda gain: gain.low > -rule.margin,
            -rule.margin, f"a loss of {rule.margin:g} has to be ruled out",
        )  # fmt: skip

    def _chance(self, metric: str) -> RuleVerdict:
        return self._tested(
            "chance", metric, self.config.level, lambda gain: gain.low > 0, 0.0,
            "more than 0 has to be shown",
        )  # fmt: skip

    def _tested(
        self,
        rule: Literal["improve", "keep", "chance"],
        metric: str,
        level: float,
        passes: Callable[[Interval], bool],
        needed: float,
        demand: str,
    ) -> RuleVerdict:
        """The verdict on a gain's lower bound, which holds with probability 1 - level."""
        if invalid := self.invalid(metric):
            return RuleVerdict(rule, metric, "skipped", f"{metric} is not used: {invalid}")
        images = self.comparison.count(metric)
        if "/" in metric and 0 < images < self.config.min_images:
            reason = (
                f"{metric} is of {images} images, and promote.min_images="
                f"{self.config.min_images} are needed"
            )
            return RuleVerdict(rule, metric, "no", reason, images=images)
        numbers = self._numbers(metric, level)
        if isinstance(numbers, str):
            return RuleVerdict(rule, metric, "no", numbers, images=images)
        before, after, gain = numbers
        reason = self._moved(metric, images, before, after, gain)
        reason += f"{_confidence(gain.low, gain, 'at least', level)}; {demand}"
        outcome: Literal["yes", "no"] = "yes" if passes(gain) else "no"
        return RuleVerdict(
            rule, metric, outcome, reason, before, after, gain, 1 - 2 * level, needed, images
        )

    def _limit(self, rule: LimitRule) -> RuleVerdict:
        metric, images = rule.metric, self.comparison.count(rule.metric)
        if invalid := self.invalid(metric):
            return RuleVerdict("limit", metric, "no", f"{metric} cannot be used: {invalid}")
        try:
            value = self.comparison.value("after", metric).value
        except DataError:
            return RuleVerdict("limit", metric, "no", self._lacking(metric))
        if rule.at_most is not None:
            bound, held, words = rule.at_most, value <= rule.at_most, "at most"
        else:
            assert rule.at_least is not None
            bound, held, words = rule.at_least, value >= rule.at_least, "at least"
        reason = f"{metric} is {value:.3f}; {words} {bound:g} is allowed"
        if not math.isfinite(value):
            held, reason = False, f"{metric} is not a number"
        outcome: Literal["yes", "no"] = "yes" if held else "no"
        return RuleVerdict("limit", metric, outcome, reason, None, value, None, None, bound, images)

    def _slices(self) -> list[RuleVerdict]:
        """Every slice of every rule, all tested at one level."""
        found = [
            (rule, metric)
            for rule in self.config.slices
            for metric in self._metrics_of(rule)
            if not self.invalid(metric)
        ]
        tested = sum(self.comparison.count(metric) >= rule.min_images for rule, metric in found)
        verdicts = [
            self._slice(rule, metric, self.config.harm_level / max(1, tested))
            for rule, metric in found
        ]
        for rule in self.config.slices:
            if invalid := self.invalid(rule.metric):
                reason = f"{rule.metric} is not used: {invalid}"
                verdicts.append(RuleVerdict("slice", rule.metric, "skipped", reason))
            elif not self.comparison.count(f"{rule.metric}/all"):
                verdicts.append(RuleVerdict("slice", rule.metric, "no", self._lacking(rule.metric)))
        return verdicts

    def _metrics_of(self, rule: SliceRule) -> list[str]:
        """The metrics of a rule's slices, but for those that are the slice "all" again."""
        whole = self.comparison.after
        again = {f"language:{whole.language}", f"style:{whole.style}"}
        names = [name for of in rule.of for name in self.comparison.slices(of)]
        return [f"{rule.metric}/{name}" for name in names if name not in again]

    def _slice(self, rule: SliceRule, metric: str, level: float) -> RuleVerdict:
        images = self.comparison.count(metric)
        if images < rule.min_images:
            reason = f"{metric} is of {images} images, fewer than {rule.min_images}"
            return RuleVerdict("slice", metric, "skipped", reason, images=images)
        numbers = self._numbers(metric, level)
        if isinstance(numbers, str):
            return RuleVerdict("slice", metric, "no", numbers, images=images)
        before, after, gain = numbers
        reason = self._moved(metric, images, before, after, gain)
        reason += (
            f"{_confidence(gain.high, gain, 'at most', level)}; a clear loss of more than "
            f"{rule.margin:g} refuses"
        )
        outcome: Literal["yes", "no"] = "yes" if gain.high >= -rule.margin else "no"
        return RuleVerdict(
            "slice", metric, outcome, reason, before, after, gain, 1 - 2 * level, -rule.margin,
            images,
        )  # fmt: skip

    # ---- Numbers ---------------------------------------------------------------------------------

    def candidate_value(self, metric: str) -> Interval:
        """The candidate's own number; NaN where it has none."""
        try:
            return self.comparison.value("after", metric)
        except DataError:
            return Interval(math.nan, math.nan, math.nan)

    def invalid(self, metric: str) -> str:
        """Why the metric's judge cannot be used; empty if it can, or if no judge is asked."""
        judge = self._judge_of(metric)
        return self._why_invalid(judge) if judge else ""

    def _judge_of(self, metric: str) -> str | None:
        measure = metric.partition("/")[0]
        return judge_of(metric) or (measure if measure in self.validity else None)

    def _why_invalid(self, judge: str) -> str:
        found = self.validity.get(judge)
        if found is None:
            return f"it is not known whether the judge {judge} can judge on this data"
        if found.valid:
            return ""
        return f"the judge {judge} cannot judge on this data: {found.reason} ({found.remedy})"

    def _numbers(self, metric: str, level: float) -> tuple[float, float, Interval] | str:
        """Before, after, and the gain whose bounds hold with probability 1 - level each; or why
        there is none."""
        try:
            before = self.comparison.value("before", metric).value
            after = self.comparison.value("after", metric).value
            gain = self.comparison.gain(metric, level=1 - 2 * level)
        except DataError:
            return self._lacking(metric)
        return before, after, gain

    def _lacking(self, metric: str) -> str:
        before, after = self.comparison.before.subject, self.comparison.after.subject
        return f"{metric} was not measured of both {after} and {before} in this evaluation"

    def _moved(self, metric: str, images: int, before: float, after: float, gain: Interval) -> str:
        of = f" of {images} images" if images else ""
        moved = f"{metric}{of} went from {before:.3f} to {after:.3f}, a gain of {gain.value:.3f}, "
        return moved if math.isfinite(gain.value) else moved + "which is no number, "


def _broken(verdict: RuleVerdict) -> bool:
    """Whether the candidate's number is none."""
    return verdict.after is not None and not math.isfinite(verdict.after)


def _confidence(bound: float, gain: Interval, words: str, level: float) -> str:
    if gain.low == gain.high:
        return "measured once"
    return f"{words} {bound:.3f} at {100 * (1 - level):.3g} % confidence"


def _names(verdicts: Sequence[RuleVerdict]) -> str:
    return ", ".join(v.metric or v.rule for v in verdicts)


def _sentences(verdicts: Sequence[RuleVerdict]) -> list[str]:
    """One sentence per rule; slices that say yes or were skipped as too small share one."""
    single = [v for v in verdicts if v.rule != "slice" or v.outcome == "no" or not v.images]
    said = [f"{v.rule} {v.outcome}: {v.reason}" for v in single]
    well = [v for v in verdicts if v.rule == "slice" and v.outcome == "yes"]
    small = [v for v in verdicts if v.rule == "slice" and v.outcome == "skipped" and v.images]
    if well:
        dimensions = dict.fromkeys(v.metric.partition(":")[0] for v in well)
        said.append(f"slice yes: {len(well)} slices have no clear loss ({', '.join(dimensions)})")
    if small:
        counts = ", ".join(f"{v.metric} {v.images}" for v in small)
        said.append(f"slice skipped: {len(small)} slices have too few images ({counts})")
    return said
