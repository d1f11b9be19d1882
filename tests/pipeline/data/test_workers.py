"""Errors of Ray Data's workers are told as they were raised, and nothing else of Ray's is."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest
import ray.data

from pipeline.data.preprocess.workers import Telling, TellingActor, worker_errors
from pipeline.errors import BundleError, DataError
from pipeline.runtime import HARMLESS, quiet_actors, quiet_ray_data

BLOCK = pa.table({"x": [1, 2, 3]})


def test_blocks_pass_as_they_are() -> None:
    def twice(block: pa.Table) -> Iterator[pa.Table]:
        yield block
        yield block

    assert list(Telling(lambda block: block.slice(1))(BLOCK)) == [BLOCK.slice(1)]
    assert list(Telling(twice)(BLOCK)) == [BLOCK, BLOCK]


def test_what_a_worker_raises_is_raised_here_and_the_console_stays_quiet(
    ray_session: None, capfd: pytest.CaptureFixture[str]
) -> None:
    def second_block_fails(block: pa.Table) -> Iterator[pa.Table]:
        yield block
        raise DataError("the tar ends early")

    class Encoder:
        def __init__(self, name: str) -> None:
            raise BundleError(f"{name} is damaged")

    def read(work: Any, **options: Any) -> None:
        data = ray.data.from_arrow(BLOCK).map_batches(work, batch_format="pyarrow", **options)
        with worker_errors(), quiet_actors():
            for _ in data.iter_batches(batch_size=None, batch_format="pyarrow"):
                pass

    quiet_ray_data()
    with pytest.raises(DataError) as told:
        read(Telling(second_block_fails))
    assert type(told.value) is DataError and str(told.value) == "the tar ends early"
    one = ray.data.ActorPoolStrategy(size=1)
    with pytest.raises(BundleError) as told:
        read(TellingActor, fn_constructor_args=(Encoder, "fsq"), compute=one, num_cpus=0.1)
    assert type(told.value) is BundleError and str(told.value) == "fsq is damaged"
    assert capfd.readouterr().err == ""


def test_lines_that_tell_something_reach_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with quiet_actors():
        os.write(2, f"[E] {HARMLESS.replace('.*', '.cc: ')} and so on\n".encode())
        os.write(2, b"a crash's last words\n")
        print("50%", end="", file=sys.stderr, flush=True)
    os.write(2, b"after")
    told = capfd.readouterr().err
    assert "50%" in told and "a crash's last words\n" in told and told.endswith("after")
    assert "object store" not in told
