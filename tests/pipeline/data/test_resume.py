"""Preprocessing that is killed, and that reads from an S3 which fails: nothing lost or doubled."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import corpus
import pyarrow.parquet as pq
import pytest
import ray
from s3_endpoint import s3_server
from test_preprocess import CONFIG, DATA, files, sample

from pipeline.data.preprocess.job import preprocess
from pipeline.data.shards.writer import write_shards

JOB = """
import sys
from pathlib import Path
from pipeline.config import DataConfig, PreprocessConfig
from pipeline.data.preprocess.job import preprocess
from pipeline.runtime import ray_runtime
with ray_runtime():
    preprocess(
        [sys.argv[1]], Path(sys.argv[2]),
        data=DataConfig.model_validate_json(sys.argv[3]),
        config=PreprocessConfig.model_validate_json(sys.argv[4]),
    )
"""


@pytest.mark.usefixtures("ray_session")
def test_killed_and_run_again_the_output_is_identical(tmp_path: Path) -> None:
    write_shards(map(sample, range(400)), tmp_path / "set", max_bytes=25_000)
    config = CONFIG.model_copy(update={"image_size": 256})  # so that a shard takes a while
    job = subprocess.Popen(
        [sys.executable, "-c", JOB, str(tmp_path / "set"), str(tmp_path / "out"),
         DATA.model_dump_json(), config.model_dump_json()],
        start_new_session=True, cwd=Path(__file__).parents[3],
        env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
    )  # fmt: skip
    staged = tmp_path / ".out.partial" / "staged"
    deadline = time.monotonic() + 400
    while not list(staged.glob("*/[0-9]*.parquet")):
        assert job.poll() is None and time.monotonic() < deadline, "it ended before the kill"
        time.sleep(0.005)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    done = {path: path.stat().st_mtime_ns for path in staged.glob("*/[0-9]*.parquet")}
    assert not (tmp_path / "out").exists()
    shards = len(list((tmp_path / "set").glob("*.tar")))
    assert 0 < len({path.parent for path in done}) < shards
    kept: dict[Path, bool] = {}

    def look(_: object) -> None:
        kept.update({path: path.stat().st_mtime_ns == at for path, at in done.items()})

    arguments = {"data": DATA, "config": config}
    report = preprocess([str(tmp_path / "set")], tmp_path / "out", **arguments, on_progress=look)
    assert report.accepted == 400 and any(kept.values()), "finished shards are not redone"
    preprocess([str(tmp_path / "set")], tmp_path / "whole", **arguments)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.usefixtures("ray_session")
def test_an_s3_that_fails_now_and_then_loses_and_doubles_nothing(tmp_path: Path) -> None:
    corpus.write_corpus(tmp_path / "set")
    here = preprocess([str(tmp_path / "set")], tmp_path / "here", data=DATA, config=CONFIG)
    with s3_server() as s3:
        for path in (tmp_path / "set").iterdir():
            s3.client().put_object(
                Bucket="bucket", Key=f"data/set/{path.name}", Body=path.read_bytes()
            )
        s3.fail_every = 2
        uri = s3.uri("bucket/data/set")
        there = preprocess([uri], tmp_path / "there", data=DATA, config=CONFIG)
    assert s3.failed >= 3
    assert there.reasons == here.reasons and there.accepted == here.accepted
    assert files(tmp_path / "there") == files(tmp_path / "here")
    assert pq.read_table(tmp_path / "there" / "pixels").num_rows == here.accepted
