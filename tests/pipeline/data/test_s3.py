"""Sources, shards and reading against a real S3 protocol endpoint that fails now and then."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from layouts import img2dataset, picture
from s3_endpoint import S3, s3_server

from pipeline.data.shards import files
from pipeline.data.shards.manifest import MANIFEST, Manifest, open_uri, read_manifest, verify
from pipeline.data.shards.writer import write_index, write_shards
from pipeline.data.sources.folder import FolderSource
from pipeline.data.sources.webdataset import WebDatasetSource

MINE = {"source": "test@1", "license": "CC0-1.0"}


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with s3_server() as server:
        yield server


def upload(s3: S3, folder: Path, prefix: str) -> None:
    client = s3.client()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = str(path.relative_to(folder))
            client.put_object(Bucket="bucket", Key=f"{prefix}/{name}", Body=path.read_bytes())


def indexed(tars: str, output: str) -> Manifest:
    manifest = WebDatasetSource(folder=tars, **MINE).index(output)
    assert manifest is not None
    return manifest


def test_a_folder_in_a_bucket_becomes_the_same_shards(s3: S3, tmp_path: Path) -> None:
    for i in range(70):
        (tmp_path / f"{i:02d}.png").write_bytes(picture(i))
        (tmp_path / f"{i:02d}.txt").write_text(f"thing {i}")
    upload(s3, tmp_path, "pictures")
    source = FolderSource(folder=s3.uri("bucket/pictures"), **MINE)
    there = write_shards(source.samples(), s3.uri("bucket/set"), max_bytes=60_000)
    local = FolderSource(folder=str(tmp_path), **MINE)
    here = write_shards(local.samples(), tmp_path / "set", max_bytes=60_000)
    assert there == here == read_manifest(s3.uri("bucket/set")) and here.samples == 70
    assert len(here.shards) > 1 and verify(s3.uri("bucket/set")) == []
    again = write_shards(source.samples(), s3.uri("bucket/set"))
    assert verify(s3.uri("bucket/set")) == [], "the old shards are gone"
    s3.client().delete_object(Bucket="bucket", Key=f"set/{again.shards[0].file}")
    assert [p.kind for p in verify(s3.uri("bucket/set"))] == ["missing"]


def test_tars_in_a_bucket_are_indexed_in_place_in_spite_of_failures(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(files, "BUFFER_BYTES", 2_000)  # many requests
    upload(s3, Path(img2dataset(tmp_path / "laion", shards=3)), "laion")
    calm = indexed(str(tmp_path / "laion"), str(tmp_path / "set"))
    s3.fail_every, s3.failed = 3, 0
    try:
        stormy = indexed(s3.uri("bucket/laion"), s3.uri("bucket/laion"))
        write_index(stormy, s3.uri("bucket/laion"))
        assert verify(s3.uri("bucket/laion")) == []
    finally:
        s3.fail_every = 0
    assert s3.failed > 5
    assert stormy.shards == calm.shards and stormy.digest == calm.digest
    fs, root = open_uri(s3.uri("bucket/laion"))
    with fs.open_input_stream(f"{root}/{MANIFEST}") as stream:
        assert json.loads(stream.read())["in_place"]["root"] == "."


class Flaky:
    """A file that breaks off at some reads and once gives nothing."""

    def __init__(self, content: bytes, failures: list[str]) -> None:
        self.content, self.failures, self.opened = content, failures, 0

    def open_input_file(self, path: str) -> Flaky:
        self.opened += 1
        self.place, self.closed = 0, False
        return self

    def seek(self, place: int) -> None:
        self.place = place

    def size(self) -> int:
        return len(self.content)

    def read(self, size: int) -> bytes:
        kind = self.failures.pop(0) if self.failures else ""
        if kind == "error":
            raise OSError("connection reset")
        return b"" if kind == "nothing" else self.content[self.place : self.place + size]

    def close(self) -> None:
        self.closed = True


def test_reading_goes_on_at_the_byte_where_it_broke(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(files, "BUFFER_BYTES", 100)
    content = bytes(range(256)) * 4
    file = Flaky(content, ["", "error", "nothing", "", "error", "error"])
    with files.open_patiently(file, "x") as stream:  # type: ignore[arg-type]
        assert b"".join(iter(lambda: stream.read(60), b"")) == content
    assert file.opened == 5
    broken = Flaky(content, ["error"] * files.ATTEMPTS)
    with (
        files.open_patiently(broken, "x") as stream,  # type: ignore[arg-type]
        pytest.raises(OSError, match="connection reset"),
    ):
        stream.read()
