"""The page: a report as one HTML file that needs no network, no scripts and no other file.

path.write_text(render(report), encoding="utf-8")

What it shows is laid out in report.html.j2 and report.css beside this file; everything is escaped
there. The page's content security policy forbids it to load anything.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

from pipeline.contracts import Interval, RuleVerdict
from pipeline.evaluation.page import charts, words
from pipeline.evaluation.page.images import SPLITS, Album, Row, data_uri
from pipeline.evaluation.page.report import Composed, Report
from pipeline.evaluation.scores import Measure

TEMPLATE = "report.html.j2"
GATED_ROWS, OTHER_ROWS = 6, 2
"""Captions that are shown of each split and language of the gated style, and of another style."""
MOST_OTHER_GROUPS = 6
EXTREMES, NEIGHBOURS = 8, 8
MOST_COMPOSITIONS = 80
GLANCE = (
    "{second}_r1/all", "{first}_r1/all", "style_match/all", "kid/all", "coverage/all",
    "sharpness/all",
    "composition/compositions", "copies/unseen", "latency_s",
)  # fmt: skip
"""Metrics that are drawn beside their floors at the top."""
OPEN_PANELS = 4
"""Slices of as many measures are shown without a click."""
MAIN_SLICES = ("all", "seen", "unseen", "compositions")
DIMENSION_NAMES = {
    "split": "Seen in training?", "language": "Language", "style": "Style", "topic": "Topic",
    "words": "Length of the caption", "guidance": "Guidance scale",
    "compositions": "Language of the prompt", "kind": "Kind of composition",
}  # fmt: skip


def render(report: Report) -> str:
    """The page as HTML.

    Raises:
        KeyError: report.measured lacks the candidate.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(words=words, charts=charts, subject_class=_classes(report))
    environment.filters.update(number=words.number, interval=words.interval, uri=data_uri)
    return environment.get_template(TEMPLATE).render(_view(report))


def _view(report: Report) -> dict[str, Any]:
    """The template's variables."""
    album = Album(report)
    columns = _columns(report)
    return {
        "report": report,
        "headline": words.headline(report),
        "invalid": {n: v for n, v in report.validity.items() if not v.valid},
        "glance": _glance(report),
        "rules": _rules(report),
        "columns": columns,
        "image_columns": _image_columns(report),
        "grids": _grids(report, album),
        "groups": _groups(report),
        "panels": _slices(report),
        "open_panels": OPEN_PANELS,
        "everything": _everything(report),
        "plots": charts.plots(report.curves or {}),
        "extremes": _extremes(report, album),
        "neighbours": _neighbours(report, album),
        "compositions": _compositions(report),
        "card": _markdown(report.card),
        "settings": list(_flat(report.settings)),
    }


# ---- Subjects ------------------------------------------------------------------------------------


def _columns(report: Report) -> list[str]:
    """The subjects of tables: the candidate, other models, then the floors."""
    models = [name for name in report.subjects if name not in words.FLOORS]
    first = [report.candidate, *(n for n in report.before if n in models)]
    floors = [name for name in words.FLOORS if name in report.subjects]
    return list(dict.fromkeys([*first, *models, *floors]))


def _image_columns(report: Report) -> list[str]:
    """The subjects whose images are shown side by side."""
    models = [name for name in _columns(report) if name not in words.FLOORS]
    order = ["real", "champion", report.candidate, *models]
    return list(dict.fromkeys(name for name in order if name in report.measured))[:5]


def _classes(report: Report) -> Mapping[str, str]:
    """The CSS class by which each subject has its colour and shape."""
    known = {*words.SUBJECTS} - {"candidate"}
    others = [n for n in report.subjects if n not in known and n != report.candidate]
    found = {name: f"s-{name}" for name in report.subjects if name in known}
    found |= {name: f"s-other{number % 3}" for number, name in enumerate(others)}
    return {**found, report.candidate: "s-candidate"}


# ---- Numbers -------------------------------------------------------------------------------------


def _judges(report: Report) -> list[str]:
    """Judges that tell captions by images, the most independent one first."""
    measures = {metric.partition("/")[0] for metric in report.metrics[report.candidate]}
    return [name for name in reversed(list(report.validity)) if f"{name}_r1" in measures]


def _glance(report: Report) -> list[charts.Panel]:
    judges = _judges(report)
    names = {"second": judges[0] if judges else "", "first": judges[-1] if judges else ""}
    found = []
    for metric in dict.fromkeys(name.format(**names) for name in GLANCE):
        lanes = {
            subject: ({subject: report.metrics[subject][metric]}, 0)
            for subject in _columns(report)
            if metric in report.metrics.get(subject, {})
        }
        if lanes:
            found.append(charts.panel(metric, {"": lanes}, from_zero="/" not in metric))
    return found


@dataclass(frozen=True)
class _Line:
    """One metric in a table.

    Attributes:
        metric: its name.
        label: of the slice.
        numbers: by subject.
        gains: of the candidate over other subjects.
    """

    metric: str
    label: str
    numbers: Mapping[str, Interval]
    gains: Mapping[str, Interval]


@dataclass(frozen=True)
class _Block:
    """A measure in a table."""

    measure: str
    says: Measure
    valid: bool
    lines: Sequence[_Line]


def _groups(report: Report) -> list[tuple[str, str, list[_Block]]]:
    """Title, question and measures of each group, of the main slices."""
    metrics = [m for m in _metrics(report) if m.partition("/")[2] in ("", *MAIN_SLICES)]
    by_group: dict[str, list[_Block]] = {name: [] for name in words.GROUPS}
    for measure in _by_measure(metrics):
        block = _block(report, measure, metrics)
        by_group.setdefault(block.says.group, []).append(block)
    titles = {**{name: (name.capitalize(), "") for name in by_group}, **words.GROUPS}
    return [(*titles[name], blocks) for name, blocks in by_group.items() if blocks]


def _everything(report: Report) -> list[_Block]:
    """Every metric in every slice."""
    metrics = _metrics(report)
    return [_block(report, measure, metrics) for measure in _by_measure(metrics)]


def _metrics(report: Report) -> list[str]:
    """All metrics of any subject."""
    subjects = [report.candidate, *report.subjects]
    return list(dict.fromkeys(m for name in subjects for m in report.metrics.get(name, {})))


def _by_measure(metrics: Sequence[str]) -> list[str]:
    """Their measures in the order of the page: those of one judge after those of another."""
    known = {name: number for number, name in enumerate(words.KNOWN_MEASURES)}
    measures = dict.fromkeys(metric.partition("/")[0] for metric in metrics)
    return sorted(measures, key=lambda name: known.get(name, len(known)))


def _block(report: Report, measure: str, metrics: Sequence[str]) -> _Block:
    own = [metric for metric in metrics if metric.partition("/")[0] == measure]
    lines = [
        _Line(
            metric,
            words.slice_name(metric.partition("/")[2]),
            {name: found[metric] for name, found in report.metrics.items() if metric in found},
            {
                name: gains[metric]
                for name, gains in report.gains.get(report.candidate, {}).items()
                if metric in gains
            },
        )
        for metric in own
    ]
    return _Block(measure, words.known_measure(measure), report.is_valid(measure), lines)


def _slices(report: Report) -> list[charts.Panel]:
    """Per measure, the candidate, what it is compared with and the real images in every slice."""
    subjects = list(dict.fromkeys([report.candidate, *report.before, "real"]))
    own = report.metrics[report.candidate]
    judges = _judges(report)
    order = [*(f"{name}_r1" for name in judges), "kid", "sharpness", "style_match"]
    measures = list(dict.fromkeys([*order, *_by_measure(list(own))]))
    counted = report.measured[report.candidate]
    found = []
    for measure in measures:
        groups: dict[str, dict[str, tuple[charts.Numbers, int]]] = {}
        for metric in own:
            name, _, of = metric.partition("/")
            dimension, colon, _ = ("split", ":", of) if of in SPLITS else of.partition(":")
            if name != measure or not colon or dimension not in DIMENSION_NAMES:
                continue
            numbers = {
                subject: report.metrics[subject][metric]
                for subject in subjects
                if metric in report.metrics.get(subject, {})
            }
            images = int(counted.mask(of).sum()) if of in counted.slices else 0
            heading = DIMENSION_NAMES[dimension]
            groups.setdefault(heading, {})[words.slice_name(of)] = (numbers, images)
        if groups:
            ordered = {n: groups[n] for n in DIMENSION_NAMES.values() if n in groups}
            found.append(charts.panel(measure, ordered))
    return found


# ---- The gate ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rules:
    """The verdicts of one kind of rule: those to show, and those that a click shows."""

    title: str
    says: str
    shown: Sequence[RuleVerdict]
    folded: Sequence[RuleVerdict]


def _rules(report: Report) -> list[_Rules]:
    verdicts = report.decision.verdicts if report.decision else ()
    found = []
    for rule, (title, says) in words.RULES.items():
        own = [v for v in verdicts if v.rule == rule]
        shown = [v for v in own if rule != "slice" or v.outcome == "no"]
        if own:
            found.append(_Rules(title, says, shown, [v for v in own if v not in shown]))
    return found


# ---- Images --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Grid:
    """Captions of one style, split and language with all subjects' images."""

    style: str
    split: str
    language: str
    gated: bool
    rows: Sequence[tuple[Row, Sequence[bytes | None]]]


def _grids(report: Report, album: Album) -> list[_Grid]:
    columns, style = _image_columns(report), album.candidate.style
    grids = [
        _Grid(*group, group[0] == style, [(row, [album.image(c, row) for c in columns])
                                          for row in rows])
        for group, rows in album.first(GATED_ROWS, OTHER_ROWS).items()
    ]  # fmt: skip
    gated = [grid for grid in grids if grid.gated]
    return [*gated, *[grid for grid in grids if not grid.gated][:MOST_OTHER_GROUPS]]


@dataclass(frozen=True)
class _Extremes:
    """The images that a judge finds best and worst; or why there are none."""

    judge: str
    best: Sequence[tuple[Row, float, bytes | None, bytes | None]]
    worst: Sequence[tuple[Row, float, bytes | None, bytes | None]]
    reason: str = ""


def _extremes(report: Report, album: Album) -> _Extremes:
    for judge in _judges(report):
        if report.validity[judge].valid:
            found = [
                (row, value, album.image(report.candidate, row), album.image("real", row))
                for row, value in album.sorted_by(f"{judge}_alignment", "all")
            ]
            half = min(EXTREMES, len(found) // 2)
            if half:
                return _Extremes(judge, found[::-1][:half], found[:half])
    return _Extremes("", (), (), "No judge can tell good images from bad ones on this data.")


def _neighbours(
    report: Report, album: Album
) -> dict[str, list[tuple[Row, float, bytes | None, bytes | None]]]:
    """By split, the candidate's images that are nearest to a training image, and that image."""
    return {
        split: [
            (row, value, album.image(report.candidate, row), report.training_image(key))
            for row, value in found[:most]
            if (key := album.nearest_key(row))
        ]
        for split, most in (("unseen", NEIGHBOURS), ("seen", NEIGHBOURS // 2))
        if (found := album.sorted_by("nearest", split))
    }


@dataclass(frozen=True)
class _Compositions:
    """Prompts of compositions.

    Attributes:
        columns: the subjects.
        shown: prompts by kind.
        left_out: how many are not shown.
        means: by kind and subject, the mean score and of how many images it is.
    """

    columns: Sequence[str]
    shown: Mapping[str, Sequence[Composed]]
    left_out: int
    means: Mapping[str, Mapping[str, tuple[float, int]]]


def _compositions(report: Report) -> _Compositions:
    """If there are more than MOST_COMPOSITIONS, every n-th is shown in each language, beginning
    with another one in each, so that all kinds and languages are among them."""
    every = -(-len(report.compositions) // MOST_COMPOSITIONS) or 1
    groups: dict[tuple[str, str], list[Composed]] = {}
    for composed in report.compositions:
        groups.setdefault((composed.kind, composed.language), []).append(composed)
    languages = list(dict.fromkeys(language for _, language in groups))
    shown: dict[str, list[Composed]] = {}
    for (kind, language), prompts in groups.items():
        first = languages.index(language) % every
        shown.setdefault(kind, []).extend(prompts[first::every])
    scores: dict[str, dict[str, list[float]]] = {}
    for composed in report.compositions:
        for subject, score in composed.scores.items():
            if math.isfinite(score):
                scores.setdefault(composed.kind, {}).setdefault(subject, []).append(score)
    return _Compositions(
        [n for n in _image_columns(report) if any(n in c.images for c in report.compositions)],
        shown,
        len(report.compositions) - sum(map(len, shown.values())),
        {
            kind: {name: (sum(found) / len(found), len(found)) for name, found in means.items()}
            for kind, means in scores.items()
        },
    )


# ---- Texts ---------------------------------------------------------------------------------------


def _markdown(text: str) -> Markup:
    """Markdown as HTML without raw HTML, links or images: an address is shown as text."""
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    for token in (tokens := markdown.parse(text)):
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(int(token.tag[1]) + 2, 6)}"
        for inner in token.children or ():
            if inner.type == "link_open":
                inner.type, inner.content = "text", ""
                address = str(inner.attrs.get("href", ""))
                inner.meta = {"address": address}
            elif inner.type == "image":
                inner.type, inner.content = "text", f"[image: {inner.content}]"
        _addresses(token.children or [])
    html = markdown.renderer.render(tokens, markdown.options, {})
    html = html.replace("<table>", '<div class="scroll"><table>')
    return Markup(html.replace("</table>", "</table></div>"))


def _addresses(tokens: list[Any]) -> None:
    """Turn the end of every link into its address, in parentheses, unless that is its text."""
    open_links: list[tuple[str, int]] = []
    for number, token in enumerate(tokens):
        if "address" in token.meta:
            open_links.append((token.meta["address"], number))
        elif token.type == "link_close":
            address, start = open_links.pop()
            text = "".join(t.content for t in tokens[start + 1 : number])
            token.type, token.content = "text", "" if text == address else f" ({address})"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as dotted names and texts."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, (list, tuple)):
            simple = all(isinstance(item, (str, int, float)) for item in value)
            text = ", ".join(map(str, value)) if simple else json.dumps(value, default=str)
            yield f"{prefix}{name}", text
        else:
            yield f"{prefix}{name}", str(value)
