"""What the page says in words: names of subjects and measures, numbers, and the headline.

subject_name("shuffled"), measure_name("imagenet_r1")   # "wrong captions", "Recall@1 (imagenet)"
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.contracts import Decision, Interval, RuleVerdict
from pipeline.evaluation.page.report import Report
from pipeline.evaluation.scores import MEASURES, Measure, measure_of

SUBJECTS = {
    "candidate": ("candidate", "the model that this report is about"),
    "champion": ("champion", "the model that is served today"),
    "untuned": ("untuned base", "the model that training began with"),
    "real": ("real images", "the best that a judge can be expected to say"),
    "tokenizer": (
        "reconstructions",
        "real images through the image tokenizer: no generator of such tokens can be better",
    ),
    "blurred": ("real, blurred", "what a judge that sees as people do must mark down"),
    "shuffled": ("wrong captions", "real images against their neighbours' captions: chance"),
}
"""Names and explanations of the subjects that every evaluation may have."""
FLOORS = ("real", "tokenizer", "blurred", "shuffled")
"""Subjects that are no models."""

MEASURE_NAMES = {
    "r1": "Recall@1", "r5": "Recall@5", "alignment": "Alignment", "kid": "KID", "fid": "FID",
    "style_match": "Style recognised", "composition": "Compositions",
    "guidance_gain": "Gain by guidance", "psnr": "PSNR", "ssim": "SSIM",
    "nearest": "Distance to training images", "copies": "Copies",
    "latency_s": "Latency", "images_per_s": "Images per second", "size_mb": "Size",
}  # fmt: skip

GROUPS = {
    "judges": ("What people see", "Does an image show what its caption says?"),
    "images": ("Sharpness and fidelity", "How crisp are the images?"),
    "distribution": ("Distribution", "As a set, are the images like the real ones, and as varied?"),
    "memory": ("Copies", "Are the images new, or repeated from the training data?"),
    "cost": ("Speed and size", "What does the model cost to run?"),
}
"""Titles and questions of the groups of measures (`Measure.group`), in the order of the page."""

RULES = {
    "judges": ("A valid judge", "At least one judge must be able to judge on this data."),
    "chance": ("Better than chance", "There is no other model to compare with: the candidate must "
               "beat wrong captions, by every valid judge."),
    "improve": ("Must improve", "One of these is enough, if it is beyond chance."),
    "keep": ("Must not get worse", "All of these: that the loss stays below the margin must be "
             "shown, not merely not disproved."),
    "limit": ("Must stay within limits", "Bounds of the candidate's own numbers."),
    "slice": ("No slice may clearly lose", "Only evidence of harm beyond the margin refuses; too "
              "few images are no evidence and are skipped."),
}  # fmt: skip
"""Titles and explanations of the gate's kinds of rules (`RuleVerdict.rule`), in their order."""


MINUS = "\N{MINUS SIGN}"


def subject_name(subject: str) -> str:
    """A subject's name for people."""
    return SUBJECTS.get(subject, (subject, ""))[0]


def known_measure(metric: str) -> Measure:
    """What a metric's measure says; of a measure that is not known, that."""
    try:
        return measure_of(metric)
    except KeyError:
        return Measure(None, "a measure that this version of the page does not know")


def measure_name(measure: str) -> str:
    """A measure's name for people, with its judge."""
    if measure in MEASURE_NAMES:
        return MEASURE_NAMES[measure]
    judge, _, kind = measure.rpartition("_")
    if judge and kind in MEASURE_NAMES and measure not in SUBJECTS:
        return f"{MEASURE_NAMES[kind]} ({judge})"
    return measure.replace("_", " ").capitalize()


def slice_name(name: str) -> str:
    """A slice's name for people."""
    dimension, _, value = name.partition(":")
    if dimension == "words":
        return f"{value} word" if value == "1" else f"{value} words"
    return value or dimension


def metric_name(metric: str) -> str:
    """A metric's name for people: measure, judge, slice."""
    measure, _, of = metric.partition("/")
    return measure_name(measure) + (
        f", {slice_name(of)}" if of not in ("", "all", "compositions") else ""
    )


def number(value: float | None) -> str:
    """A number, three digits after the point below 10; very small ones with one digit."""
    if value is None:
        return ""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite"
    size = abs(value)
    if 1e-4 <= size < 1e-3:
        return f"{value:.1g}".replace("-", MINUS)
    text = f"{value:,.{3 if size < 10 else 1 if size < 100 else 0}f}"
    return text.replace("-", MINUS if text.strip("-0.") else "")


def signed(value: float) -> str:
    """A number with its sign."""
    text = number(value)
    return f"+{text}" if value > 0 and text.strip("0.") else text


def interval(found: Interval) -> str:
    """The interval of a number; empty if it was measured once."""
    return "" if once(found) else f"[{number(found.low)}, {number(found.high)}]"


def once(found: Interval) -> bool:
    """Whether a number was measured once and has no interval."""
    return found.low == found.high


def tone(gain: Interval) -> str:
    """What a gain says: "better" or "worse" beyond chance, "level", "once", "broken"."""
    if not math.isfinite(gain.value):
        return "broken"
    if once(gain):
        return "once"
    return "better" if gain.low > 0 else "worse" if gain.high < 0 else "level"


TONES = {
    "better": ("\N{BLACK UP-POINTING TRIANGLE}", "better beyond chance"),
    "worse": ("\N{BLACK DOWN-POINTING TRIANGLE}", "worse beyond chance"),
    "level": ("\N{ALMOST EQUAL TO}", "within chance"),
    "once": ("", "measured once"),
    "broken": ("", "not a number"),
}
"""A sign and a meaning for each tone."""


def direction(measure: Measure) -> str:
    """In which direction a measure is better."""
    return {"higher": "higher is better", "lower": "lower is better", None: ""}[measure.better]


HEADLINES = ("kid", "sharpness", "coverage", "style_match", "composition", "diversity", "copies")
"""Measures that the headline names, beside each judge's Recall@1."""


# ---- The headline --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Headline:
    """The report in a few sentences.

    Attributes:
        tone: "good", "bad", "warning" or "plain".
        title: the verdict.
        sentences: what it rests on.
    """

    tone: str
    title: str
    sentences: Sequence[str]


def headline(report: Report) -> Headline:
    """The gate's verdict, then how the candidate compares."""
    comparisons = [_seen(report), *filter(None, (_compared(report, b) for b in report.before))]
    decision = report.decision
    if decision is None:
        return Headline("plain", f"{_name(report)}: measured, not judged by the gate", comparisons)
    if not decision.promoted:
        title = f"Not promoted: {_name(report)} does not become the champion"
        return Headline("bad", title, [*_refusals(decision), *comparisons])
    judged = any(v.outcome == "yes" and v.rule in ("improve", "chance") for v in decision.verdicts)
    title = f"Promoted: {_name(report)} becomes the champion"
    if not judged:
        return Headline("warning", title, [*decision.reasons[:1], *comparisons])
    helped = [v for v in decision.verdicts if v.outcome == "yes" and v.rule in HELPING]
    names = ", ".join(dict.fromkeys(metric_name(v.metric) for v in helped))
    return Headline("good", title, [f"It improves beyond chance by {names}.", *comparisons])


HELPING = ("improve", "chance")


def refuses(verdict: RuleVerdict) -> bool:
    """Whether a verdict alone keeps the candidate from being promoted."""
    broken = verdict.after is not None and not math.isfinite(verdict.after)
    return verdict.outcome == "no" and (verdict.rule != "improve" or broken)


def _refusals(decision: Decision) -> list[str]:
    found = []
    if not any(v.outcome == "yes" and v.rule in HELPING for v in decision.verdicts):
        found.append("No metric that must improve did so beyond chance.")
    for rule, (title, _) in RULES.items():
        refused = [v for v in decision.verdicts if v.rule == rule and refuses(v)]
        if refused:
            names = ", ".join(metric_name(v.metric) for v in refused if v.metric)
            found.append(f"Refused by {_quoted(title)}{': ' if names else ''}{names}.")
    return found or list(decision.reasons[:1])


def _compared(report: Report, before: str) -> str:
    """Which of HEADLINES moved beyond chance; invalid judges are not asked."""
    moved: Mapping[str, list[str]] = {"better": [], "worse": [], "level": []}
    for metric, gain in report.gains[report.candidate][before].items():
        measure, _, of = metric.partition("/")
        named = measure in HEADLINES or measure.endswith("_r1")
        if (
            named
            and of in ("all", "compositions")
            and report.is_valid(metric)
            and tone(gain) in moved
        ):
            moved[tone(gain)].append(measure_name(measure))
    if not any(moved.values()):
        return ""
    parts = [
        f"{which} by {', '.join(moved[which])}" for which in ("better", "worse") if moved[which]
    ]
    found = f"beyond chance {' and '.join(parts)}" if parts else "no difference beyond chance"
    return f"Compared with the {subject_name(before)}: {found}."


def _seen(report: Report) -> str:
    """What the most independent valid judge recognises, in per cent."""
    for judge in reversed(list(report.validity)):
        metric = f"{judge}_r1/all"
        shares = {
            name: report.metrics[name][metric].value
            for name in (report.candidate, *report.before, "real")
            if metric in report.metrics.get(name, {})
        }
        if report.is_valid(metric) and report.candidate in shares:
            own = shares.pop(report.candidate)
            others = "".join(f", {_percent(v)} of {_possessive(n)}" for n, v in shares.items())
            return (
                f"The judge “{judge}” "
                f"finds the right caption of {_percent(own)} of {_possessive(report.candidate)} "
                f"images{others}."
            )
    return "No judge of captions is valid on this data."


def _quoted(text: str) -> str:
    return f"\N{LEFT DOUBLE QUOTATION MARK}{text}\N{RIGHT DOUBLE QUOTATION MARK}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if math.isfinite(share) else "an unknown share"


def _possessive(subject: str) -> str:
    if subject == "real":
        return "real ones"
    name = subject_name(subject)
    return f"the {name}'s" if subject in SUBJECTS else f"{name}'s"


def _name(report: Report) -> str:
    name = report.candidate
    return f"the {name}" if name == "candidate" else name


KNOWN_MEASURES = tuple(MEASURES)
"""In the order of the page."""
