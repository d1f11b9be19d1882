"""The gate: first champion, better, worse, forgetful, by chance, incomparable."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipeline.chain.promotion import choose, decide
from pipeline.config import PromoteConfig
from pipeline.contracts import EvalReport, Interval
from pipeline.errors import DataError
from pipeline.metrics import mean_interval, paired_gain

RULE = PromoteConfig(min_kid_gain=0.01, min_retrieval_gain=0.0, max_forgetting=0.15)


def report(
    *, kid: float, hits: int, other_hits: int = 80, subject: str = "candidate"
) -> EvalReport:
    """A report of 200 images in the gated style and 200 of Noto, made beside CHAMPION's."""
    metrics = {
        "kid_unseen": Interval(kid, kid - 0.005, kid + 0.005),
        "over_champion/kid_unseen": Interval(0.10 - kid, 0.095 - kid, 0.105 - kid),
    }
    for name, count, before in (("retrieval", hits, 40), ("noto/retrieval", other_hits, 80)):
        found, known = ((np.arange(200) < n).astype(float) for n in (count, before))
        metrics[name] = mean_interval(found, bootstrap=100, seed=0)
        metrics[f"over_champion/{name}"] = paired_gain(known, found, bootstrap=100, seed=0)
    return EvalReport(subject, metrics, {"eval_set": "same"})


CHAMPION = report(kid=0.10, hits=40, subject="champion")


def test_the_first_candidate_is_promoted() -> None:
    decision = decide(report(kid=0.5, hits=1), None, RULE)
    assert decision.promoted
    assert decision.reasons == (
        "there is no champion yet; KID 0.500 [0.495, 0.505], retrieval 0.005 [0.000, 0.015]",
    )


def test_a_better_candidate_is_promoted_with_numbers() -> None:
    decision = decide(report(kid=0.05, hits=60), CHAMPION, RULE)
    assert decision.promoted and len(decision.reasons) == 3
    kid, retrieval, noto = decision.reasons
    assert kid.startswith("yes: KID") and "0.100 [0.095, 0.105]" in kid
    assert "a gain of 0.050 [0.045, 0.055], beyond chance; more than 0.01 is needed" in kid
    assert retrieval.startswith("yes: retrieval went from 0.200") and "beyond chance" in retrieval
    assert noto.startswith("yes: on noto") and "within chance" in noto


@pytest.mark.parametrize(
    ("candidate", "culprit"),
    [
        (report(kid=0.095, hits=60), 0),
        (report(kid=0.05, hits=39), 1),
        (report(kid=0.05, hits=60, other_hits=40), 2),
    ],
    ids=["kid hardly falls", "retrieval falls", "forgets noto"],
)
def test_one_broken_rule_is_enough(candidate: EvalReport, culprit: int) -> None:
    decision = decide(candidate, CHAMPION, RULE)
    assert not decision.promoted
    assert [reason.startswith("no: ") for reason in decision.reasons] == [
        i == culprit for i in range(3)
    ]


def test_a_tolerance_may_allow_a_small_fall() -> None:
    lenient = RULE.model_copy(update={"min_retrieval_gain": -0.05})
    assert decide(report(kid=0.05, hits=35), CHAMPION, lenient).promoted


def test_a_champion_is_not_replaced_by_itself() -> None:
    assert not decide(CHAMPION, CHAMPION, PromoteConfig()).promoted


def test_not_a_number_never_wins() -> None:
    broken = report(kid=float("nan"), hits=200)
    assert not decide(broken, CHAMPION, RULE).promoted


def test_other_images_cannot_be_compared() -> None:
    other = replace(CHAMPION, details={**CHAMPION.details, "eval_set": "other"})
    with pytest.raises(DataError, match="on the same evaluation set"):
        decide(report(kid=0.05, hits=60), other, RULE)


def test_reports_that_were_not_made_together_cannot_be_compared() -> None:
    with pytest.raises(DataError, match="not made beside that of another: evaluate them together"):
        decide(report(kid=0.05, hits=60), replace(CHAMPION, subject="another"), RULE)


def test_the_best_of_several_candidates_is_chosen_by_the_recipes_rule() -> None:
    candidates = {
        "masked": report(kid=0.08, hits=60),
        "causal": report(kid=0.06, hits=50),
        "gan": report(kid=0.30, hits=1),
    }
    winner, (best, *others) = choose(candidates, None, RULE)
    assert winner == "causal" and best.startswith("causal is the best of 3 candidates: kid_unseen")
    assert [sentence.split(":")[0] for sentence in others] == ["masked", "gan"]
    assert "intervals apart" in others[1]
    by_retrieval = RULE.model_copy(update={"choose_by": "retrieval"})
    assert choose(candidates, None, by_retrieval)[0] == "masked"


def test_a_candidate_the_gate_would_refuse_is_chosen_only_among_its_like() -> None:
    forgot, sound = report(kid=0.02, hits=60, other_hits=0), report(kid=0.05, hits=60)
    assert choose({"forgot": forgot, "sound": sound}, None, RULE)[0] == "forgot"
    winner, reasons = choose({"forgot": forgot, "sound": sound}, CHAMPION, RULE)
    assert winner == "sound" and "the gate would refuse it" in reasons[1]
    worse = report(kid=0.5, hits=1)
    assert choose({"worse": worse, "forgot": forgot}, CHAMPION, RULE)[0] == "forgot"


def test_a_candidate_without_a_number_is_never_chosen() -> None:
    broken, poor = report(kid=float("nan"), hits=200), report(kid=9.0, hits=0)
    assert choose({"broken": broken, "poor": poor}, None, RULE)[0] == "poor"
    with pytest.raises(DataError, match="kid_unseen is not a number for broken, again"):
        choose({"broken": broken, "again": broken}, None, RULE)
