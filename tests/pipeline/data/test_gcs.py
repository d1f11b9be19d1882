"""Shard sets and preprocessing against a Google Cloud Storage emulator."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_preprocess import CONFIG, DATA, files, sample

from pipeline.data.preprocess.job import preprocess
from pipeline.data.shards.manifest import open_uri, read_manifest, verify
from pipeline.data.shards.writer import write_shards

# In a process of its own: pyarrow may hold the interpreter's lock while it waits for an answer.
# With threads: the emulator's own server answers one connection at a time, and clients keep theirs.
SERVER = """
from functools import partial
from http.server import ThreadingHTTPServer
from gcp_storage_emulator.handlers.buckets import create_bucket
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

storage = Storage(use_memory_fs=True)
create_bucket("bucket", storage)
server = ThreadingHTTPServer(("127.0.0.1", 0), partial(RequestHandler, storage))
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture(scope="module")
def uri() -> Iterator[Callable[[str], str]]:
    """The URI of a path in an empty bucket."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert server.stdout is not None
    port = int(server.stdout.readline())
    yield (
        lambda path: (
            f"gs://anonymous@bucket/{path}?scheme=http&retry_limit_seconds=5"
            f"&endpoint_override=127.0.0.1%3A{port}"
        )
    )
    server.kill()
    server.wait()


def test_a_set_in_a_bucket_is_replaced_and_verified(
    uri: Callable[[str], str], tmp_path: Path
) -> None:
    here = write_shards(map(sample, range(40)), tmp_path / "set", max_bytes=30_000)
    write_shards(map(sample, range(9)), uri("a/set"), max_bytes=30_000)
    there = write_shards(map(sample, range(40)), uri("a/set"), max_bytes=30_000)
    assert there == here == read_manifest(uri("a/set")) and len(here.shards) > 1
    assert verify(uri("a/set")) == [], "the old shards are gone"
    fs, root = open_uri(uri("a/set"))
    with fs.open_output_stream(f"{root}/{here.shards[0].file}") as out:
        out.write(b"x" * here.shards[0].bytes)
    fs.delete_file(f"{root}/{here.shards[1].file}")
    with fs.open_output_stream(f"{root}/more.tar") as out:
        out.write(b"x")
    found = {problem.file: problem.kind for problem in verify(uri("a/set"))}
    altered, missing = (shard.file for shard in here.shards[:2])
    assert found == {altered: "altered", missing: "missing", "more.tar": "surplus"}


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_preprocessing_from_a_bucket_gives_the_same_files(
    uri: Callable[[str], str], tmp_path: Path
) -> None:
    write_shards(map(sample, range(60)), tmp_path / "set", max_bytes=30_000)
    write_shards(map(sample, range(60)), uri("b/set"), max_bytes=30_000)
    preprocess([str(tmp_path / "set")], tmp_path / "here", data=DATA, config=CONFIG)
    preprocess([uri("b/set")], tmp_path / "there", data=DATA, config=CONFIG)
    assert files(tmp_path / "here") == files(tmp_path / "there")
