"""The promotion gate by reports alone, until the chain evaluates with measurements per image.

    best, reasons = choose({"masked": ..., "gan": ...}, champion_report, recipe.promote)
    decision = decide(candidate_report, champion_report, recipe.promote)

A candidate is promoted if all of this holds:

    on the first style of evaluation    KID of unseen captions falls by more than `min_kid_gain`,
                                        and retrieval rises by at least `min_retrieval_gain`
    on every other style                retrieval falls by at most `max_forgetting`

The values decide; each reason also says whether the difference is beyond chance. Both reports must
be of the same images, evaluated together, so that the candidate's holds its gains over the champion
("over_champion/kid_unseen").
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from pipeline.config import PromoteConfig
from pipeline.contracts import Decision, EvalReport, Interval
from pipeline.errors import DataError

KID = "kid_unseen"
RETRIEVAL = "retrieval"
MIN_KID_GAIN, MIN_RETRIEVAL_GAIN, MAX_FORGETTING = 0.0, 0.0, 0.15


def decide(candidate: EvalReport, champion: EvalReport | None, config: PromoteConfig) -> Decision:
    """Whether the candidate becomes champion, with one reason per rule, numbers included.

    Raises:
        DataError: the reports are of different images, or the candidate's has no gains over the
            champion.
    """
    if champion is None:
        kid, retrieval = candidate.metrics[KID], candidate.metrics[RETRIEVAL]
        reason = f"there is no champion yet; KID {_show(kid)}, retrieval {_show(retrieval)}"
        return Decision(promoted=True, reasons=(reason,))
    if candidate.details["eval_set"] != champion.details["eval_set"]:
        raise DataError(
            f"{candidate.subject} and {champion.subject} were judged on different pictures: "
            "evaluate both on the same evaluation set"
        )
    if f"over_{champion.subject}/{KID}" not in candidate.metrics:
        raise DataError(
            f"the report of {candidate.subject} was not made beside that of {champion.subject}: "
            "evaluate them together"
        )
    verdicts = [
        _kid_rule(candidate, champion, config),
        _retrieval_rule(candidate, champion, config),
    ]
    verdicts += [
        _forgetting_rule(candidate, champion, config, metric)
        for metric in champion.metrics
        if metric.endswith(f"/{RETRIEVAL}") and not metric.startswith("over_")
    ]
    return Decision(
        promoted=all(passed for passed, _ in verdicts),
        reasons=tuple(f"{'yes' if passed else 'no'}: {reason}" for passed, reason in verdicts),
    )


def choose(
    candidates: Mapping[str, EvalReport], champion: EvalReport | None, config: PromoteConfig
) -> tuple[str, tuple[str, ...]]:
    """Choose which of several candidates goes to the gate: the best by config.choose_by.

    Candidates that would pass the gate come before those that would not; of equal ones the first
    listed is chosen.

    Returns:
        Its name, and what was compared: one sentence per candidate, the best first.

    Raises:
        DataError: the reports are of different images, or no candidate's metric is a number.
    """
    metric, sign = (KID, 1) if config.choose_by.startswith("kid") else (RETRIEVAL, -1)
    passes = {
        name: decide(report, champion, config).promoted for name, report in candidates.items()
    }
    values = {name: report.metrics[metric].value for name, report in candidates.items()}
    if not any(map(math.isfinite, values.values())):
        raise DataError(f"{metric} is not a number for {', '.join(values)}: train them anew")
    ranked = sorted(
        candidates,
        key=lambda name: (not math.isfinite(values[name]), not passes[name], sign * values[name]),
    )
    best = candidates[ranked[0]].metrics[metric]
    reasons = [f"{ranked[0]} is the best of {len(ranked)} candidates: {metric} {_show(best)}"]
    for name in ranked[1:]:
        number = candidates[name].metrics[metric]
        apart = "apart" if number.high < best.low or best.high < number.low else "overlapping"
        fails = "" if passes[name] or not passes[ranked[0]] else ", and the gate would refuse it"
        reasons.append(f"{name}: {metric} {_show(number)}, intervals {apart}{fails}")
    return ranked[0], tuple(reasons)


def _kid_rule(
    candidate: EvalReport, champion: EvalReport, config: PromoteConfig
) -> tuple[bool, str]:
    """Whether the candidate passes, and the reason; so with every rule."""
    new, old = candidate.metrics[KID], champion.metrics[KID]
    gain = candidate.metrics[f"over_{champion.subject}/{KID}"]
    reason = (
        f"KID on unseen captions went from {_show(old)} to {_show(new)}: a gain of {_show(gain)}, "
        f"{_beyond_chance(gain)}; more than {MIN_KID_GAIN} is needed"
    )
    return gain.value > MIN_KID_GAIN, reason


def _retrieval_rule(
    candidate: EvalReport, champion: EvalReport, config: PromoteConfig
) -> tuple[bool, str]:
    gain = candidate.metrics[f"over_{champion.subject}/{RETRIEVAL}"]
    reason = (
        f"retrieval went from {_show(champion.metrics[RETRIEVAL])} to "
        f"{_show(candidate.metrics[RETRIEVAL])}: a gain of {_show(gain)}, "
        f"{_beyond_chance(gain)}; at least {MIN_RETRIEVAL_GAIN} is needed"
    )
    return gain.value >= MIN_RETRIEVAL_GAIN, reason


def _forgetting_rule(
    candidate: EvalReport, champion: EvalReport, config: PromoteConfig, metric: str
) -> tuple[bool, str]:
    gain = candidate.metrics[f"over_{champion.subject}/{metric}"]
    style = metric.removesuffix(f"/{RETRIEVAL}")
    reason = (
        f"on {style} retrieval went from {_show(champion.metrics[metric])} to "
        f"{_show(candidate.metrics[metric])}: a change of {_show(gain)}, {_beyond_chance(gain)}; "
        f"a fall of at most {MAX_FORGETTING} is allowed"
    )
    return -gain.value <= MAX_FORGETTING, reason


def _beyond_chance(gain: Interval) -> str:
    return "within chance" if gain.low <= 0 <= gain.high else "beyond chance"


def _show(number: Interval) -> str:
    return f"{number.value:.3f} [{number.low:.3f}, {number.high:.3f}]"
