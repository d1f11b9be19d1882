"""The report's page: what it shows, that nothing in it runs or is loaded, how it is laid out."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from browser import Browser, needs_chromium

from pipeline.contracts import Decision, Interval, RuleVerdict
from pipeline.evaluation.measured import COLUMNS, Measured
from pipeline.evaluation.page import charts, words
from pipeline.evaluation.page.images import IMAGE_BYTES, data_uri
from pipeline.evaluation.page.render import render
from pipeline.evaluation.page.report import Composed, DataSet, Report, report_json
from pipeline.evaluation.scores import Comparison, scores
from pipeline.evaluation.validity import Validity
from pipeline.images.pixels import encode_png

ROOT = Path(__file__).parents[3]
EVIL = "<script>alert(1)</script>"
LONG = "word" * 60  # nothing in it can be wrapped
SUBJECTS = ("real", "tokenizer", "blurred", "shuffled", "untuned", "champion", "candidate")
MODELS = ("untuned", "champion", "candidate")
CAPTIONS = {"en": ("a red apple", EVIL, LONG), "zh": ("红苹果", "一只紫色的兔子", "三颗星星")}


def png(seed: int, side: int = 64) -> bytes:
    """Noise, which compresses worst."""
    return encode_png(np.random.default_rng(seed).integers(0, 256, (3, side, side), np.uint8), {})


def measured(number: int, subject: str, image: Callable[[int], bytes]) -> Measured:
    rng = np.random.default_rng(number)
    rows = [
        {
            "set": f"{style}/{split}", "style": style, "split": split, "language": language,
            "guidance": None, "key": f"{split}-{i}", "caption": CAPTIONS[language][i % 3],
            "topic": ("apples", EVIL)[i % 2], "words": 1 + i % 5, "image": image(100 * number + i),
            "nearest_key": f"near-{i}", "features": rng.normal(size=4).astype(np.float32).tolist(),
            "aligner_r1": float(rng.random() < 0.5), "imagenet_r1": float(rng.random() < 0.5),
            "imagenet_alignment": i / 10 + number / 100, "sharpness": rng.random(),
            "nearest": i / 10, "copies": float(i == 0),
        }
        for style, languages in (("noto", ("en", "zh")), (f"{EVIL}", ("en",)))
        for split in ("seen", "unseen")
        for language in languages
        for i in range(8)
    ]  # fmt: skip
    composed = {"set": "compositions", "split": "compositions", "caption": "composed of nothing"}
    rows.insert(0, {**rows[0], **composed})
    extra = [name for name in rows[0] if name not in COLUMNS]
    schema = pa.schema([*COLUMNS.items(), *((name, pa.float64()) for name in extra)])
    scalars = {"latency_s": 0.2 + number, "size_mb": 1234.5} if subject in MODELS else {}
    return Measured(subject, pa.Table.from_pylist(rows, schema), scalars, "noto", "en")


def verdicts() -> tuple[RuleVerdict, ...]:
    gain = Interval(0.1, 0.02, 0.2)
    numbers = {"before": 0.4, "after": 0.5, "gain": gain, "level": 0.95, "images": 16}
    return (
        RuleVerdict("improve", "imagenet_r1/all", "yes", "it rose", needed=0.0, **numbers),
        RuleVerdict("improve", "kid/all", "no", "it did not fall", needed=0.0, **numbers),
        RuleVerdict("keep", "sharpness/all", "no", f"{EVIL} fell", needed=-0.05, **numbers),
        RuleVerdict("limit", "copies/unseen", "yes", "few", after=0.1, needed=0.2),
        RuleVerdict("slice", "imagenet_r1/words:1", "skipped", "too few images", images=3),
        RuleVerdict("slice", "imagenet_r1/language:zh", "yes", "no loss", needed=-0.1, **numbers),
    )


def make_report(image: Callable[[int], bytes] = png) -> Report:
    subjects = {name: measured(i, name, image) for i, name in enumerate(SUBJECTS)}
    composed = {name: image(9) for name in MODELS}
    how = {"bootstrap": 20, "seed": 0}
    return Report(
        title=f"emoji {EVIL}",
        created=datetime(2026, 11, 28, 12, tzinfo=UTC),
        candidate="candidate",
        subjects=SUBJECTS,
        metrics={name: scores(m, subjects["real"], **how) for name, m in subjects.items()},
        gains={
            "candidate": {
                name: Comparison(
                    subjects[name], subjects["candidate"], subjects["real"], **how
                ).gains()
                for name in ("champion", "untuned")
            }
        },
        measured=subjects,
        training_image=lambda key: image(7) if key == "near-0" else None,
        validity={
            "aligner": Validity(False, f"real below {EVIL}", "train an aligner"),
            "imagenet": Validity(True, "in order"),
        },
        decision=Decision(False, ("not promoted",), verdicts()),
        curves={
            "loss": [(step, 5 / (step + 1)) for step in range(1_000)],
            "validation_loss": [(0, 5.0), (999, 1.0), (1_000, math.nan)],
        },
        compositions=[
            Composed("一只紫色的兔子", "zh", "colour", composed, {"candidate": 1}),
            Composed(EVIL, "en", "relation", composed, {"champion": math.nan}),
        ],
        data=(DataSet(EVIL, "ab" * 32, 9, {"noto": 9}, {EVIL: 9}, (f"{LONG} https://x.org",)),),
        card=f"# Card\n\n{EVIL} [site](https://example.org) <https://x.org> ![grid](samples.png)"
        "\n\n| a | b |\n|---|---|\n| 1 | 2 |\n",
        settings={"seed": 0, "judges": {"aligner": "cd" * 32}, "languages": ["en", "zh"]},
    )  # fmt: skip


@pytest.fixture(scope="module")
def report() -> Report:
    return make_report()


@pytest.fixture(scope="module")
def page(report: Report) -> str:
    return render(report)


class Elements(HTMLParser):
    """All start tags with their attributes, the text, and tags that are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open, self.wrong = "", list[str](), list[str]()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br", "hr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open[-1] != tag and self.open[-1] in ("p", "li"):
            self.open.pop()
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def elements(page: str) -> Elements:
    return Elements(page)


def without_section(page: str, name: str) -> str:
    return re.sub(rf'<section id="{name}">.*?</section>', "", page, flags=re.DOTALL)


# ---- Safe and self-contained ---------------------------------------------------------------------


def test_what_users_supply_is_escaped(elements: Elements) -> None:
    assert "script" not in {tag for tag, _ in elements.tags}
    assert elements.text.count(EVIL) > 10  # caption, topic, style, title, reason, licence, card ...
    assert not [name for _, attrs in elements.tags for name in attrs if name.startswith("on")]


def test_the_page_loads_nothing(elements: Elements) -> None:
    for tag, attrs in elements.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            if value := attrs.get(name):
                assert value.startswith(("data:", "#")), f"<{tag} {name}={value[:40]}>"
    policy = next(a["content"] for t, a in elements.tags if t == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in policy and "script" not in policy
    assert "https://example.org" in elements.text  # links of the card are text


def test_elements_are_nested_as_they_should_be(elements: Elements) -> None:
    assert not elements.wrong and not elements.open
    ids = [attrs["id"] for _, attrs in elements.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = {a["href"] for t, a in elements.tags if t in ("a", "use") and a.get("href")}
    assert {f"#{name}" for name in ids} >= targets


def test_every_image_has_a_text(elements: Elements) -> None:
    assert all(attrs.get("alt") for tag, attrs in elements.tags if tag == "img")


def test_chinese_captions_say_so(elements: Elements) -> None:
    assert sum(attrs.get("lang") == "zh" for _, attrs in elements.tags) >= 2 * 6 + 1


# ---- What it shows -------------------------------------------------------------------------------


def test_all_sections_are_there(elements: Elements) -> None:
    sections = [attrs["id"] for tag, attrs in elements.tags if tag == "section"]
    assert sections == [
        "verdict", "glance", "gate", "images", "numbers", "slices", "training", "extremes",
        "copies", "compositions", "data", "card", "settings",
    ]  # fmt: skip


def test_a_report_of_numbers_alone_is_a_page(report: Report) -> None:
    bare = replace(
        report, decision=None, validity={}, gains={}, curves={}, compositions=(), data=(), card="",
        settings={}, subjects=("candidate",), metrics={"candidate": report.metrics["candidate"]},
        measured={"candidate": report.measured["candidate"]},
    )  # fmt: skip
    found = Elements(render(bare))
    assert "measured, not judged by the gate" in found.text
    assert not found.wrong


@pytest.mark.parametrize(
    ("outcomes", "promoted", "tone"),
    [(("yes",), True, "good"), (("no",), False, "bad"), ((), True, "warning")],
)
def test_the_headline_says_what_was_decided(
    report: Report, outcomes: tuple[str, ...], promoted: bool, tone: str
) -> None:
    found = tuple(RuleVerdict("improve", "imagenet_r1/all", o, "", after=0.5) for o in outcomes)
    decision = Decision(promoted, ("promoted without being judged",), found)
    headline = words.headline(replace(report, decision=decision))
    assert headline.tone == tone
    assert headline.title.startswith("Promoted" if promoted else "Not promoted")


def test_the_headline_names_what_refused(report: Report) -> None:
    headline = words.headline(report)
    assert "Must not get worse" in headline.sentences[0] and "Sharpness" in headline.sentences[0]
    assert "KID" not in headline.sentences[0]  # another rule of improve was met


def test_each_rule_is_shown_with_its_reason(elements: Elements, report: Report) -> None:
    assert report.decision is not None
    for verdict in report.decision.verdicts:
        assert verdict.reason in elements.text


def test_invalid_judges_are_greyed_out_with_the_remedy(page: str) -> None:
    notice = re.search(r'class="notice".*?</div>', page, re.DOTALL)
    assert notice is not None and "train an aligner" in notice[0]
    blocks = re.findall(r'<tbody class="(.*?)">.*?<code class="soft">(.*?)</code>', page, re.DOTALL)
    assert {name for kind, name in blocks if kind == "invalid"} == {"aligner_r1"}


def test_a_number_that_is_none_is_said_to_be_none(report: Report) -> None:
    broken = {"imagenet_r1/all": Interval(math.nan, math.nan, math.nan)}
    metrics = {**report.metrics, "candidate": {**report.metrics["candidate"], **broken}}
    gains = {"candidate": {"champion": broken}}
    html = render(replace(report, metrics=metrics, gains=gains))
    assert re.search(r'class="own +broken">not a number', html)
    assert "nan" not in Elements(re.sub('="data:[^"]*"', "", html)).text.lower()


def test_a_measure_that_the_page_does_not_know_is_shown(report: Report) -> None:
    number = {
        "brand_new/all": Interval(0.123, 0.1, 0.2),
        "brand_new/language:zh": Interval(1, 1, 1),
    }
    metrics = {**report.metrics, "candidate": {**report.metrics["candidate"], **number}}
    text = Elements(render(replace(report, metrics=metrics))).text
    assert "Brand new" in text and "0.123" in text


def test_compositions_are_not_among_the_captions(elements: Elements) -> None:
    assert "composed of nothing" not in elements.text


def test_of_many_compositions_every_kind_and_language_is_shown(report: Report) -> None:
    one = report.compositions[0]
    many = [
        replace(one, kind=kind, language=language, prompt=f"{kind} {language} {number}")
        for kind in ("colour", "count")
        for number in range(40)
        for language in ("en", "zh")
    ]
    text = Elements(render(replace(report, compositions=many))).text
    shown = {c.prompt for c in many if f"{c.prompt}\n" in text}
    assert len(shown) == 80 and "80 more prompts were drawn" in text
    assert {prompt.rpartition(" ")[0] for prompt in shown} == {
        "colour en", "colour zh", "count en", "count zh"
    }  # fmt: skip
    assert {prompt.replace("zh", "en") for prompt in shown} == {
        c.prompt for c in many if c.language == "en"
    }


def test_images_that_are_missing_leave_a_gap(report: Report) -> None:
    champion = report.measured["champion"]
    fewer = replace(champion, rows=champion.rows.slice(0, 4))
    html = render(replace(report, measured={**report.measured, "champion": fewer}))
    assert html.count('class="absent"') > render(report).count('class="absent"')


def test_best_come_first_and_worst_are_the_worst(page: str) -> None:
    section = page[page.index('id="extremes"') : page.index('id="copies"')]
    best, worst = (
        [float(v) for v in re.findall(r"alignment ([\d.]+)", part)]
        for part in section.split("<h3>Worst</h3>")
    )
    assert best == sorted(best, reverse=True) and worst == sorted(worst)
    assert best[-1] >= worst[-1]


def test_without_a_valid_judge_no_image_is_called_best(report: Report) -> None:
    invalid = {name: Validity(False, "", "") for name in report.validity}
    html = render(replace(report, validity=invalid))
    assert "No judge can tell good images from bad ones" in html


def test_neighbours_stand_beside_the_training_image(report: Report, page: str) -> None:
    section = page[page.index('id="copies"') : page.index('id="compositions"')]
    assert section.count(data_uri(png(7))) == 2  # near-0, seen and unseen


# ---- Sizes ---------------------------------------------------------------------------------------


def test_small_images_are_kept_as_they_are() -> None:
    small = encode_png(np.full((3, 64, 64), 200, np.uint8), {})
    assert data_uri(small).startswith("data:image/png")


@pytest.mark.parametrize("side", [65, 256, 1_000])
def test_large_images_are_reduced(side: int) -> None:
    uri = data_uri(png(0, side))
    assert uri.startswith("data:image/webp")
    assert len(uri) < IMAGE_BYTES * 4 / 3 + 100


def test_a_page_of_large_images_is_bounded() -> None:
    image = png(0, 256)
    report = make_report(lambda seed: image)
    compositions = [replace(report.compositions[0], kind=f"k{i % 6}") for i in range(500)]
    assert len(render(replace(report, compositions=compositions))) < 6e6


# ---- JSON ----------------------------------------------------------------------------------------


def test_json_holds_the_numbers_and_no_images(report: Report) -> None:
    values = json.loads(json.dumps(report_json(report), allow_nan=False))
    interval = report.metrics["candidate"]["imagenet_r1/all"]
    assert values["metrics"]["candidate"]["imagenet_r1/all"]["low"] == interval.low
    assert values["gains"]["candidate"]["champion"].keys() >= {"imagenet_r1/all", "latency_s"}
    assert values["decision"]["verdicts"][2]["outcome"] == "no"
    assert values["validity"]["aligner"]["remedy"] == "train an aligner"
    assert values["compositions"][1]["scores"] == {"champion": None}
    assert values["settings"]["judges"] == {"aligner": "cd" * 32}
    assert "image" not in json.dumps(list(values))


# ---- Words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.1234, "0.123"), (-0.5, "−0.500"), (-1e-9, "0.000"), (3e-4, "0.0003"), (12.34, "12.3"),
        (1234.5, "1,234"), (math.nan, "not a number"), (-math.inf, "infinite"), (0.9999, "1.000"),
    ],
)  # fmt: skip
def test_numbers_are_short(value: float, text: str) -> None:
    assert words.number(value) == text


def test_metrics_have_names_for_people() -> None:
    assert words.metric_name("imagenet_r1/all") == "Recall@1 (imagenet)"
    assert words.metric_name("clip_alignment/language:zh") == "Alignment (clip), zh"
    assert words.metric_name("kid/words:1") == "KID, 1 word"
    assert words.metric_name("latency_s") == "Latency"
    assert words.metric_name("brand_new/topic:a: b") == "Brand new, a: b"


# ---- Charts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [(0.1, 0.9), (5.0,), (0.0,), (-3.0, 1e6), (1e-9, 2e-9), ()])
def test_axes_hold_their_values_and_have_ticks(values: tuple[float, ...]) -> None:
    scale = charts.Scale.of([*values, math.nan])
    assert all(scale.low <= v <= scale.high for v in values)
    assert 2 <= len(scale.ticks) <= 7
    assert all(0 <= scale.percent(tick) <= 100 for tick in scale.ticks)


def test_costs_are_drawn_from_zero() -> None:
    lanes = {"": {"candidate": ({"candidate": Interval(0.28, 0.28, 0.28)}, 0)}}
    assert charts.panel("latency_s", lanes, from_zero=True).scale.low < 0
    assert charts.panel("sharpness/all", lanes).scale.low > 0


def test_long_curves_keep_their_ends() -> None:
    (plot,) = charts.plots({"loss": [(i, i) for i in range(10_000)], "validation_loss": [(0, 1)]})
    assert [line.name for line in plot.lines] == ["loss", "validation_loss"]
    points = plot.lines[0].points.split()
    assert len(points) <= charts.MOST_POINTS + 1
    assert points[-1].startswith(f"{charts.WIDTH - charts.RIGHT}")


# ---- As people get it ----------------------------------------------------------------------------


def test_a_wheel_holds_the_template() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["pipeline"]
    held = {path for pattern in patterns for path in (ROOT / "pipeline").glob(pattern)}
    page = ROOT / "pipeline/evaluation/page"
    assert {path for path in page.iterdir() if path.suffix in (".j2", ".css")} <= held


OVERFLOWING = """[...document.querySelectorAll("body *")].filter(e => e.checkVisibility() &&
    e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".scroll, pre")
).map(e => e.outerHTML.slice(0, 120))"""
CONTRAST = (
    """getComputedStyle(document.body).color + getComputedStyle(document.body).backgroundColor"""
)


@needs_chromium
def test_the_page_fits_desktop_and_phone(page: str, tmp_path: Path) -> None:
    (tmp_path / "profile").mkdir()
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    with Browser(tmp_path / "profile") as browser:
        for width in (1280, 390):
            browser.open((tmp_path / "report.html").as_uri(), width=width)
            browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
            assert browser.evaluate("document.documentElement.scrollWidth") == width
            assert browser.evaluate(OVERFLOWING) == []
            assert browser.evaluate("[...document.images].every(i => i.naturalWidth > 0)")
            assert browser.evaluate("matchMedia('(min-width: 1100px)').matches") == (width > 1100)
            assert not browser.happened("Log.entryAdded")  # no violation of the policy
            requests = browser.happened("Network.requestWillBeSent")
            asked = {request["request"]["url"].partition(":")[0] for request in requests}
            assert asked <= {"file", "data"}
            shot = browser.screenshot(tmp_path / f"{width}.png")
            assert shot.stat().st_size > 50_000
