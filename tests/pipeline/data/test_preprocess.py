"""Shards to pixels: every sample accounted for, by unit and through Ray Data."""

from __future__ import annotations

import errno
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import corpus
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus import record
from hypothesis import given
from hypothesis import strategies as st
from layouts import img2dataset
from PIL import Image

from jobs.ingest import ingest
from pipeline.config import DataConfig, PreprocessConfig
from pipeline.contracts import Caption, Sample
from pipeline.data.preprocess.decode import decode
from pipeline.data.preprocess.job import _plan_shards, preprocess
from pipeline.data.preprocess.reader import EncodedSample
from pipeline.data.preprocess.report import (
    check_bad_fraction,
    check_counts,
    quarantine_table,
    resolve_outcomes,
)
from pipeline.data.preprocess.rows import PIXELS, RowDecoder, perceptual_hash
from pipeline.data.shards.manifest import MANIFEST, dataset_digest, read_manifest
from pipeline.data.shards.splits import split_of
from pipeline.data.shards.writer import write_shards
from pipeline.data.sources.webdataset import WebDatasetSource
from pipeline.errors import DataError, ResourceError

DATA = DataConfig(validation_fraction=0.1, test_fraction=0.2)
CONFIG = PreprocessConfig(image_size=16, max_bad_fraction=1.0)


def encoded_image(seed: int, side: int = 24) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "WEBP", lossless=True)
    return stream.getvalue()


def sample(i: int, style: str = "noto") -> Sample:
    return Sample(
        key=f"{style}-{i:03d}",
        image=encoded_image(i + (0 if style == "noto" else 1000)),
        extension="webp",
        captions=(Caption(f"thing {i}", "en"), Caption(f"东西 {i}", "zh")),
        group=f"g{i:03d}",
        style=style,
        source="test@1",
        license="MIT",
        attribution="nobody",
    )


def encoded(**changes: Any) -> EncodedSample:
    """A sample as pipeline/data/preprocess/reader.py hands it over."""
    said = record("g") | changes.pop("said", {})
    sample: EncodedSample = {
        "shard": "set/0.tar",
        "index": 0,
        "key": "k",
        "image": encoded_image(0),
        "record": json.dumps(said).encode(),
        "problem": None,
    }
    return cast(EncodedSample, sample | changes)


def files(folder: Path) -> dict[str, str]:
    """SHA-256 of every table by its path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.parquet"))
    }


@pytest.mark.parametrize(
    ("row", "outcome"),
    [
        (encoded(), "accepted"),
        (encoded(image=None), "no_picture"),
        (encoded(problem="link"), "link"),
        (encoded(said={"group": "other"}), "left_out"),
        (encoded(said={"attribution": ""}), "accepted"),
        (encoded(said={"license": ""}), "bad_json"),
        *((encoded(image=content), outcome) for content, outcome in corpus.pictures().values()),
        *((encoded(record=content), outcome) for content, outcome in corpus.records().values()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_row_never_raises(row: EncodedSample, outcome: str) -> None:
    found = RowDecoder(frozenset({"g", "x"}), DATA, CONFIG).row(row)
    assert (found["outcome"], found["key"], found["shard"]) == (outcome, "k", "set/0.tar")
    assert ("image" in found) == (outcome == "accepted")


def test_captions_by_language_and_images_without_any() -> None:
    def row(**settings: Any) -> dict[str, Any]:
        captions = settings.pop("captions")
        config = CONFIG.model_copy(update=settings)
        return RowDecoder(None, DATA, config).row(encoded(said={"captions": captions}))

    both = [{"text": "apple", "language": "en"}, {"text": "蘋果", "language": "zh-Hant"}]
    assert [c["language"] for c in row(captions=both, languages=("zh",))["captions"]] == ["zh-Hant"]
    assert row(captions=both, languages=("fr",))["outcome"] == "other_language"
    free = {"languages": ("fr",), "require_captions": False}
    assert row(captions=both, **free)["captions"] == []
    assert row(captions=[], require_captions=False)["outcome"] == "accepted"
    assert row(captions=[{"text": "", "language": "fr"}], **free)["outcome"] == "empty_caption"
    assert row(captions=[{"text": "", "language": "en"}], **free)["outcome"] == "accepted"


def test_a_long_caption_costs_itself_and_not_the_image() -> None:
    short, long = ({"text": text, "language": "en"} for text in ("an apple", "x" * 1_001))
    blank = {"text": " ", "language": "zh"}
    row = RowDecoder(None, DATA, CONFIG).row(encoded(said={"captions": [short, long, blank, 7]}))
    assert row["outcome"] == "accepted" and [c["text"] for c in row["captions"]] == ["an apple"]
    assert row["captions_left_out"] == ["long_caption", "empty_caption", "bad_json"]


def table(*rows: tuple[str, str, str, bytes]) -> pa.Table:
    """Rows of (key, shard, split, digest), accepted."""
    keys, shards, splits, digests = zip(*rows, strict=True)
    return pa.table(
        {
            "key": list(keys),
            "index": list(range(len(rows))),
            "perceptual_hash": pa.array([int.from_bytes(d, "big") for d in digests], pa.uint64()),
            "shard": list(shards),
            "split": list(splits),
            "digest": list(digests),
            "outcome": ["accepted"] * len(rows),
        }
    )


def test_the_first_of_equal_keys_stays() -> None:
    rows = table(("k", "b", "train", b"1"), ("k", "a", "train", b"2"), ("j", "b", "test", b"3"))
    found = quarantine_table(resolve_outcomes(rows, {"a": 0, "b": 1}, CONFIG)).to_pylist()
    assert found == [{"shard": "b", "key": "k", "reason": "duplicate_key"}]


def test_a_training_image_equal_to_a_held_out_one_goes() -> None:
    rows = table(
        ("a", "s", "train", b"1"),
        ("b", "s", "test", b"1"),
        ("c", "s", "validation", b"1"),
        ("d", "s", "train", b"2"),
        ("e", "s", "train", b"2"),
    )
    found = quarantine_table(resolve_outcomes(rows, {"s": 0}, CONFIG)).to_pylist()
    assert found == [{"shard": "s", "key": "a", "reason": "held_out_twin"}]


def test_of_equal_or_similar_images_one_stays_and_a_held_out_one_first() -> None:
    rows = table(
        ("a", "s", "train", b"\x00\x01"),
        ("b", "s", "train", b"\x00\x01"),
        ("c", "s", "train", b"\xff\xf0"),
        ("d", "s", "test", b"\xff\xf1"),
        ("e", "s", "train", b"\x00\x06"),
        ("f", "s", "train", b"\x0f\x0f"),
    )

    def gone(how: str, distance: int = 4) -> dict[str, str]:
        config = CONFIG.model_copy(update={"deduplicate": how, "perceptual_distance": distance})
        found = quarantine_table(resolve_outcomes(rows, {"s": 0}, config)).to_pylist()
        return {row["key"]: row["reason"] for row in found}

    assert gone("no") == {}
    assert gone("exact") == {"b": "duplicate_picture"}
    assert gone("perceptual", 0) == {"b": "duplicate_picture"}
    assert gone("perceptual", 1) == {"b": "duplicate_picture", "c": "near_duplicate"}
    assert gone("perceptual", 3) == {
        "b": "duplicate_picture",
        "c": "near_duplicate",
        "e": "near_duplicate",
    }


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20), st.data())
def test_near_duplicates_are_found_as_by_comparing_all(hashes: list[int], data: Any) -> None:
    distance = data.draw(st.integers(0, 12))
    for _ in range(10):  # neighbours within and beyond the distance
        value = data.draw(st.sampled_from(hashes))
        for bit in data.draw(st.sets(st.integers(0, 63), max_size=distance + 2)):
            value ^= 1 << bit
        hashes.append(value)
    rows = table(*((f"{i:03d}", "s", "train", bytes([i])) for i in range(len(hashes))))
    column = rows.schema.get_field_index("perceptual_hash")
    rows = rows.set_column(column, "perceptual_hash", pa.array(hashes, pa.uint64()))
    config = CONFIG.model_copy(
        update={"deduplicate": "perceptual", "perceptual_distance": distance}
    )
    found = resolve_outcomes(rows, {"s": 0}, config)["outcome"].to_pylist()
    kept: list[int] = []
    for value, outcome in zip(hashes, found, strict=True):
        near = any((value ^ other).bit_count() <= distance for other in kept)
        assert outcome == ("near_duplicate" if near else "accepted")
        kept += [] if near else [value]


def test_a_perceptual_hash_survives_compression_and_tells_images_apart() -> None:
    def hash_of(image: Image.Image, kind: str, **options: Any) -> int:
        return perceptual_hash(decode(corpus.encode(image, kind, **options), PreprocessConfig()))

    smooth = [
        corpus.noise(5, 5, seed).resize((200, 200), Image.Resampling.BICUBIC) for seed in (1, 2)
    ]
    one, other = (hash_of(image, "PNG") for image in smooth)
    assert (one ^ hash_of(smooth[0], "JPEG", quality=40)).bit_count() <= 4
    assert (one ^ hash_of(smooth[0].resize((90, 90)), "WEBP")).bit_count() <= 4
    assert (one ^ other).bit_count() > 12


def test_counts_and_fractions_are_enforced() -> None:
    rows = table(("a", "s", "train", b"1"))
    check_counts(rows, {"s": 1})
    with pytest.raises(DataError, match=r"s: 1 of 2; .*write the set again"):
        check_counts(rows, {"s": 2})
    check_bad_fraction({"too_many_pixels": 2, "bad_json": 1}, 10, 0.3)
    with pytest.raises(
        DataError, match=r"3 of 10 .*too_many_pixels 2, bad_json 1.*max_bad_fraction=0\.2"
    ):
        check_bad_fraction({"too_many_pixels": 2, "bad_json": 1}, 10, 0.2)
    check_bad_fraction({"other_language": 7, "near_duplicate": 2, "too_many_pixels": 1}, 10, 0.1)
    with pytest.raises(DataError, match="keys must be unique over all sets"):
        check_bad_fraction({"duplicate_key": 3}, 10, 0.1)


def test_captions_in_other_languages_are_not_judged() -> None:
    config = CONFIG.model_copy(update={"languages": ("en",), "max_caption_chars": 20})
    captions = [{"text": "a cat", "language": "en"}, {"text": "x" * 99, "language": "fr"}]
    row = RowDecoder(None, DATA, config).row(encoded(said={"captions": captions}))
    assert row["outcome"] == "accepted" and [c["text"] for c in row["captions"]] == ["a cat"]
    row = RowDecoder(None, DATA, config).row(encoded(said={"captions": captions[1:]}))
    assert row["outcome"] == "other_language"


def test_sets_of_one_name_keep_all_their_shards(tmp_path: Path) -> None:
    sets = [tmp_path / "laion-2", tmp_path / "a" / "laion", tmp_path / "b" / "laion"]
    for number, folder in enumerate(sets):
        write_shards([sample(number)], str(folder))
    plan = _plan_shards([str(folder) for folder in sets], DATA)
    assert plan.promised == len(plan.shard_index) == 3


def mixed() -> Iterator[Sample]:
    """40 groups by two artists, three bad samples, one leak, one caption too long."""
    yield from map(sample, range(39))
    last = sample(39)
    yield replace(last, captions=(*last.captions, Caption("x" * 1_001, "en")))
    for i in range(40):
        yield sample(i, "twemoji")
    yield replace(sample(1), key="bad-image", image=encoded_image(1)[:300])
    yield replace(sample(2), key="bad-small", image=encoded_image(2, side=8))
    yield replace(sample(3), key="bad-caption", captions=(Caption(" ", "en"),))
    yield replace(held_out(), key="leak", group=training_group())


def held_out() -> Sample:
    return next(s for s in map(sample, range(40)) if split_of(s.group, 0, 0.1, 0.2) == "test")


def training_group() -> str:
    groups = (sample(i).group for i in range(40))
    return next(group for group in groups if split_of(group, 0, 0.1, 0.2) == "train")


@pytest.mark.usefixtures("ray_session")
class TestThroughRay:
    def test_pixels_quarantine_and_report(self, tmp_path: Path) -> None:
        write_shards(mixed(), tmp_path / "set", max_bytes=60_000)
        arguments: dict[str, Any] = {"data": DATA, "config": CONFIG}
        report = preprocess([str(tmp_path / "set")], tmp_path / "a", **arguments)
        assert (report.promised, report.accepted, report.quarantined) == (84, 80, 4)
        rows = pq.read_table(tmp_path / "a" / "pixels")
        assert rows.schema.equals(PIXELS) and len(rows) == 80
        bad = pq.read_table(tmp_path / "a" / "quarantine").to_pylist()
        assert {row["key"]: row["reason"] for row in bad} == {
            "bad-image": "truncated",
            "bad-small": "too_small",
            "bad-caption": "empty_caption",
            "leak": "held_out_twin",
        }
        self.check_row(rows, report.splits, report.split_groups)
        assert report.captions_left_out == {"long_caption": 1}
        saved = json.loads((tmp_path / "a" / "report.json").read_text())
        assert saved["reasons"] == report.reasons and "MapBatches" in saved["stats"]
        preprocess([str(tmp_path / "set")], tmp_path / "b", **arguments)
        assert files(tmp_path / "a") == files(tmp_path / "b"), "the same bytes again"
        assert {p.name for p in tmp_path.iterdir()} == {"set", "a", "b"}, "nothing half done stays"

    @staticmethod
    def check_row(
        rows: pa.Table, splits: dict[str, dict[str, int]], split_groups: dict[str, int]
    ) -> None:
        row = next(row for row in rows.to_pylist() if row["key"] == "noto-007")
        assert len(row["image"]) == 3 * 16 * 16 and row["captions"][1]["text"] == "东西 7"
        by_group: dict[str, set[str]] = {}
        for r in rows.select(["group", "split"]).to_pylist():
            by_group.setdefault(r["group"], set()).add(r["split"])
        assert all(len(found) == 1 for found in by_group.values()), "a group is never parted"
        assert sum(split_groups.values()) == 40
        assert splits["test"]["noto"] == splits["test"]["twemoji"] == split_groups["test"]

    def test_a_damaged_shard_is_named_and_skipped_only_if_allowed(self, tmp_path: Path) -> None:
        manifest = write_shards(mixed(), tmp_path / "set", max_bytes=60_000)
        damaged = tmp_path / "set" / manifest.shards[1].file
        damaged.write_bytes(damaged.read_bytes()[:20_000])
        with pytest.raises(DataError, match=f"{damaged.name} is truncated .*allow_missing_shards"):
            preprocess([str(tmp_path / "set")], tmp_path / "out", data=DATA, config=CONFIG)
        assert not (tmp_path / "out").exists()
        data = DATA.model_copy(update={"allow_missing_shards": True})
        report = preprocess([str(tmp_path / "set")], tmp_path / "out", data=data, config=CONFIG)
        assert report.missing == manifest.shards[1].samples
        assert report.accepted + report.quarantined + report.missing == report.promised == 84
        assert damaged.name in report.damaged_shards[0]

    def test_a_limit_keeps_whole_groups_of_several_sets(self, tmp_path: Path) -> None:
        write_shards(map(sample, range(40)), tmp_path / "a")
        both = [*(sample(i, "twemoji") for i in range(40)), sample(5)]
        write_shards(both, tmp_path / "b", compress=True)
        data = DATA.model_copy(update={"limit": 12})
        sets = [str(tmp_path / "a"), str(tmp_path / "b")]
        report = preprocess(sets, tmp_path / "out", data=data, config=CONFIG)
        assert sum(report.split_groups.values()) == 12 and report.accepted == 24
        assert report.accepted + report.quarantined + report.left_out == report.promised == 81
        assert report.reasons in ({}, {"duplicate_key": 1})

    def test_too_many_bad_samples_leave_the_old_output(self, tmp_path: Path) -> None:
        write_shards(mixed(), tmp_path / "set")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "old").touch()
        config = CONFIG.model_copy(update={"max_bad_fraction": 0.01})
        with pytest.raises(DataError, match=r"3 of 84 samples are bad .*max_bad_fraction=0\.01"):
            preprocess([str(tmp_path / "set")], tmp_path / "out", data=DATA, config=config)
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["old"]
        report = preprocess([str(tmp_path / "set")], tmp_path / "out", data=DATA, config=CONFIG)
        assert "decoded before" in report.stats, "a higher limit redoes nothing"
        assert not (tmp_path / "out" / "old").exists()

    def test_every_malformed_input_has_its_reason_and_the_good_rows_survive(
        self, tmp_path: Path
    ) -> None:
        expected = corpus.write_corpus(tmp_path / "set")
        report = preprocess([str(tmp_path / "set")], tmp_path / "out", data=DATA, config=CONFIG)
        found: dict[str, list[str]] = {}
        for row in pq.read_table(tmp_path / "out" / "quarantine").to_pylist():
            found.setdefault(row["key"], []).append(row["reason"])
        for key in pq.read_table(tmp_path / "out" / "pixels", columns=["key"])["key"].to_pylist():
            found.setdefault(key, []).insert(0, "accepted")
        assert found == expected
        bad = [outcome for outcomes in expected.values() for outcome in outcomes]
        assert sum(outcome != "accepted" for outcome in bad) == report.quarantined > 40
        assert report.accepted + report.quarantined == report.promised == len(bad)

    def test_a_shard_that_holds_another_number_than_promised_fails(self, tmp_path: Path) -> None:
        corpus.write_corpus(tmp_path / "set")
        manifest = read_manifest(str(tmp_path / "set"))
        more = manifest.shards[1].model_copy(update={"samples": manifest.shards[1].samples + 2})
        changed = manifest.model_copy(update={"shards": (manifest.shards[0], more)})
        (tmp_path / "set" / MANIFEST).write_text(changed.model_dump_json())
        with pytest.raises(DataError, match=rf"{more.file}: {more.samples - 2} of {more.samples}"):
            preprocess([str(tmp_path / "set")], tmp_path / "out", data=DATA, config=CONFIG)

    def test_a_signed_shard_that_is_no_tar_is_a_data_error(self, tmp_path: Path) -> None:
        manifest = write_shards(map(sample, range(3)), tmp_path / "set")
        path = tmp_path / "set" / manifest.shards[0].file
        path.write_bytes(b"no tar" * 1000)
        shards = (corpus.sign(path, 3),)
        changed = manifest.model_copy(update={"shards": shards, "digest": dataset_digest(shards)})
        (tmp_path / "set" / MANIFEST).write_text(changed.model_dump_json())
        with pytest.raises(DataError, match=f"{path.name} is no whole tar"):
            preprocess([str(tmp_path / "set")], tmp_path / "out", data=DATA, config=CONFIG)

    def test_tars_of_others_are_read_in_place(self, tmp_path: Path) -> None:
        folder = img2dataset(tmp_path / "tars", shards=3)
        source = WebDatasetSource(folder=folder, source="laion", license="NOASSERTION")
        ingest(source, tmp_path / "set")
        report = preprocess([str(tmp_path / "set")], tmp_path / "out", data=DATA, config=CONFIG)
        assert report.promised == 15 and report.reasons == {"failed_download": 3}
        row = pq.read_table(tmp_path / "out" / "pixels").to_pylist()[0]
        assert (row["key"], row["group"], row["license"]) == (
            "000000000", "http://u/0", "CC-BY-4.0")  # fmt: skip
        assert row["captions"] == [{"text": "thing 0", "language": "en"}]

    def test_what_was_staged_is_not_done_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_shards(mixed(), tmp_path / "set", max_bytes=60_000)
        arguments: dict[str, Any] = {"data": DATA, "config": CONFIG}
        preprocess([str(tmp_path / "set")], tmp_path / "whole", **arguments)

        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "full")

        with monkeypatch.context() as patch, pytest.raises(ResourceError, match="no space"):
            patch.setattr("pipeline.data.preprocess.job.write_tables", full)
            preprocess([str(tmp_path / "set")], tmp_path / "out", **arguments)
        staged = tmp_path / ".out.partial" / "staged"
        kept, broken, *_ = sorted(staged.iterdir())
        times = {path: path.stat().st_mtime_ns for path in kept.iterdir()}
        next(broken.iterdir()).unlink()
        (broken / ".000000000.parquet.new").mkdir()
        (broken / ".000000000.parquet.new" / "000000000.parquet").write_bytes(b"half")
        seen: list[float] = []
        report = preprocess(
            [str(tmp_path / "set")], tmp_path / "out", **arguments,
            on_progress=lambda progress: seen.append(self.check_kept(times, progress.share)),
        )  # fmt: skip
        assert seen and seen[-1] == 1 and report.accepted == 80
        assert files(tmp_path / "out") == files(tmp_path / "whole")
        assert not staged.exists()

    @staticmethod
    def check_kept(times: dict[Path, int], share: float) -> float:
        assert all(path.stat().st_mtime_ns == time for path, time in times.items())
        return share


def test_no_shard_set_or_one_named_twice_is_refused(tmp_path: Path) -> None:
    for sets, said in (([], "data.shards names them"), (["asset:emoji"] * 2, "named twice")):
        with pytest.raises(DataError, match=said):
            preprocess(sets, tmp_path / "out", data=DATA, config=CONFIG)
