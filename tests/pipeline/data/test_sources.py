"""Every source yields the same Sample, loses nothing without a word, and reads S3 like a folder."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from layouts import coco, img2dataset, picture, put, tar

from pipeline.contracts import Caption, Sample, Source
from pipeline.data.shards.captions import BadCaption
from pipeline.data.shards.manifest import Manifest, read_manifest, verify
from pipeline.data.shards.records import Credits, canonical, captions_in, plain_key, record_of
from pipeline.data.shards.tally import Tally, settled
from pipeline.data.shards.tars import read_samples
from pipeline.data.shards.writer import write_index, write_shards
from pipeline.data.sources.coco import CocoSource, spdx
from pipeline.data.sources.folder import FolderSource
from pipeline.data.sources.parquet import ParquetSource
from pipeline.data.sources.unlabelled import UnlabelledSource
from pipeline.data.sources.webdataset import WebDatasetSource
from pipeline.errors import DataError

CREDITS = Credits(style="photo", source="test@1", license="CC0-1.0", attribution="me")
MINE = CREDITS.model_dump()


def by_key(source: Source) -> dict[str, Sample]:
    found = [outcome for outcome in source.samples() if isinstance(outcome, Sample)]
    assert len({sample.key for sample in found}) == len(found)
    return {sample.key: sample for sample in found}


def lost(source: Source) -> dict[str, str]:
    """By reason, the first example of what the source and the ingest leave out."""
    tally = Tally()
    for outcome in settled(source):
        tally.add(outcome)
    return {loss.reason: loss.example for loss in tally.losses()}


def indexed(tars: str, output: Path, **changes: str) -> Manifest:
    manifest = WebDatasetSource(folder=tars, **MINE | changes).index(str(output))
    assert manifest is not None
    return manifest


def texts(sample: Sample) -> list[tuple[str, str]]:
    return [(caption.text, caption.language) for caption in sample.captions]


def test_a_folder_with_text_files(tmp_path: Path) -> None:
    folder = put(
        tmp_path,
        {
            "a.png": picture(1),
            "a.txt": "a longer caption\nshort\n\n",
            "a.zh.txt": "苹果",
            "cats/b 1.JPG": picture(2, "JPEG"),
            "cats/b 1.txt": b"caf\xe9",
            "c.webp": picture(3, "WEBP"),
            "notes.md": "no picture",
            ".hidden.png": b"",
        },
    )
    found = by_key(FolderSource(folder=folder, **MINE))
    assert len(found) == 3 and found["a"].image == picture(1)
    assert texts(found["a"]) == [("short", "en"), ("a longer caption", "en"), ("苹果", "zh")]
    assert (found["a"].license, found["a"].attribution, found["a"].group) == ("CC0-1.0", "me", "a")
    (cat,) = (sample for key, sample in found.items() if key.startswith("cats-b-1-"))
    assert cat.extension == "jpg" and cat.captions == ()
    assert lost(FolderSource(folder=folder, **MINE)) == {
        "no_caption": "c",
        "bad_utf8": "cats/b 1.JPG: cats/b 1.txt",
        "not_read": "notes.md",
    }
    read = by_key(FolderSource(folder=folder, encoding="cp1252", **MINE))
    assert texts(read[cat.key]) == [("café", "en")]


TABLE = [
    {"file_name": "a.png", "text": "one", "caption_zh": "一", "license": "MIT", "author": "Ann"},
    {"file_name": "./b.png", "text": ["two", "ii"], "group": 7},
    {"file_name": "gone.png", "text": "three"},
]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_a_folder_with_a_table(tmp_path: Path, kind: str) -> None:
    folder = put(tmp_path, {name: picture(i) for i, name in enumerate(("a.png", "b.png", "c.png"))})
    name = f"{'metadata' if kind == 'parquet' else 'captions'}.{kind}"
    if kind == "jsonl":
        put(tmp_path, {"captions.jsonl": "\n".join(map(json.dumps, TABLE))})
    elif kind == "parquet":
        rows = [{**row, "text": [row["text"]] if isinstance(row["text"], str) else row["text"]}
                for row in TABLE]  # fmt: skip
        pq.write_table(pa.Table.from_pylist(
            [{**dict.fromkeys(("caption_zh", "license", "author", "group")), **row} for row in rows]
        ), tmp_path / "metadata.parquet")  # fmt: skip
    else:
        head = "file_name,text,caption_zh,license,author,group"
        rest = ["a.png,one,一,MIT,Ann,", "./b.png,two,,,,7", "b.png,ii,,,,7", "gone.png,three,,,,"]
        lines = [head, *rest]
        put(tmp_path, {"captions.csv": "\ufeff" + "\r\n".join(lines)})
    found = by_key(FolderSource(folder=folder, **MINE))
    assert sorted(texts(found["a"])) == [("one", "en"), ("一", "zh")]
    assert (found["a"].license, found["a"].attribution) == ("MIT", "Ann")
    assert sorted(texts(found["b"])) == [("ii", "en"), ("two", "en")]
    assert (found["b"].group, found["b"].license) == ("7", "CC0-1.0")
    assert lost(FolderSource(folder=folder, **MINE)) == {
        "no_caption": "c",
        "no_picture": f"{name}, row {4 if kind == 'csv' else 3} names gone.png, which is not there",
    }


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "holds no .png"),
        ({"a.gif": b"GIF89a"}, "holds no .png"),
        ({"a.png": b""}, r"neither \.txt nor \.caption files .* it has {'\.png': 1}"),
        ({"a.png": b"", "captions.csv": "picture,text\na.png,x"}, "picture, text; .* --image"),
        ({"a.png": b"", "captions.csv": "file,prompt\na.png,x"}, "file, prompt; .* --caption"),
        ({"a.png": b"", "captions.jsonl": '{"file": "a.png"\n'}, "row 1 is not JSON"),
        ({"a.png": b"", "captions.parquet": b"no"}, "cannot be read"),
        ({"a.png": b"", "captions.csv": "", "metadata.csv": ""}, "several tables"),
    ],
)
def test_a_folder_that_is_none_says_why(tmp_path: Path, files: dict, said: str) -> None:
    with pytest.raises(DataError, match=said):
        write_shards(settled(FolderSource(folder=put(tmp_path, files), **MINE)), tmp_path / "out")
    with pytest.raises(DataError, match="no folder"):
        list(FolderSource(folder=str(tmp_path / "nowhere"), **MINE).samples())


def test_pictures_alone(tmp_path: Path) -> None:
    folder = put(tmp_path, {"x/a.png": picture(1), "x/a.jpg": picture(2, "JPEG"), "b.png": b"?"})
    found = by_key(UnlabelledSource(folder=folder, **CREDITS.model_dump(exclude={"language"})))
    assert len(found) == 3 and all(sample.captions == () for sample in found.values())


def test_coco(tmp_path: Path) -> None:
    annotations, images = coco(tmp_path)
    found = by_key(CocoSource(annotations=annotations, images=images, **MINE))
    assert list(found) == ["000000000009", "000000000025"]
    dog, cat = found.values()
    assert len(dog.captions) == 5 and dog.captions[0] == Caption("A dog.", "en")
    assert (dog.license, dog.attribution) == ("CC-BY-NC-SA-2.0", "http://f/9")
    assert (cat.license, texts(cat)) == ("No known restrictions", [("A cat.", "en")])
    assert spdx({"id": 3}) == "NOASSERTION"
    assert lost(CocoSource(annotations=annotations, images=images, **MINE)) == {
        "no_picture": "image 30 names 000000000030.jpg, which is not there",
        "bad_caption": "annotation 51 has the caption ''",
    }
    with pytest.raises(DataError, match="none of the 3 pictures"):
        other = put(tmp_path / "other", {"x.jpg": b""})
        by_key(CocoSource(annotations=annotations, images=other, **MINE))
    with pytest.raises(DataError, match="no COCO captions file"):
        bad = put(tmp_path, {"bad.json": '{"images": [{"id": 1}]}'})
        by_key(CocoSource(annotations=f"{bad}/bad.json", images=images, **MINE))


def test_parquet_as_hugging_face_writes_it(tmp_path: Path) -> None:
    rows = [
        {
            "image": {"bytes": picture(i), "path": f"{i}.png"},
            "text": f"thing {i}",
            "zh": f"东西 {i}",
        }
        for i in range(150)
    ]
    rows[7]["image"]["bytes"] = None
    for part in range(2):
        table = pa.Table.from_pylist(rows[part * 75 : part * 75 + 75])
        pq.write_table(table, tmp_path / f"train-{part:05d}-of-00002.parquet", row_group_size=20)
    found = by_key(ParquetSource(table=str(tmp_path), captions=("text:en", "zh:zh"), **MINE))
    assert len(found) == 149
    one = found["train-00001-of-00002-000000003"]
    assert one.image == picture(78) and texts(one) == [("thing 78", "en"), ("东西 78", "zh")]
    row = "train-00000-of-00002.parquet, row 7 names 7.png, which is not there"
    source = ParquetSource(table=str(tmp_path), captions=("text:en", "zh:zh"), **MINE)
    assert lost(source) == {"no_picture": row}
    guessed = by_key(ParquetSource(table=str(tmp_path / "train-00001-of-00002.parquet"), **MINE))
    assert len(guessed) == 75 and texts(guessed[one.key]) == [("thing 78", "en")]
    with pytest.raises(DataError, match=r"no column picture; it has image \(struct<.*text \(str"):
        list(ParquetSource(table=str(tmp_path), image="picture", **MINE).samples())


def test_img2dataset_tars_stay_where_they_are(tmp_path: Path) -> None:
    tars = img2dataset(tmp_path / "laion")
    before = {path.name: path.read_bytes() for path in Path(tars).iterdir()}
    manifest = indexed(tars, tmp_path / "set")
    write_index(manifest, tmp_path / "set")
    assert {path.name for path in (tmp_path / "set").iterdir()} == {"manifest.json"}
    assert {path.name: path.read_bytes() for path in Path(tars).iterdir()} == before
    assert read_manifest(str(tmp_path / "set")) == manifest
    assert (manifest.samples, manifest.groups) == (10, 8)
    assert manifest.licenses == {"CC-BY-4.0": 8} and manifest.languages == {"en": 8}
    assert verify(str(tmp_path / "set")) == []
    other = indexed(tars, tmp_path / "set", license="MIT")
    assert other.digest != manifest.digest, "what is said of the samples is part of the data"
    tar(Path(tars) / "more.tar", [("a.txt", "x")])
    (Path(tars) / "00000.tar").write_bytes(before["00000.tar"][:3000])
    assert [(p.file, p.kind) for p in verify(str(tmp_path / "set"))] == [
        ("00000.tar", "truncated"),
        ("more.tar", "surplus"),
    ]


def test_tars_as_samples_of_our_own(tmp_path: Path) -> None:
    found = by_key(WebDatasetSource(folder=img2dataset(tmp_path / "laion"), **MINE))
    assert len(found) == 8 and found["000010001"].group == "http://u/10001"
    assert texts(found["000000002"]) == [("thing 2", "en")], "the .txt says what the .json says"
    assert lost(WebDatasetSource(folder=str(tmp_path / "laion"), **MINE)) == {
        "failed_download": "00000.tar: 000000004"
    }


@pytest.mark.parametrize("cut", [0, 700, 6_000, 10_000])
def test_a_damaged_tar_is_named(tmp_path: Path, cut: int) -> None:
    tars = img2dataset(tmp_path / "laion")
    path = Path(tars) / "00001.tar"
    path.write_bytes(path.read_bytes()[:cut] if cut else b"no tar at all" * 99)
    with pytest.raises(DataError, match=r"00001\.tar"):
        indexed(tars, tmp_path / "set")


def test_a_tar_with_a_damaged_header_does_not_end_quietly(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", [(f"{i}.txt", "x") for i in range(9)])
    content = bytearray(path.read_bytes())
    content[4 * 1024 : 4 * 1024 + 512] = b"\x07" * 512
    with pytest.raises(DataError, match=r"x\.tar is damaged"):
        list(read_samples(io.BytesIO(content), name="x.tar"))


def test_what_lies_strangely_in_a_tar_keeps_its_place_with_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as out:

        def add(name: str, content: bytes = b"x", kind: bytes = tarfile.REGTYPE) -> None:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(content) if kind == tarfile.REGTYPE else 0
            info.linkname = "/etc/passwd"
            out.addfile(info, io.BytesIO(content))

        for name in ("../../up.jpg", "/abs.jpg", "a.jpg", "a.txt", "b.jpg", "c.jpg", "b.txt"):
            add(name)
        add("soft.jpg", kind=tarfile.SYMTYPE)
        add("hard.jpg", kind=tarfile.LNKTYPE)
        add("pipe.jpg", kind=tarfile.FIFOTYPE)
        add("folder", kind=tarfile.DIRTYPE)
        for name in ("a.jpg", "a.txt", "d.jpg", "d.txt", "d.jpg", "d.txt", "README", ".hid.jpg"):
            add(name)
    with path.open("rb") as stream:
        found = [(s.key, s.problem, len(s.files)) for s in read_samples(stream)]
    assert found == [
        ("../../up", "unsafe_name", 1),
        ("/abs", "unsafe_name", 1),
        ("a", None, 2),
        ("b", None, 1),
        ("c", None, 1),
        ("b", "scattered_key", 1),
        ("soft", "link", 1),
        ("hard", "link", 1),
        ("pipe", "link", 1),
        ("a", None, 2),
        ("d", None, 2),
        ("d", None, 2),
    ]
    assert not (tmp_path / "up.jpg").exists()


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"json": b"{"}, "bad_json"),
        ({"json": b"[]"}, "bad_json"),
        ({"json": b'{"group": ' + b"9" * 5_000 + b"}"}, "bad_json"),
        ({"json": b"\xff"}, "bad_utf8"),
        ({"txt": b"\xff"}, "bad_utf8"),
        ({"json": b'{"status": "failed_to_resize"}'}, "failed_download"),
    ],
)
def test_a_record_that_cannot_be_read_has_a_reason(files: dict[str, bytes], reason: str) -> None:
    with pytest.raises(BadCaption) as caught:
        record_of("k", files, CREDITS)
    assert caught.value.reason == reason


def test_captions_of_every_spelling() -> None:
    said = {
        "caption": "a",
        "text_pt_br": "b",
        "captions": [{"text": "c", "language": "zh"}, "d", ""],
        "text_length": 4,
        "description": "x",
    }
    found = [(caption.text, caption.language) for caption in captions_in(said, "en")]
    assert found == [("a", "en"), ("b", "pt-br"), ("c", "zh"), ("d", "en")]
    assert canonical([Caption("long", "en"), Caption("x", "en"), Caption("long", "en")]) == (
        Caption("x", "en"),
        Caption("long", "en"),
    )
    assert plain_key("a-b_1") == "a-b_1" and plain_key("a b") != plain_key("a.b")


def test_a_sample_without_its_picture_is_not_written_but_counted(tmp_path: Path) -> None:
    annotations, images = coco(tmp_path)
    source = CocoSource(annotations=annotations, images=images, **MINE)
    manifest = write_shards(settled(source), tmp_path / "set")
    assert manifest.samples == manifest.used == 2 and manifest.languages == {"en": 6}
    assert manifest.found == 3
    assert [x.reason for x in manifest.losses] == ["no_picture", "bad_caption"]
    with tarfile.open(tmp_path / "set" / manifest.shards[0].file) as shard:
        assert len(shard.getnames()) == 4, "two records, two pictures"


@pytest.mark.parametrize(
    ("said", "group"), [(0, "0"), (7, "7"), (7.0, "7"), (None, "k"), ("", "k")]
)
def test_a_group_may_be_any_whole_number(said: object, group: str) -> None:
    assert CREDITS.fill({"group": said}, group="k")["group"] == group


def test_what_names_no_language_is_no_caption() -> None:
    row = {"caption": "cat", "caption_id": "77", "text_url": "x", "caption_zh_TW": "貓"}
    found = captions_in(row, "en")
    assert [(c.text, c.language) for c in found] == [("cat", "en"), ("貓", "zh-TW")]
    assert captions_in({"caption": "chat", "language": "fr"}, "en")[0].language == "fr"
    record, _ = record_of("k", {"zh_cn.txt": "猫".encode(), "txt": b"cat"}, CREDITS)
    assert {c["language"] for c in record["captions"]} == {"zh-cn", CREDITS.language}


def test_a_numbered_picture_keeps_its_caption(tmp_path: Path) -> None:
    files = {
        "cat.png": picture(1), "cat.2.png": picture(2), "dog.png": picture(3),
        "cat.TXT": b"a cat", "cat.2.TXT": b"another cat", "dog.txt": b"a dog",
        "dog.zh_CN.txt": "狗".encode(),
    }  # fmt: skip
    found = by_key(FolderSource(folder=put(tmp_path, files), **MINE))
    said = sorted(texts(sample) for sample in found.values())
    assert said == [
        [("a cat", "en")], [("a dog", "en"), ("狗", "zh-CN")], [("another cat", "en")],
    ]  # fmt: skip


def packed(members: dict[str, bytes], **pax: str) -> io.BytesIO:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(content), pax
            tar.addfile(info, io.BytesIO(content))
    stream.seek(0)
    return stream


def test_a_small_tar_cannot_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="a header of"):
        list(read_samples(packed({"a.png": b"x"}, comment="x" * 2_000_000)))
    (long,) = read_samples(packed({"a.png": b"x", "a.txt": b"x" * 5_000_000}))
    assert long.problem == "too_large" and long.files["txt"] == b""
    monkeypatch.setattr("pipeline.data.shards.tars.MAX_MEMBER_BYTES", 1_000)
    (whole,) = read_samples(packed({"a.png": b"x" * 600, "a.txt": b"x" * 600}))
    assert whole.problem == "too_large" and sum(map(len, whole.files.values())) < 1_000
    many = list(read_samples(packed({f"a.{i}.png": b"x" * 300 for i in range(9)})))
    assert [sample.key for sample in many] == [f"a.{i}" for i in range(9)]
    (other,) = read_samples(packed({"a.png": b"x", "a.mp4": b"x" * 5_000}))
    assert other.problem is None and other.files["mp4"] == b"", "no part of a sample"


def test_names_without_a_latin_letter_stay_apart() -> None:
    names = (f"苹果{chr(0x4E00 + i)}{chr(0x4E00 + j)}" for i in range(300) for j in range(300))
    keys = {plain_key(name) for name in names}
    assert len(keys) == 90_000 and all(len(key) == 16 for key in keys)


def test_licences_of_the_public_domain() -> None:
    def named(path: str) -> str:
        return spdx({"url": f"https://creativecommons.org/{path}"})

    assert named("publicdomain/zero/1.0/") == "CC0-1.0"
    assert named("publicdomain/mark/1.0/") == "CC-PDM-1.0"
    assert named("licenses/by/2.0/jp/") == "CC-BY-2.0-JP"


def test_a_key_that_comes_twice_in_a_tar_is_told(tmp_path: Path) -> None:
    pair: list[tuple[str, bytes | str]] = [("cat.png", picture(1)), ("cat.txt", "a cat")]
    tar(tmp_path / "1.tar", [*pair, *pair])
    source = WebDatasetSource(folder=str(tmp_path), **MINE)
    assert list(by_key(source)) == ["cat"] and lost(source) == {"duplicate_key": "1.tar: cat"}
    manifest = indexed(str(tmp_path), tmp_path / "set")
    assert (manifest.found, manifest.used) == (2, 1)
