"""The ingress over replicas that fail in every way, without Ray: what a client is told."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Generator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from pipeline.contracts import GenerationRequest
from serve import pool as pool_module
from serve.api import create_api
from serve.errors import ApiError, last_error
from serve.messages import DEADLINE_EXCEEDED, GeneratedImage, ImageJob, ModelInfo, Refusal
from serve.pool import ATTEMPTS, GRACE_S, ReplicaPool
from serve.schemas import ImageRequest

MODEL = ModelInfo(name="tiny", version="3", image_size=64, styles=("noto",), loaded=0)
REQUEST = GenerationRequest("a cat")


class Call:
    """A DeploymentResponse that waits, then returns or raises `outcome`."""

    def __init__(self, outcome: Any, delay_s: float = 0.0) -> None:
        self.outcome, self.delay_s, self.cancelled = outcome, delay_s, False

    def __await__(self) -> Generator[Any, None, Any]:
        yield from asyncio.sleep(self.delay_s).__await__()
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome

    def cancel(self) -> None:
        self.cancelled = True
        if isinstance(self.outcome, BaseException):
            raise self.outcome  # as Ray's does


class Handle:
    """A DeploymentHandle whose `generate` gives `calls` in turn, and whose `model_info` MODEL."""

    deployment_name = "generator"

    def __init__(self, *calls: Call) -> None:
        self.calls = calls
        self.waiting = list(calls)
        self.generate = self
        self.model_info = type("Method", (), {"remote": staticmethod(lambda: Call(MODEL))})
        self.asked: list[ImageJob] = []

    def options(self, *, stream: bool) -> Handle:
        assert stream
        return self

    def remote(self, job: ImageJob) -> Call:
        self.asked.append(job)
        if not self.waiting:
            return Call(GeneratedImage(b"png", job.request.seed, MODEL))
        return self.waiting.pop(0)


def job(deadline_s: float = 5.0) -> ImageJob:
    return ImageJob(REQUEST, deadline=time.time() + deadline_s)


def draw(handle: Handle, *jobs: ImageJob) -> list[GeneratedImage]:
    async def run() -> list[GeneratedImage]:
        return await ReplicaPool(handle).generate(jobs)  # type: ignore[arg-type]

    return asyncio.run(run())


def refused(*calls: Call, deadline_s: float = 5.0) -> ApiError:
    """What ReplicaPool.generate raises when one picture per call is asked for."""
    with pytest.raises(ApiError) as caught:
        draw(Handle(*calls), *[job(deadline_s) for _ in calls])
    return caught.value


def test_backpressure_withdraws_the_other_pictures() -> None:
    others = [Call(None, delay_s=5), Call(None, delay_s=5)]
    error = refused(others[0], Call(BackPressureError(10, 10, 429, 2.5)), others[1])
    assert (error.status_code, error.code, error.retry_after_s) == (429, "overloaded", 2.5)
    assert error.response().headers["retry-after"] == "3"
    assert all(call.cancelled for call in others)


def test_silence_and_death_are_503() -> None:
    silent = refused(Call(None, delay_s=9), deadline_s=-5)
    assert (silent.status_code, silent.code) == (503, "unavailable")
    assert f"{GRACE_S:g} s" in silent.detail
    with pytest.raises(ApiError, match="died") as caught:
        draw(Handle(*[Call(ActorDiedError()) for _ in range(ATTEMPTS)]), job())
    assert (caught.value.status_code, caught.value.retry_after_s) == (503, 1)


def test_a_picture_whose_replica_died_is_drawn_again() -> None:
    handle = Handle(Call(ActorDiedError()), Call(ActorDiedError()))
    assert draw(handle, job())[0].encoded == b"png"
    assert len(handle.asked) == 3


def test_a_stream_whose_replica_died_at_once_begins_again() -> None:
    calls = [Call(ActorDiedError()), Call(GeneratedImage(b"png", 0, MODEL))]

    class Streams(Handle):
        def options(self, *, stream: bool) -> Any:
            return SimpleNamespace(stream=SimpleNamespace(remote=self.begin))

        def begin(self, job: ImageJob) -> Any:
            self.asked.append(job)
            answer = calls.pop(0)

            class Stream:
                cancel = staticmethod(answer.cancel)

                async def __anext__(self) -> Any:
                    return await answer

            return Stream()

    async def all_of(pool: ReplicaPool) -> list[Any]:
        return [answer async for answer in pool.stream([job()])]

    handle = Streams()
    pool = ReplicaPool(handle)  # type: ignore[arg-type]
    assert [type(a) for a in asyncio.run(all_of(pool))] == [GeneratedImage] and len(
        handle.asked
    ) == 2


def test_what_comes_too_late_is_503() -> None:
    late = refused(Call(DEADLINE_EXCEEDED))
    assert (late.status_code, late.code, late.retry_after_s) == (503, "deadline_exceeded", 1)


def test_a_refusal_names_its_field() -> None:
    error = refused(Call(Refusal("too many steps", "num_steps")))
    assert (error.status_code, error.param) == (400, "num_steps")


def test_ready_asks_for_a_picture_only_when_none_was_drawn_lately() -> None:
    handle = Handle(Call(GeneratedImage(b"png", 0, MODEL)))
    pool = ReplicaPool(handle)  # type: ignore[arg-type]

    async def twice() -> None:
        await pool.check_ready()
        handle.waiting = [Call(RuntimeError("not asked"))]
        await pool.check_ready()

    asyncio.run(twice())
    assert len(handle.asked) == 1


def test_a_slow_readiness_picture_makes_ready_when_it_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ReplicaPool, "_deployment_status", lambda self: "one replica")
    monkeypatch.setattr(pool_module, "PROBE_TIMEOUT_S", 0.05)
    handle = Handle(Call(GeneratedImage(b"png", 0, MODEL), delay_s=0.2))
    pool = ReplicaPool(handle)  # type: ignore[arg-type]

    async def slow() -> None:
        with pytest.raises(ApiError, match=r"not there after 0\.05 s"):
            await pool.check_ready()
        await asyncio.sleep(0.3)
        await pool.check_ready()

    asyncio.run(slow())
    assert len(handle.asked) == 1


@pytest.mark.parametrize("failure", [ActorDiedError(), RuntimeError("broken weights")])
def test_not_ready_says_why(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReplicaPool, "_deployment_status", lambda self: "replicas: none; UNHEALTHY")
    answer = get(ReplicaPool(Handle(*[Call(failure)] * ATTEMPTS)), "/readyz")  # type: ignore[arg-type]
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (503, "not_ready")
    assert "UNHEALTHY" in error["message"] and "broken weights" not in error["message"]


def test_the_unforeseen_is_500_without_its_message() -> None:
    handle = Handle(Call(RuntimeError("a secret")))
    answer = ask(ReplicaPool(handle), json={"prompt": "a cat"})  # type: ignore[arg-type]
    assert answer.status_code == 500 and "secret" not in answer.text
    assert answer.json()["error"]["code"] == "internal_error"


def ask(pool: ReplicaPool, **body: Any) -> httpx.Response:
    return _send(pool, "POST", "/v1/images/generations", **body)


def get(pool: ReplicaPool, path: str) -> httpx.Response:
    return _send(pool, "GET", path)


def _send(pool: ReplicaPool, method: str, path: str, **body: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(create_api(pool), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.request(method, path, **body)

    return asyncio.run(send())


def test_the_last_error_of_a_traceback() -> None:
    traceback = "Failed twice.\nTraceback:\n  File x\nKeyError: 1\n  File y\na.BundleError: does"
    assert last_error(f"{traceback}\n\tnot fit.\n") == "a.BundleError: does not fit."
    assert last_error("still starting") == "still starting"
    assert last_error("") == ""


@pytest.mark.parametrize("depth", [100, 300, 600, 800, 850, 900, 925, 950, 975, 1000, 100_000])
def test_json_nested_however_deeply_is_refused(depth: int) -> None:
    body = b'{"prompt": ' + b"[" * depth + b"]" * depth + b"}"
    headers = {"content-type": "application/json"}
    answer = ask(ReplicaPool(Handle()), content=body, headers=headers)  # type: ignore[arg-type]
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] in ("invalid_type", "invalid_json")


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
FIELDS = st.sampled_from([*ImageRequest.model_fields, "negative", "\ud800", "\0"])


@settings(max_examples=150, deadline=None)
@given(body=st.dictionaries(FIELDS, ANYTHING, max_size=4) | ANYTHING)
def test_no_json_makes_the_server_fail(body: Any) -> None:
    if isinstance(body, dict):
        body = {"prompt": "a cat"} | body
    answer = ask(
        ReplicaPool(Handle()),  # type: ignore[arg-type]
        content=json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    assert answer.status_code in {200, 400, 404}
    assert answer.status_code == 200 or answer.json()["error"]["message"]
