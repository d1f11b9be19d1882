"""The gate, rule by rule: better, worse, equal, forgetful, unmeasured, not a number, unjudged; and
how often it errs over simulated models whose truth is known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from benchmarks.gate_simulation import simulate

from pipeline.chain.promotion import SHUFFLED, choose, decide
from pipeline.config import PromoteConfig
from pipeline.config.promote import SliceRule
from pipeline.contracts import Decision, RuleVerdict
from pipeline.errors import DataError
from pipeline.evaluation.measured import COLUMNS, Measured
from pipeline.evaluation.scores import MEASURES, Comparison
from pipeline.evaluation.validity import Validity

NUM_IMAGES, NUM_OTHER = 200, 40
"""Images of the gated style, half of them seen; of the other style and of the other language."""
VALID = {name: Validity(True, "") for name in ("aligner", "imagenet", "style_match")}
INVALID = Validity(False, "real images have imagenet_r1/all 0.1", "train a judge")
RULES = PromoteConfig.model_validate(
    {
        "level": 0.05,
        "improve": [{"metric": "imagenet_r1/all"}, {"metric": "style_match/all"}],
        "keep": [{"metric": "aligner_r1/all", "margin": 0.1}],
        "limits": [{"metric": "copies/unseen", "at_most": 0.2}],
        "slices": [{"metric": "aligner_r1", "margin": 0.1}],
    }
)


def model(
    subject: str = "candidate",
    *,
    hits: Mapping[str, Any] | None = None,
    elsewhere: int | Sequence[int] = 30,
    scalars: Mapping[str, float] | None = None,
    num_images: int = NUM_IMAGES,
) -> Measured:
    """Measurements of a model.

    Args:
        hits: by measure, of how many of the gated style's images it is 1; or one value per image;
            or None, to leave the measure out.
        elsewhere: the same of the aligner's hits in the other style and of those in the other
            language.
    """
    parts = [("twemoji", "en", num_images), ("noto", "en", NUM_OTHER), ("twemoji", "zh", NUM_OTHER)]
    rows = [
        {
            "set": f"{style}/{split}", "style": style, "split": split, "language": language,
            "key": f"{style}-{i}", "topic": f"topic {i % 4}" if style == "twemoji" else "",
            "words": 1 + i % 5,
        }
        for style, language, count in parts
        for i in range(count)
        for split in ["seen" if i % 2 else "unseen"]
    ]  # fmt: skip
    table = pa.Table.from_pylist(rows, pa.schema(list(COLUMNS.items())))
    given = {"imagenet_r1": 60, "aligner_r1": 120, "style_match": 150, "copies": 4, **(hits or {})}
    for name, value in given.items():
        if value is None:
            continue
        column = np.full(len(rows), np.nan)
        column[:num_images] = first(value, num_images) if isinstance(value, int) else value
        if name == "aligner_r1":
            noto, zh = (elsewhere, elsewhere) if isinstance(elsewhere, int) else elsewhere
            column[num_images : num_images + NUM_OTHER] = first(noto, NUM_OTHER)
            column[num_images + NUM_OTHER :] = first(zh, NUM_OTHER)
        taken = np.arange(len(rows)) < (len(rows) if name == "aligner_r1" else num_images)
        table = table.append_column(name, pa.array(column, pa.float64(), mask=~taken))
    return Measured(subject, table, dict(scalars or {}), "twemoji", "en")


def first(count: int, of: int) -> np.ndarray[Any, Any]:
    """1 for `count` of the images, spread evenly; a larger count contains a smaller one's."""
    order = np.random.default_rng(0).permutation(of)
    return (order < count).astype(float)


def judged(
    candidate: Measured | None = None,
    incumbent: Measured | None = None,
    rules: PromoteConfig = RULES,
    validity: Mapping[str, Validity] = VALID,
    candidates: int = 1,
) -> Decision:
    return decide(compared(candidate, incumbent), validity, rules, candidates=candidates)


def compared(candidate: Measured | None = None, incumbent: Measured | None = None) -> Comparison:
    after, before = candidate or model(), incumbent or model("champion")
    return Comparison(before, after, before, bootstrap=500, seed=0)


def verdicts(decision: Decision, rule: str, outcome: str = "no") -> list[RuleVerdict]:
    return [v for v in decision.verdicts if v.rule == rule and v.outcome == outcome]


def rules(**changes: Any) -> PromoteConfig:
    return PromoteConfig.model_validate(RULES.model_dump(exclude_none=True) | changes)


BETTER = {"imagenet_r1": 90}


# ---- Better, worse, equal ------------------------------------------------------------------------


def test_a_better_candidate_is_promoted_with_every_rules_numbers() -> None:
    decision = judged(model(hits=BETTER))
    assert decision.promoted
    assert decision.reasons[0] == "promoted: imagenet_r1/all beat champion beyond chance"
    (won,) = verdicts(decision, "improve", "yes")
    assert (won.metric, won.before, won.after, won.images) == ("imagenet_r1/all", 0.3, 0.45, 200)
    assert won.gain is not None and 0 < won.gain.low < 0.15 and won.level == pytest.approx(0.95)
    assert (
        "improve yes: imagenet_r1/all of 200 images went from 0.300 to 0.450, a gain of 0.150"
        in (decision.reasons[1])
    )
    assert "at 97.5 % confidence; more than 0 has to be shown" in decision.reasons[1]
    assert {v.rule for v in decision.verdicts} == {"improve", "keep", "limit", "slice"}


def test_a_champion_is_not_replaced_by_itself() -> None:
    decision = judged()
    assert not decision.promoted and not verdicts(decision, "keep")
    assert decision.reasons[0] == "not promoted: no rule of `improve` is met beyond chance"


@pytest.mark.parametrize(
    ("candidate", "rule", "metric"),
    [
        (model(hits={"imagenet_r1": 62}), "improve", "imagenet_r1/all"),
        (model(hits={**BETTER, "aligner_r1": 95}), "keep", "aligner_r1/all"),
        (model(hits={**BETTER, "copies": 150}), "limit", "copies/unseen"),
        (model(hits=BETTER, elsewhere=(3, 30)), "slice", "aligner_r1/style:noto"),
        (model(hits=BETTER, elsewhere=(30, 3)), "slice", "aligner_r1/language:zh"),
    ],
    ids=["hardly better", "worse by the other judge", "copies", "forgot a style", "forgot Chinese"],
)
def test_each_mistake_is_caught_by_the_rule_that_is_for_it(
    candidate: Measured, rule: str, metric: str
) -> None:
    decision = judged(candidate)
    assert not decision.promoted
    refusals = {(v.rule, v.metric) for v in decision.verdicts if v.outcome == "no"}
    refusals.discard(("improve", "style_match/all"))
    assert refusals == {(rule, metric)}
    assert any(reason.startswith(f"{rule} no: {metric}") for reason in decision.reasons)


def test_a_gain_within_the_recipes_by_is_none() -> None:
    listed = {"improve": [{"metric": "imagenet_r1/all", "by": 0.12}]}
    assert judged(model(hits=BETTER)).promoted
    assert not judged(model(hits=BETTER), rules=rules(**listed)).promoted


def test_worse_within_the_margin_has_to_be_shown_by_enough_images() -> None:
    slightly = np.where(np.arange(NUM_IMAGES) % 20, first(120, NUM_IMAGES), 0)
    worse = {**BETTER, "aligner_r1": slightly}
    assert judged(model(hits=worse)).promoted
    strict = rules(keep=[{"metric": "aligner_r1/all", "margin": 0.04}])
    (refusal,) = verdicts(judged(model(hits=worse), rules=strict), "keep")
    assert refusal.gain is not None and refusal.gain.low < -0.04 < refusal.gain.value


def test_rules_and_candidates_share_the_level() -> None:
    def level(decision: Decision, rule: str) -> float:
        return next(v.level or 0 for v in decision.verdicts if v.rule == rule and v.level)

    assert level(judged(), "improve") == pytest.approx(1 - 2 * 0.05 / 2)
    assert level(judged(candidates=3), "improve") == pytest.approx(1 - 2 * 0.05 / 6)
    assert level(judged(candidates=3), "keep") == pytest.approx(0.9), "all must hold: no correction"
    slices = [v for v in judged().verdicts if v.rule == "slice" and v.outcome != "skipped"]
    assert len(slices) == 9, "another style, another language, 4 topics, 3 lengths"
    assert level(judged(), "slice") == pytest.approx(1 - 2 * 0.05 / 9)


def test_small_slices_are_skipped_and_named() -> None:
    strict = rules(slices=[{"metric": "aligner_r1", "min_images": 45}])
    decision = judged(model(hits=BETTER, elsewhere=0), rules=strict)
    assert decision.promoted, "40 images are fewer than 45"
    assert {v.metric for v in verdicts(decision, "slice", "skipped")} >= {
        "aligner_r1/style:noto", "aligner_r1/language:zh"
    }  # fmt: skip
    assert any(
        "too few images (aligner_r1/" in r and "style:noto 40" in r for r in decision.reasons
    )


def test_numbers_of_the_whole_model_can_be_rules() -> None:
    listed = {
        "improve": [{"metric": "size_mb", "by": 10}],
        "keep": [{"metric": "latency_s", "margin": 0.5}],
        "limits": [{"metric": "latency_s", "at_most": 1}],
    }
    champion = model("champion", scalars={"size_mb": 100, "latency_s": 0.2})
    small = model(scalars={"size_mb": 50, "latency_s": 0.6})
    assert judged(small, champion, rules(**listed)).promoted
    slow = model(scalars={"size_mb": 50, "latency_s": 1.6})
    refused = judged(slow, champion, rules(**listed))
    assert [v.rule for v in refused.verdicts if v.outcome == "no"] == ["keep", "limit"]


# ---- What cannot be read -------------------------------------------------------------------------


def test_not_a_number_refuses_even_where_another_rule_says_yes() -> None:
    style = np.full(NUM_IMAGES, np.nan)
    for hits in ({"style_match": style}, {"aligner_r1": style}, {"copies": style}):
        decision = judged(model(hits={**BETTER, **hits}))
        assert not decision.promoted, hits
        assert any("no number" in r or "not a number" in r for r in decision.reasons)
    broken = judged(model(hits={"imagenet_r1": np.full(NUM_IMAGES, math.inf)}))
    assert not broken.promoted


@pytest.mark.parametrize("measure", ["imagenet_r1", "aligner_r1", "copies"])
def test_what_was_not_measured_refuses(measure: str) -> None:
    only = rules(improve=[{"metric": "imagenet_r1/all"}])
    decision = judged(model(hits={**BETTER, measure: None}), rules=only)
    assert not decision.promoted
    assert any(f"{measure}/" in r and "was not measured of both" in r for r in decision.reasons)


def test_an_unknown_slice_refuses_where_it_must_be_kept() -> None:
    kept = rules(keep=[{"metric": "aligner_r1/style:klingon", "margin": 0.1}])
    (refusal,) = verdicts(judged(model(hits=BETTER), rules=kept), "keep")
    assert refusal.reason.startswith("aligner_r1/style:klingon was not measured of both candidate")


def test_too_few_images_refuse() -> None:
    candidate, champion = (
        model(name, hits={"imagenet_r1": hits, "aligner_r1": 20, "style_match": 20}, num_images=40)
        for name, hits in (("candidate", 40), ("champion", 10))
    )
    decision = judged(candidate, champion)
    assert not decision.promoted
    assert (
        "imagenet_r1/all is of 40 images, and promote.min_images=60 are needed"
        in (decision.reasons[1])
    )
    assert judged(candidate, champion, rules=rules(min_images=40)).promoted


# ---- Judges that cannot judge --------------------------------------------------------------------


def test_an_invalid_judge_helps_nobody_and_its_rules_say_why() -> None:
    validity = {**VALID, "imagenet": INVALID}
    decision = judged(model(hits=BETTER), validity=validity)
    assert not decision.promoted, "its improvement does not count"
    (skipped,) = verdicts(decision, "improve", "skipped")
    assert "imagenet cannot judge on this data: real images have imagenet_r1/all 0.1" in (
        skipped.reason
    )
    assert "(train a judge)" in skipped.reason
    assert judged(model(hits={**BETTER, "style_match": 195}), validity=validity).promoted
    bounded = rules(limits=[{"metric": "imagenet_r1/all", "at_least": 0.1}])
    assert not judged(model(hits={"style_match": 195}), rules=bounded, validity=validity).promoted


def test_rules_of_an_invalid_judge_refuse_nobody() -> None:
    worse = model(hits={**BETTER, "aligner_r1": 10}, elsewhere=0)
    assert not judged(worse).promoted
    decision = judged(worse, validity={**VALID, "aligner": INVALID})
    assert decision.promoted
    assert [v.metric for v in verdicts(decision, "keep", "skipped")] == ["aligner_r1/all"]
    assert [v.metric for v in verdicts(decision, "slice", "skipped")] == ["aligner_r1"]


@pytest.mark.parametrize("validity", [{}, {**VALID, "aligner": INVALID, "imagenet": INVALID}])
def test_without_a_valid_judge_nothing_is_promoted(validity: Mapping[str, Validity]) -> None:
    decision = judged(model(hits={"imagenet_r1": 200, "style_match": 200}), validity=validity)
    assert not decision.promoted and verdicts(decision, "judges")
    assert "no judge is valid" in " ".join(decision.reasons) or "no judge" in decision.reasons[1]


def test_a_style_classifier_that_cannot_tell_styles_is_not_asked() -> None:
    validity = {**VALID, "style_match": INVALID}
    assert judged(model(hits={"style_match": 195})).promoted
    assert not judged(model(hits={"style_match": 195}), validity=validity).promoted


# ---- Without a champion --------------------------------------------------------------------------


def test_without_a_champion_the_untuned_base_has_to_be_beaten() -> None:
    base = model("untuned")
    assert judged(model(hits=BETTER), base).promoted
    worse = judged(model(hits={"aligner_r1": 70}), base)
    assert not worse.promoted and verdicts(worse, "keep")
    assert "untuned" in judged(model(hits=BETTER), base).reasons[0]


def test_without_a_base_every_named_judge_must_beat_chance() -> None:
    shuffled = model(SHUFFLED, hits={"imagenet_r1": 1, "aligner_r1": 0, "copies": None})
    decision = judged(model(hits={"imagenet_r1": 20}), shuffled)
    assert decision.promoted
    assert [v.metric for v in verdicts(decision, "chance", "yes")] == [
        "imagenet_r1/all", "aligner_r1/all"
    ]  # fmt: skip
    noise = judged(model(hits={"imagenet_r1": 2, "aligner_r1": 20}), shuffled)
    assert not noise.promoted and [v.metric for v in verdicts(noise, "chance")] == [
        "imagenet_r1/all"
    ]
    copier = judged(model(hits={"copies": 200}), shuffled)
    assert not copier.promoted and verdicts(copier, "limit")
    one = judged(model(hits={"imagenet_r1": 2}), shuffled, validity={**VALID, "imagenet": INVALID})
    assert one.promoted and verdicts(one, "chance", "skipped"), "by the judge that can judge"
    none = judged(model(), shuffled, validity=dict.fromkeys(VALID, INVALID))
    assert not none.promoted


def test_unjudged_promotes_whatever_the_rules_say_and_says_so() -> None:
    broken = model(hits={"imagenet_r1": np.full(NUM_IMAGES, np.nan)})
    decision = judged(broken, rules=rules(unjudged=True))
    assert decision.promoted
    assert decision.reasons[0] == "promoted without being judged (promote.unjudged)"
    assert verdicts(decision, "improve"), "the verdicts are still there to be read"


# ---- Several candidates --------------------------------------------------------------------------


def chosen(
    candidates: Mapping[str, Measured], config: PromoteConfig = RULES, **judges: Validity
) -> tuple[str, tuple[str, ...]]:
    comparisons = {name: compared(candidate) for name, candidate in candidates.items()}
    return choose(comparisons, {**VALID, **judges}, config)


def test_the_best_is_chosen_by_the_recipes_metric() -> None:
    candidates = {
        "masked": model(hits={"imagenet_r1": 60}),
        "causal": model(hits={"imagenet_r1": 62, "style_match": 90}),
        "gan": model(hits={"imagenet_r1": 5}),
    }
    winner, (best, *others) = chosen(candidates)
    assert winner == "causal"
    assert best.startswith("causal is the best of 3 candidates: imagenet_r1/all 0.310 [")
    assert [sentence.partition(":")[0] for sentence in others] == ["masked", "gan"]
    assert "intervals apart" in others[1]
    assert chosen(candidates, rules(choose_by="style_match/all"))[0] == "masked"
    assert chosen(candidates, rules(choose_by="copies/all"))[0] == "masked", "less is better"


def test_a_candidate_the_gate_would_refuse_is_chosen_only_among_its_like() -> None:
    forgot, sound = model(hits={"imagenet_r1": 120}, elsewhere=0), model(hits=BETTER)
    winner, reasons = chosen({"forgot": forgot, "sound": sound})
    assert winner == "sound" and "the gate would refuse it" in reasons[1]
    assert chosen({"worse": model(hits={"imagenet_r1": 5}), "forgot": forgot})[0] == "forgot"


def test_a_candidate_without_a_number_is_never_chosen() -> None:
    broken = model(hits={"imagenet_r1": np.full(NUM_IMAGES, np.nan), "style_match": None})
    unmeasured = model(hits={"imagenet_r1": None, "style_match": None})
    assert chosen({"broken": broken, "poor": model(hits={"imagenet_r1": 1})})[0] == "poor"
    with pytest.raises(DataError, match="none of imagenet_r1/all, style_match/all is a number"):
        chosen({"broken": broken, "unmeasured": unmeasured})


def test_an_invalid_judge_does_not_choose() -> None:
    candidates = {
        "fooling": model(hits={"imagenet_r1": 90, "style_match": 100}),
        "sound": model(hits={"imagenet_r1": 50, "style_match": 160}),
    }
    winner, reasons = chosen(candidates, imagenet=INVALID)
    assert winner == "sound"
    assert "style_match/all 0.800" in reasons[0]
    assert "since imagenet_r1/all cannot be used" in reasons[0]


# ---- How often it errs ---------------------------------------------------------------------------

SIMULATED = PromoteConfig(
    improve=tuple(rule for rule in PromoteConfig().improve if not rule.metric.startswith("kid")),
    keep=tuple(rule for rule in PromoteConfig().keep if not rule.metric.startswith("kid")),
    slices=(SliceRule(metric="aligner_r1", of=("language", "style")),),
)
"""The shipped rules that are quick to test: no distances, and slices of one measure."""


def promoted(*, shift: float, only: str = "") -> float:
    """The share of 200 simulated candidates, each on captions of its own, that are promoted."""
    found = simulate(SIMULATED, trials=200, shift=shift, only=only, bootstrap=500)
    return float(np.mean([decision.promoted for decision in found]))


def test_of_equal_models_fewer_than_one_in_twenty_is_promoted() -> None:
    assert promoted(shift=0.0) < 0.05


def test_of_better_models_at_least_four_in_five_are_promoted() -> None:
    assert promoted(shift=0.4) >= 0.8


# ---- What recipes may name is what evaluation measures -------------------------------------------


def test_the_recipes_measures_are_those_of_the_evaluation() -> None:
    from pipeline.config import promote

    assert set(MEASURES) <= {*promote.MEASURES, *promote.SCALARS}
    without = {name for name, measure in MEASURES.items() if measure.better is None}
    assert without == set(promote.WITHOUT_DIRECTION)
