"""Data sets as they lie around: each oddity costs what is odd, and is told."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layouts import picture, put, tar
from pyarrow.fs import LocalFileSystem
from test_sources import MINE, by_key, indexed, lost, texts

from pipeline.contracts import Caption, LeftOut, Source
from pipeline.data.preprocess.reader import ShardFile, _PartReader
from pipeline.data.shards.records import plain_key, read_captions
from pipeline.data.shards.tally import settled
from pipeline.data.shards.tars import read_samples
from pipeline.data.shards.writer import write_shards
from pipeline.data.sources.coco import CocoSource
from pipeline.data.sources.folder import FolderSource
from pipeline.data.sources.parquet import ParquetSource
from pipeline.data.sources.unlabelled import UnlabelledSource
from pipeline.data.sources.webdataset import WebDatasetSource
from pipeline.errors import DataError

N = 4


def first_texts(source: Source) -> list[str]:
    """The first caption of every sample, sorted."""
    return sorted(sample.captions[0].text for sample in by_key(source).values())


THINGS = [f"thing {i}" for i in range(N)]


# ---- Captions of any form ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (" a cat ", [("a cat", "en")]),
        (["a cat", None, ""], [("a cat", "en")]),
        ({"text": "chat", "language": "fr"}, [("chat", "fr")]),
        ({"en": "a cat", "zh_TW": "貓", "de": None}, [("a cat", "en"), ("貓", "zh-TW")]),
        ([{"raw": "a cat", "tokens": ["cat"], "sentid": 7}], [("a cat", "en")]),
        ({"raw": ["one", "two"], "imgid": 3}, [("one", "en"), ("two", "en")]),
        (None, []),
        (float("nan"), []),
        ({}, []),
    ],
)
def test_captions_of_any_form(value: Any, found: list[tuple[str, str]]) -> None:
    read = list(read_captions(value, "en", "caption"))
    assert read == [Caption(*pair) for pair in found]


@pytest.mark.parametrize(
    ("value", "said"),
    [(3, "caption holds 3"), ({"id": 5, "url": "x"}, "caption holds id, url"), ([b"x"], "b'x'")],
)
def test_what_is_no_caption_is_told(value: Any, said: str) -> None:
    (left_out,) = read_captions(value, "en", "caption")
    assert isinstance(left_out, LeftOut) and said in left_out.example


# ---- Parquet -------------------------------------------------------------------------------------


HF = pa.schema(
    [
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("text", pa.string()),
    ]
)


def parquet(folder: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / "train-00000.parquet")
    return str(folder)


@pytest.mark.parametrize(
    "cell",
    [
        lambda i: {"bytes": None, "path": f"images/{i}.png"},
        lambda i: {"bytes": picture(i), "path": None},
        lambda i: f"images/{i}.png",
        lambda i: f"images\\{i}.png",
        lambda i: picture(i),
        lambda i: [picture(i)],
    ],
)
def test_the_image_column_in_every_form(tmp_path: Path, cell: Callable[[int], Any]) -> None:
    put(tmp_path / "images", {f"{i}.png": picture(i) for i in range(N)})
    folder = parquet(tmp_path, [{"image": cell(i), "text": f"thing {i}"} for i in range(N)])
    for table in (folder, f"{folder}/train-00000.parquet"):
        found = list(by_key(ParquetSource(table=table, **MINE)).values())
        assert [sample.image for sample in found] == [picture(i) for i in range(N)]


@pytest.mark.parametrize(
    ("cell", "reason", "example"),
    [
        ("https://example.org/1.png", "url", "row 0 names https://example.org/1.png"),
        ("../up.png", "outside_folder", "row 0 names ../up.png"),
        ("/etc/passwd", "outside_folder", "row 0 names /etc/passwd"),
        ("gone.png", "no_picture", "row 0 names gone.png, which is not there"),
        ({"bytes": None, "path": None}, "no_picture", "image holds bytes, path without"),
        ([picture(1), picture(2)], "several_pictures", "image holds a list of 2"),
        (b"<html>", "undecodable", "begins with b'<html>'"),
        (7, "no_picture", "image holds 7"),
    ],
)
def test_a_cell_without_an_image_is_refused_by_name(
    tmp_path: Path, cell: Any, reason: str, example: str
) -> None:
    put(tmp_path, {"up.png": picture(9)})
    folder = parquet(tmp_path / "set", [{"image": cell, "text": "x"}])
    source = ParquetSource(table=folder, **MINE)
    found = lost(source)
    assert list(found) == [reason] and example in found[reason]
    with pytest.raises(DataError, match=f"no picture can be used: {reason} 1"):
        write_shards(settled(source), tmp_path / "out")


def test_caption_columns_of_another_name_or_form(tmp_path: Path) -> None:
    rows = [
        {"image": picture(i), "prompt": f"thing {i}", "meta": {"alt": f"a {i}"}} for i in range(N)
    ]
    folder = parquet(tmp_path, rows)
    with pytest.raises(DataError, match=r"image \(binary\), prompt \(string\), .*--caption"):
        list(ParquetSource(table=folder, **MINE).samples())
    assert first_texts(ParquetSource(table=folder, captions=("prompt",), **MINE)) == THINGS
    (one, *_) = by_key(ParquetSource(table=folder, captions=("meta.alt:de",), **MINE)).values()
    assert texts(one) == [("a 0", "de")]
    languages = [{"image": picture(1), "caption": {"en": "thing", "zh": "东西"}}]
    (one,) = by_key(ParquetSource(table=parquet(tmp_path / "b", languages), **MINE)).values()
    assert texts(one) == [("thing", "en"), ("东西", "zh")]


def test_a_row_that_is_not_utf_8_costs_itself(tmp_path: Path) -> None:
    texts = pa.array([b"thing 0", b"\xff\xfe", b"thing 2"], pa.binary())
    broken = pa.Array.from_buffers(pa.string(), 3, texts.buffers())
    images = pa.array([picture(i) for i in range(3)])
    pq.write_table(pa.table({"image": images, "text": broken}), tmp_path / "a.parquet")
    source = ParquetSource(table=str(tmp_path), **MINE)
    assert first_texts(source) == ["thing 0", "thing 2"]
    assert lost(source) == {"bad_utf8": "a.parquet, row 1"}


# ---- Folders -------------------------------------------------------------------------------------


def split(folder: Path, name: str, said: str) -> None:
    """A folder of N images and a metadata.jsonl that names them as `said`."""
    rows = [{"file_name": said.format(i), "text": f"thing {i}"} for i in range(N)]
    put(folder / name, {f"{i}.png": picture(i) for i in range(N)})
    put(folder / name, {"metadata.jsonl": "\n".join(map(json.dumps, rows))})


@pytest.mark.parametrize("said", ["{}.png", "train/{}.png", "./train/{}.png", "a/train/{}.png"])
def test_names_with_or_without_the_folder(tmp_path: Path, said: str) -> None:
    split(tmp_path / "a", "train", said)
    for folder in (tmp_path / "a" / "train", tmp_path / "a", tmp_path):
        assert first_texts(FolderSource(folder=str(folder), **MINE)) == THINGS
    absolute = tmp_path / "b"
    split(absolute, "train", f"{absolute}/train/{{}}.png")
    assert first_texts(FolderSource(folder=str(absolute / "train"), **MINE)) == THINGS


def test_every_folder_has_its_own_table(tmp_path: Path) -> None:
    split(tmp_path, "train", "{}.png")
    split(tmp_path, "deep/validation", "{}.png")
    put(tmp_path, {"extra.png": picture(9), "extra.txt": "more"})
    source = FolderSource(folder=str(tmp_path), **MINE)
    assert first_texts(source) == ["more", *sorted(THINGS + THINGS)] and lost(source) == {}
    put(tmp_path / "train", {"captions.csv": "file,text\n"})
    with pytest.raises(DataError, match=r"train has several tables, train/captions\.csv, train/me"):
        list(source.samples())


def test_caption_files_of_kohya(tmp_path: Path) -> None:
    files = {f"{i}.png": picture(i) for i in range(N)}
    captions = {f"{i}.caption": f"thing {i}" for i in range(N)}
    source = FolderSource(folder=put(tmp_path, files | captions), **MINE)
    assert first_texts(source) == THINGS and lost(source) == {}


@pytest.mark.parametrize(
    ("table", "encoding"),
    [
        (b"file_name,text\r\n0.png,caf\xe9\r\n", "cp1252"),
        ("file_name,text\n0.png,café\n".encode("utf-16"), None),
        ("\ufefffile_name;text\n0.png;café\n".encode(), None),
        ("file_name\ttext\n0.png\tcafé\n".encode(), None),
        ("image,prompt\n0.png,café\n".encode("gbk"), "gbk"),
    ],
)
def test_a_csv_as_others_write_it(tmp_path: Path, table: bytes, encoding: str | None) -> None:
    folder = put(tmp_path, {"0.png": picture(0), "metadata.csv": table})
    captions = ("prompt",) if b"prompt" in table else ()
    source = FolderSource(folder=folder, encoding=encoding, captions=captions, **MINE)
    assert first_texts(source) == ["café"]


def test_a_bad_row_costs_itself(tmp_path: Path) -> None:
    images = {f"{i}.png": picture(i) for i in range(N)}
    rows = "file_name,text\n0.png,a red, juicy apple\n1.png,thing 1\n,nameless\n2.png,caf\udce9\n"
    csv = {"metadata.csv": rows.encode("utf-8", "surrogateescape")}
    source = FolderSource(folder=put(tmp_path, images | csv), **MINE)
    assert [texts(sample) for sample in by_key(source).values()] == [
        [], [("thing 1", "en")], [], [],
    ]  # fmt: skip
    assert lost(source) == {
        "no_picture": "metadata.csv, row 3 names no file",
        "no_caption": "0",
        "bad_utf8": "metadata.csv, row 4 cannot be decoded",
        "too_many_fields": "metadata.csv, row 1 has 3 fields and the header 2",
    }
    put(tmp_path, {"metadata.csv": "file_name,text\n0.png,a red, juicy apple\n"})
    with pytest.raises(DataError, match=r"row 1 has 3 fields and the header 2.*Put captions with"):
        write_shards(settled(source), tmp_path / "out")
    lines = ['{"file": "0.png", "text": "zero"}', "{", "[]", '{"file": "1.png", "text": 7}']
    (tmp_path / "metadata.csv").unlink()
    put(tmp_path, {"metadata.jsonl": "\n".join(lines)})
    found = lost(source)
    assert found["bad_json"].startswith("metadata.jsonl, row 2 is not JSON")
    assert found["bad_caption"] == "1.png: text holds 7"


def test_columns_of_a_table_can_be_named(tmp_path: Path) -> None:
    put(tmp_path, {f"{i}.png": picture(i) for i in range(N)})
    rows = "".join(f"{i},{i}.png,thing {i},Ding {i}\n" for i in range(N))
    folder = put(tmp_path, {"metadata.csv": f"id,photo,prompt,prompt_de\n{rows}"})
    with pytest.raises(DataError, match=r"id, photo, prompt, prompt_de; none names .* --image"):
        list(FolderSource(folder=folder, **MINE).samples())
    named = {"image": "photo", "captions": ("prompt", "prompt_de:de")}
    found = by_key(FolderSource(folder=folder, **named, **MINE))
    assert texts(found["1"]) == [("thing 1", "en"), ("Ding 1", "de")]
    with pytest.raises(DataError, match=r"encoding.*unknown encoding: klingon; try utf-8"):
        FolderSource(folder=folder, encoding="klingon", **MINE)
    with pytest.raises(DataError, match="not a text encoding"):
        FolderSource(folder=folder, encoding="zlib", **MINE)


def test_links_out_of_the_folder_are_not_read(tmp_path: Path) -> None:
    outside = Path(put(tmp_path / "outside", {"secret.png": picture(5), "secret.txt": "secret"}))
    folder = Path(put(tmp_path / "set", {"in/a.png": picture(1), "in/a.txt": "thing"}))
    for name in ("secret.png", "secret.txt"):
        (folder / name).symlink_to(outside / name)
    (folder / "more").symlink_to(outside, target_is_directory=True)
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "b.png").symlink_to(folder / "in" / "a.png")
    (folder / "broken.png").symlink_to("nowhere")
    source = FolderSource(folder=str(folder), **MINE)
    assert set(by_key(source)) == {"in-a-" + key[-8:] for key in by_key(source) if "in-" in key} | {
        "b"
    }
    assert first_texts(FolderSource(folder=str(folder / "in"), **MINE)) == ["thing"]
    left_out = [x for x in source.samples() if isinstance(x, LeftOut)]
    assert sorted((x.of, x.reason, x.example.partition(" ")[0]) for x in left_out) == [
        ("file", "link", "more"),
        ("file", "link", "secret.txt"),
        ("image", "link", "broken.png"),
        ("image", "link", "secret.png"),
    ]
    followed = by_key(FolderSource(folder=str(folder), follow_links=True, **MINE))
    assert sorted(sample.captions[0].text for sample in followed.values() if sample.captions) == [
        "secret", "secret", "thing",
    ]  # fmt: skip


def test_a_file_whose_name_is_not_utf_8_or_format_not_read_is_told(tmp_path: Path) -> None:
    put(tmp_path, {"a.png": picture(1), "b.gif": b"GIF89a"})
    Path(os.fsdecode(bytes(tmp_path) + b"/\xff.png")).write_bytes(picture(2))
    found = lost(UnlabelledSource(folder=str(tmp_path), license="MIT"))
    assert found == {"bad_name": "?.png", "other_format": "b.gif"}


# ---- WebDataset ----------------------------------------------------------------------------------


def pairs(*keys: str) -> list[tuple[str, bytes | str]]:
    """A picture and a caption per key."""
    return [
        member
        for i, key in enumerate(keys)
        for member in ((f"{key}.png", picture(i)), (f"{key}.txt", f"thing {i}"))
    ]


def read_both_ways(folder: Path, **settings: Any) -> list[str]:
    """The first caption of every sample, sorted: read in place as preprocessing does, and copied;
    both are the same, with the same keys but for characters."""
    source = WebDatasetSource(folder=str(folder), **settings, **MINE)
    manifest = source.index(str(folder / "set"))
    assert manifest is not None and manifest.in_place is not None
    found = {}
    for shard in manifest.shards:
        file = ShardFile("x", str(folder / shard.file), shard.samples, manifest.in_place,
                         shard.prefix)  # fmt: skip
        read = _PartReader(LocalFileSystem(), {}, lambda _: pa.table({}))._read
        for sample in read(file, 0, shard.samples):
            if sample["problem"] is None and sample["image"] and sample["record"]:
                captions = json.loads(sample["record"])["captions"]
                found[sample["key"]] = captions[0]["text"] if captions else ""
    copied = by_key(source).values()
    assert {plain_key(key) for key in found} == {sample.key for sample in copied}
    assert manifest.groups == len({sample.group for sample in copied})
    return sorted(filter(None, found.values()))


def test_keys_that_start_again_in_every_tar(tmp_path: Path) -> None:
    for name in ("00000", "00001", "deep/00000"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        tar(tmp_path / f"{name}.tar", pairs("000000", "000001"))
    assert read_both_ways(tmp_path) == ["thing 0"] * 3 + ["thing 1"] * 3
    source = WebDatasetSource(folder=str(tmp_path), **MINE)
    assert lost(source) == {}
    first = indexed(str(tmp_path), tmp_path / "set")
    assert [shard.repeats_keys for shard in first.shards] == [False, True, True]
    assert first.groups == first.used == 6
    tar(tmp_path / "zzz.tar", pairs("000000", "000009"))
    more = indexed(str(tmp_path), tmp_path / "set")
    assert more.shards[:3] == first.shards, "a tar more changes no key of those before"


@pytest.mark.parametrize(
    ("members", "captions"),
    [
        (pairs(*(f"photo_v1.{i}" for i in range(N))), THINGS),
        (pairs(*(f"2024-01-0{i}T10.30.0{i}" for i in range(N))), THINGS),
        (pairs(*(f"John.{name}.final" for name in ("Doe", "Smith", "de", "Zed"))), THINGS),
        (pairs("cat", "cat.2", "cat.10"), THINGS[:3]),
        ([("a.jpg", picture(1, "JPEG")), ("a.seg.png", picture(2)), ("a.txt", "one")], ["one"]),
        ([("a.depth.png", picture(1)), ("a.jpg", picture(2, "JPEG")), ("a.txt", "two")], ["two"]),
        ([("a.photo.png", picture(1)), ("a.txt", "one")], ["one"]),
        ([("a.png", picture(1)), ("a.zh.txt", "一")], ["一"]),
        ([("v.1.png", picture(1)), ("v.1.txt", "one"), ("v.1.zh.txt", "一"),
          ("v.2.png", picture(2)), ("v.2.zh.txt", "二")], ["one", "二"]),
        ([("a.png", picture(1)), ("a.caption", "one")], ["one"]),
        ([("a.PNG", picture(1)), ("a.JSON", '{"caption": {"en": "one"}}')], ["one"]),
    ],
)  # fmt: skip
def test_names_with_dots(
    tmp_path: Path, members: list[tuple[str, bytes | str]], captions: list[str]
) -> None:
    tar(tmp_path / "0.tar", members)
    assert read_both_ways(tmp_path) == captions


PARTS = st.sampled_from(("a", "b", "0", "zh", "seg"))
NAMES = st.lists(
    st.tuples(st.lists(PARTS, min_size=1, max_size=3), st.sampled_from(("png", "jpg", "txt", "x"))),
    unique_by=lambda name: (tuple(name[0]), name[1]), max_size=12,
)  # fmt: skip


@given(NAMES)
def test_every_member_is_in_one_sample_whatever_the_names(
    names: list[tuple[list[str], str]],
) -> None:
    members = [".".join((*parts, extension)) for parts, extension in names]
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as out:
        for name in members:
            info = tarfile.TarInfo(name)
            info.size = len(name)
            out.addfile(info, io.BytesIO(name.encode()))
    stream.seek(0)
    found = [
        (f"{sample.key}.{extension}", content)
        for sample in read_samples(stream)
        for extension, content in sample.files.items()
    ]
    assert sorted(name for name, _ in found) == sorted(members)
    assert all(content in (b"", name.encode()) for name, content in found)


def test_members_that_are_image_and_caption_can_be_named(tmp_path: Path) -> None:
    said = json.dumps({"prompt": "a drawing", "license": "MIT"})
    members: list[tuple[str, bytes | str]] = []
    for i in range(2):
        members += [(f"{i}.input.png", picture(i)), (f"{i}.target.png", picture(9 - i)),
                    (f"{i}.cls", f"class {i}"), (f"{i}.json", said)]  # fmt: skip
    tar(tmp_path / "0.tar", members)
    source = WebDatasetSource(folder=str(tmp_path), **MINE)
    with pytest.raises(
        DataError, match=r"0\.tar: 0 has cls, json, input\.png, target\.png.*--image"
    ):
        source.index(str(tmp_path / "set"))
    named = {"image": "target.png", "captions": ("cls", "json.prompt:en-GB")}
    assert read_both_ways(tmp_path, **named) == ["class 0", "class 1"]
    source = WebDatasetSource(folder=str(tmp_path), **named, **MINE)
    (one, _) = by_key(source).values()
    assert one.image == picture(9) and one.license == "MIT"
    assert texts(one) == [("class 0", "en"), ("a drawing", "en-GB")]
    assert lost(source) == {"not_read": "0.tar: 0.input.png"}


def test_a_manifest_says_only_what_is_not_usual(tmp_path: Path) -> None:
    tar(tmp_path / "0.tar", pairs("a", "b"))
    manifest = indexed(str(tmp_path), tmp_path / "set")
    assert "members" not in manifest.model_dump_json()
    assert "repeats_keys" not in manifest.model_dump_json()


# ---- COCO ----------------------------------------------------------------------------------------

IMAGES = [{"id": i, "file_name": f"{i}.jpg"} for i in range(N)]
NOTES = [{"id": i, "image_id": i, "caption": f"thing {i}"} for i in range(N)]


@pytest.mark.parametrize(
    ("images", "notes", "more", "reasons"),
    [
        (IMAGES, [*NOTES, {"id": 9, "image_id": 1, "caption": None}], {}, ["bad_caption"]),
        (IMAGES, [{k: v for k, v in x.items() if k != "id"} for x in NOTES], {}, []),
        (IMAGES, [{**x, "image_id": str(x["image_id"])} for x in NOTES], {}, []),
        (IMAGES, NOTES, {"licenses": [{"id": 1, "name": "ours", "url": None}]}, []),
        (IMAGES, NOTES, {"licenses": None, "info": None}, []),
        (IMAGES, [*NOTES, {"id": 9, "image_id": 1, "bbox": [0, 0, 1, 1]}], {}, ["bad_caption"]),
        (IMAGES, [*NOTES, "note", {"id": 9, "image_id": 77, "caption": "x"}], {},
         ["bad_caption", "bad_entry"]),
        ([*IMAGES, {"id": 8}, None], NOTES, {}, ["bad_entry"]),
        ([{**x, "file_name": f"im/{x['file_name']}"} for x in IMAGES], NOTES, {}, []),
        ([*IMAGES, {"id": 8, "file_name": "../../etc/passwd"}], NOTES, {}, ["outside_folder"]),
        ([*IMAGES, {"id": 8, "file_name": "3.jpg"}],
         [*NOTES, {"id": 9, "image_id": 8, "caption": "again"}], {}, []),
    ],
)  # fmt: skip
def test_coco_oddities(
    tmp_path: Path, images: list[Any], notes: list[Any], more: dict[str, Any], reasons: list[str]
) -> None:
    folder = put(tmp_path / "im", {f"{i}.jpg": picture(i, "JPEG") for i in range(N)})
    content = json.dumps({"images": images, "annotations": notes, **more})
    annotations = put(tmp_path, {"captions.json": content}) + "/captions.json"
    source = CocoSource(annotations=annotations, images=folder)
    found = by_key(source)
    said = {text for sample in found.values() for text, _ in texts(sample)}
    assert len(found) == N and said - {"again"} == set(THINGS)
    assert sorted(lost(source)) == reasons


def test_a_coco_file_of_boxes_says_what_it_holds(tmp_path: Path) -> None:
    folder = put(tmp_path / "im", {"0.jpg": picture(0, "JPEG")})
    notes = [{"id": 9, "image_id": 0, "bbox": [0, 0, 1, 1], "category_id": 1}]
    content = json.dumps({"images": IMAGES[:1], "annotations": notes})
    annotations = put(tmp_path, {"instances.json": content}) + "/instances.json"
    with pytest.raises(DataError, match=r"no_caption 1 .*annotation 9 has id, image_id, bbox"):
        write_shards(settled(CocoSource(annotations=annotations, images=folder)), tmp_path / "out")
