"""Shards to pixels: every sample accounted for, by unit and through Ray Data."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.accounting import check_counts, check_fraction, quarantine_table, settle
from pipeline.config import DataConfig, PreprocessConfig
from pipeline.contracts import Caption, Sample
from pipeline.decoding import PIXELS, Decoder
from pipeline.errors import DataError
from pipeline.preprocess import preprocess
from pipeline.shard_writer import write_shards
from pipeline.shards import MANIFEST, dataset_digest, read_manifest
from pipeline.splits import split_of

DATA = DataConfig(validation_fraction=0.1, test_fraction=0.2)
CONFIG = PreprocessConfig(image_size=16, max_bad_fraction=1.0)


def picture(seed: int, side: int = 24) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "WEBP", lossless=True)
    return stream.getvalue()


def sample(i: int, style: str = "noto") -> Sample:
    return Sample(
        key=f"{style}-{i:03d}",
        image=picture(i + (0 if style == "noto" else 1000)),
        extension="webp",
        captions=(Caption(f"thing {i}", "en"), Caption(f"东西 {i}", "zh")),
        group=f"g{i:03d}",
        style=style,
        source="test@1",
        license="MIT",
        attribution="nobody",
    )


def encoded(**changes: object) -> dict[str, object]:
    """A sample as Ray Data's reader hands it over."""
    record = {
        "captions": [{"text": "apple", "language": "en"}],
        "group": "g",
        "style": "noto",
        "source": "s",
        "license": "MIT",
        "attribution": "a",
    }
    row = {"__key__": "k", "__url__": "/set/0.tar", "webp": picture(0)}
    row |= {"json": json.dumps(record | changes.pop("record", {})).encode()}  # type: ignore[arg-type]
    return row | changes


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
        (encoded(webp=None, png=picture(1)), "accepted"),
        (encoded(webp=float("nan")), "no_picture"),
        (encoded(webp=b"GIF89a and so on"), "undecodable"),
        (encoded(json=None), "bad_json"),
        (encoded(json=b"[1]"), "bad_json"),
        (encoded(json=b"{" * 100_000), "bad_json"),
        (encoded(json=b'{"group": "\xff"}'), "bad_utf8"),
        (encoded(record={"style": "\ud800"}), "bad_utf8"),
        (encoded(record={"license": None}), "bad_json"),
        (encoded(record={"captions": []}), "empty_caption"),
        (encoded(record={"captions": [{"text": "x" * 2000, "language": "en"}]}), "long_caption"),
        (encoded(record={"group": "other"}), "left_out"),
    ],
)
def test_one_row_never_raises(row: dict[str, object], outcome: str) -> None:
    decoder = Decoder({"/set/0.tar": "set/0.tar"}, frozenset({"g"}), DATA, CONFIG)
    found = decoder.row(row)
    assert (found["outcome"], found["key"], found["shard"]) == (outcome, "k", "set/0.tar")
    assert ("image" in found) == (outcome == "accepted")


def table(*rows: tuple[str, str, str, bytes]) -> pa.Table:
    """Rows of (key, shard, split, digest), accepted."""
    keys, shards, splits, digests = zip(*rows, strict=True)
    return pa.table(
        {
            "key": list(keys),
            "shard": list(shards),
            "split": list(splits),
            "digest": list(digests),
            "outcome": ["accepted"] * len(rows),
        }
    )


def test_the_first_of_equal_keys_stays() -> None:
    rows = table(("k", "b", "train", b"1"), ("k", "a", "train", b"2"), ("j", "b", "test", b"3"))
    found = quarantine_table(settle(rows, {"a": 0, "b": 1})).to_pylist()
    assert found == [{"shard": "b", "key": "k", "reason": "duplicate_key"}]


def test_a_training_picture_equal_to_a_held_out_one_goes() -> None:
    rows = table(
        ("a", "s", "train", b"1"),
        ("b", "s", "test", b"1"),
        ("c", "s", "validation", b"1"),
        ("d", "s", "train", b"2"),
        ("e", "s", "train", b"2"),
    )
    found = quarantine_table(settle(rows, {"s": 0})).to_pylist()
    assert found == [{"shard": "s", "key": "a", "reason": "held_out_twin"}]


def test_counts_and_fractions_are_enforced() -> None:
    rows = table(("a", "s", "train", b"1"))
    check_counts(rows, {"s": 1})
    with pytest.raises(DataError, match=r"s: 1 of 2; .*write the set again"):
        check_counts(rows, {"s": 2})
    bad = pa.table({"reason": ["bomb", "bomb", "bad_json"]})
    check_fraction(bad, 10, 0.3)
    with pytest.raises(DataError, match=r"3 of 10 .*bomb 2, bad_json 1.*max_bad_fraction=0\.2"):
        check_fraction(bad, 10, 0.2)


def mixed() -> Iterator[Sample]:
    """40 groups by two artists, three bad samples, one leak."""
    yield from map(sample, range(40))
    for i in range(40):
        yield sample(i, "twemoji")
    yield replace(sample(1), key="bad-picture", image=picture(1)[:300])
    yield replace(sample(2), key="bad-small", image=picture(2, side=8))
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
        arguments = {"data": DATA, "config": CONFIG}
        report = preprocess([str(tmp_path / "set")], tmp_path / "a", **arguments)
        assert (report.promised, report.accepted, report.quarantined) == (84, 80, 4)
        rows = pq.read_table(tmp_path / "a" / "pixels")
        assert rows.schema.equals(PIXELS) and len(rows) == 80
        bad = pq.read_table(tmp_path / "a" / "quarantine").to_pylist()
        assert {row["key"]: row["reason"] for row in bad} == {
            "bad-picture": "truncated",
            "bad-small": "too_small",
            "bad-caption": "empty_caption",
            "leak": "held_out_twin",
        }
        self.check_row(rows, report.splits, report.split_groups)
        saved = json.loads((tmp_path / "a" / "report.json").read_text())
        assert saved["reasons"] == report.reasons and "ReadWebDataset" in saved["stats"]
        preprocess([str(tmp_path / "set")], tmp_path / "b", **arguments)
        assert files(tmp_path / "a") == files(tmp_path / "b"), "the same bytes again"
        assert {p.name for p in tmp_path.iterdir()} == {"set", "a", "b"}, "nothing half done stays"

    @staticmethod
    def check_row(rows: pa.Table, splits: dict, split_groups: dict) -> None:
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
        with pytest.raises(DataError, match=r"4 of 84 samples are bad .*max_bad_fraction=0\.01"):
            preprocess([str(tmp_path / "set")], tmp_path / "out", data=DATA, config=config)
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["old"]

    def test_a_tar_that_is_no_webdataset_is_a_data_error(self, tmp_path: Path) -> None:
        manifest = write_shards(map(sample, range(3)), tmp_path / "set")
        path = tmp_path / "set" / manifest.shards[0].file
        with tarfile.open(path, "w") as tar:
            for _ in range(2):
                tar.addfile(tarfile.TarInfo("twice.json"), io.BytesIO())
        self.sign(tmp_path / "set", path)
        with pytest.raises(DataError, match="no valid WebDataset tar"):
            preprocess([str(tmp_path / "set")], tmp_path / "out", data=DATA, config=CONFIG)

    @staticmethod
    def sign(folder: Path, path: Path) -> None:
        """Make the manifest agree with altered bytes."""
        manifest = read_manifest(str(folder))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        changes = {"sha256": digest, "bytes": path.stat().st_size}
        shards = (manifest.shards[0].model_copy(update=changes),)
        changed = manifest.model_copy(update={"shards": shards, "digest": dataset_digest(shards)})
        (folder / MANIFEST).write_text(changed.model_dump_json())


def test_no_shard_set_or_one_named_twice_is_refused(tmp_path: Path) -> None:
    for sets, said in (([], "data.shards names them"), (["asset:emoji"] * 2, "named twice")):
        with pytest.raises(DataError, match=said):
            preprocess(sets, tmp_path / "out", data=DATA, config=CONFIG)
