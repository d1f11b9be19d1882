"""Everything that a source holds is counted: used, or left out with a reason and an example."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from layouts import picture

from pipeline.contracts import Caption, LeftOut, Sample, Source
from pipeline.data.shards.manifest import read_manifest
from pipeline.data.shards.tally import EXAMPLE_CHARS, REASONS, Tally, settled
from pipeline.data.shards.writer import write_shards
from pipeline.errors import DataError

GOOD = Sample("k", picture(1), "png", (Caption("a cat", "en"),), "g", "photo", "test@1", "MIT", "")


class Listed(Source):
    """A source of given outcomes, as a plugin might be."""

    outcomes: tuple[Sample | LeftOut, ...]

    def samples(self) -> Iterator[Sample | LeftOut]:
        yield from self.outcomes


def tally_of(*outcomes: Sample | LeftOut) -> Tally:
    tally = Tally()
    for outcome in settled(Listed(outcomes=outcomes)):
        tally.add(outcome)
    return tally


def test_found_is_used_and_every_reason(tmp_path: Path) -> None:
    outcomes = (
        GOOD,
        replace(GOOD, key="bare", captions=()),
        replace(GOOD, key="gone", image=b""),
        replace(GOOD, key="page", image=b"<html>"),
        LeftOut("url", "row 7: https://example.org/7.png"),
        LeftOut("url", "row 8: https://example.org/8.png"),
        LeftOut("bad_caption", "row 9: 3", "caption"),
        LeftOut("not_read", "notes.md", "file"),
    )
    manifest = write_shards(settled(Listed(outcomes=outcomes)), tmp_path)
    assert manifest == read_manifest(str(tmp_path)) and manifest.samples == 2
    assert (manifest.found, manifest.used) == (6, 1)
    assert [(x.of, x.reason, x.count, x.example) for x in manifest.losses] == [
        ("image", "url", 2, "row 7: https://example.org/7.png"),
        ("image", "no_caption", 1, "bare"),
        ("image", "no_picture", 1, "gone: empty"),
        ("image", "undecodable", 1, "page: begins with b'<html>'"),
        ("caption", "bad_caption", 1, "row 9: 3"),
        ("file", "not_read", 1, "notes.md"),
    ]


def test_a_set_without_losses_has_the_manifest_it_always_had(tmp_path: Path) -> None:
    write_shards([GOOD], tmp_path)
    assert "losses" not in (tmp_path / "manifest.json").read_text()


@pytest.mark.parametrize(
    ("outcomes", "said"),
    [
        ((), "yielded no samples"),
        ((LeftOut("url", "row 1"), LeftOut("url", "row 2")), r"url 2 \(row 1\).* img2dataset"),
        ((replace(GOOD, captions=()),), r"no_caption 1 \(k\).*--caption; `tessera ingest unlab"),
        ((LeftOut("odd", "row 1"),), r"odd 1 \(row 1\)\. Mend the source"),
    ],
)
def test_nothing_usable_is_an_error_with_the_remedy(
    outcomes: tuple[Sample | LeftOut, ...], said: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=said):
        tally_of(*outcomes).check()
    with pytest.raises(DataError, match=said):
        write_shards(settled(Listed(outcomes=outcomes)), tmp_path)
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_examples_of_unknown_origin_are_safe_to_show() -> None:
    (loss,) = tally_of(LeftOut("url", "\x1b[2J\udc80\n" + "x" * 999)).losses()
    assert loss.example.startswith("?[2J??x") and len(loss.example) == EXAMPLE_CHARS
    assert loss.model_dump_json()


def test_parts_counted_beside_each_other_add_up() -> None:
    whole, part = tally_of(GOOD, LeftOut("url", "a")), tally_of(GOOD, LeftOut("url", "b"))
    whole.merge(part)
    assert whole.samples == 2 and len(whole.groups) == 1
    assert [(x.count, x.example) for x in whole.losses()] == [(2, "a")]


def test_the_guide_lists_every_reason() -> None:
    guide = Path(__file__).parents[3] / "pipeline/data/sources/README.md"
    text = guide.read_text(encoding="utf-8")
    assert not [k for k, (wrong, _) in REASONS.items() if f"| `{k}` | {wrong} |" not in text]
