"""One Ray Serve application for all tests of the HTTP interface."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import harness
import pytest
from ray import cloudpickle
from served import free_port

from serve.app import assemble
from serve.launch import launch
from serve.versions import ModelVersion

cloudpickle.register_pickle_by_value(harness)  # replicas do not have tests/ on their path


@pytest.fixture(scope="session")
def server(
    ray_session: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[harness.Running]:
    log = tmp_path_factory.mktemp("serve") / "batches"
    version = ModelVersion("tiny", "3", partial(harness.HashGenerator, log))
    # these tests are about what is generated; test_access.py is about the cache
    build = partial(assemble, version, harness.settings(result_cache_bytes=0))
    started = launch(build, host="127.0.0.1", port=free_port(), ready_timeout_s=60)
    yield harness.Running(started.url, log)
    started.close()
