"""The ingress over a generator replica in this very process: real images, no Ray, no sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
from harness import HashGenerator, settings

from serve.api import create_api
from serve.pool import ReplicaPool
from serve.replica import GeneratorReplica
from serve.settings import ServiceConfig
from serve.versions import ModelVersion

Ask = tuple[str, str, dict[str, Any]]
"""Method, path, and what else httpx takes."""


class DirectHandle:
    """A DeploymentHandle whose one replica runs here; `jobs` are what it was asked for."""

    deployment_name = "generator"

    def __init__(self, replica: GeneratorReplica) -> None:
        self.jobs: list[Any] = []
        self.generate = SimpleNamespace(remote=self._noting(replica.generate))
        self.stream = SimpleNamespace(remote=self._noting(replica.stream))
        self.model_info = SimpleNamespace(remote=replica.model_info)

    def options(self, *, stream: bool) -> DirectHandle:
        return self

    def _noting(self, call: Any) -> Any:
        def remote(job: Any) -> Any:
            self.jobs.append(job)
            return call(job)

        return remote


def ask_replica(
    asked: Sequence[Ask | Callable[[httpx.Response], Ask]],
    home: Path,
    service: ServiceConfig | None = None,
    **model: Any,
) -> tuple[list[httpx.Response], list[Any]]:
    """The answers of a service in turn, and the jobs that its replica got.

    Args:
        asked: the requests; a function makes one of the answer before it.
        home: where the generator may log.
        service: settings; those of one small replica by default.
        model: attributes that the generator has instead of its own.
    """

    def load() -> HashGenerator:
        generator = HashGenerator(home / "batches")
        vars(generator).update(model)
        return generator

    async def send() -> tuple[list[httpx.Response], list[Any]]:
        config = service or settings(result_cache_bytes=0)
        replica = GeneratorReplica(ModelVersion("tiny", "3", load), None, config)
        handle = DirectHandle(replica)
        api = create_api(ReplicaPool(handle), config)  # type: ignore[arg-type]
        transport = httpx.ASGITransport(api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            answers = list[httpx.Response]()
            for each in asked:
                method, path, more = each(answers[-1]) if callable(each) else each
                answers.append(await http.request(method, path, **more))
            return answers, handle.jobs

    return asyncio.run(send())


def generation(**body: Any) -> Ask:
    """A request for images of an apple, as JSON."""
    return "POST", "/v1/images/generations", {"json": {"prompt": "a red apple"} | body}
