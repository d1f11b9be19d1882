"""Keys, limits, safety, origins, caches, metrics: the ingress over a handle that always draws."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from ray.serve.exceptions import BackPressureError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from test_pool import MODEL, Call, Handle

from pipeline.config import ServeConfig
from pipeline.contracts import TokenCount
from pipeline.errors import RecipeError
from serve.access import AccessControl, TokenBucket, new_key
from serve.api import create_api
from serve.errors import ApiError
from serve.messages import (
    DEADLINE_EXCEEDED,
    GeneratedImage,
    ImageJob,
    ModelInfo,
    Refusal,
    Timing,
)
from serve.metrics import Metrics
from serve.middleware import RequestLogMiddleware
from serve.pool import ReplicaPool
from serve.responses import stream_events
from serve.safety import AllowAll, WordList, load_safety
from serve.schemas import ImageRequest
from serve.service import Client, ImageService
from serve.settings import ApiKey, ServiceConfig, resolve_service
from serve.understand import understand

KEY, DIGEST = new_key()
KEYED = ServiceConfig(
    keys=(ApiKey(name="alice", sha256=DIGEST, pictures_per_minute=3, megapixels_per_day=0.05),)
)
IMAGE = GeneratedImage(b"png", 0, MODEL, Timing(0.1, 0.2, 0.01, 4), TokenCount(3, 0, 16))
DRAW = ("POST", "/v1/images/generations", {"json": {"prompt": "a cat", "seed": 1}})
Ask = tuple[str, str, dict[str, Any]]


def ask(
    *asked: Ask, service: ServiceConfig | None = None, handle: Handle | None = None
) -> list[httpx.Response]:
    """The answers of one application, in turn."""

    async def send() -> list[httpx.Response]:
        drawn = [Call(IMAGE) for _ in range(20)]
        pool = ReplicaPool(handle or Handle(*drawn))  # type: ignore[arg-type]
        transport = httpx.ASGITransport(create_api(pool, service), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return [await http.request(method, path, **more) for method, path, more in asked]

    return asyncio.run(send())


def keyed(ask: Ask, key: str = KEY, **headers: str) -> Ask:
    method, path, more = ask
    return method, path, {**more, "headers": {"authorization": f"Bearer {key}", **headers}}


def codes(answers: Sequence[httpx.Response]) -> list[tuple[int, str | None]]:
    return [(a.status_code, a.headers.get("x-error-code")) for a in answers]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": KEY},
        {"authorization": f"Basic {KEY}"},
        {"authorization": "Bearer "},
        {"authorization": f"Bearer {KEY}x"},
        {"authorization": f"Bearer {DIGEST}"},
    ],
)
def test_without_the_key_nothing_is_answered(headers: dict[str, str]) -> None:
    asked: list[Ask] = [
        (method, path, {**more, "headers": headers})
        for method, path, more in (DRAW, ("GET", "/v1/models", {}), ("GET", "/metrics", {}))
    ]
    answers = ask(*asked, service=KEYED)
    assert codes(answers) == [(401, "invalid_api_key")] * 3
    assert {answer.headers["www-authenticate"] for answer in answers} == {"Bearer"}
    assert all(DIGEST not in answer.text and KEY not in answer.text for answer in answers)


def test_without_the_key_no_body_is_read() -> None:
    async def body() -> AsyncIterator[bytes]:
        raise AssertionError("it is read")
        yield b""

    for path in ("generations", "edits", "variations"):
        (answer,) = ask(("POST", f"/v1/images/{path}", {"content": body()}), service=KEYED)
        assert codes([answer]) == [(401, "invalid_api_key")]


def test_the_schema_wants_a_key_where_the_service_does() -> None:
    schema: Ask = ("GET", "/openapi.json", {})
    (keyed_schema,), (open_schema,) = ask(schema, service=KEYED), ask(schema)
    paths = {path: keyed_schema.json()["paths"][path] for path in ("/metrics", "/healthz")}
    assert paths["/metrics"]["get"]["security"] and "security" not in paths["/healthz"]["get"]
    assert "security" not in open_schema.text


def test_with_the_key_it_is_and_health_needs_none() -> None:
    models: Ask = ("GET", "/v1/models", {})
    asked = [keyed(DRAW), keyed(models), ("GET", "/healthz", {}), ("GET", "/readyz", {})]
    assert [a.status_code for a in ask(*asked, service=KEYED)] == [200] * 4


def test_the_configuration_knows_no_key() -> None:
    assert hashlib.sha256(KEY.encode()).hexdigest() == DIGEST
    assert KEY not in KEYED.model_dump_json() and len(KEY) > 40


def draw(n: int = 1, seed: int | None = None) -> Ask:
    return keyed(
        ("POST", "/v1/images/generations", {"json": {"prompt": "a", "n": n, "seed": seed}})
    )


def test_limits_by_key() -> None:
    answers = ask(draw(2), draw(2), draw(1), draw(1), draw(4), service=KEYED)
    assert codes(answers)[:4] == [
        (200, None), (429, "rate_limit_exceeded"), (200, None), (429, "rate_limit_exceeded"),
    ]  # fmt: skip
    assert 15 <= int(answers[1].headers["retry-after"]) <= 20
    assert "3 pictures per minute" in answers[1].json()["error"]["message"]
    assert codes(answers)[4] == (400, "invalid_value"), "more than the limit ever allows"


def test_pixels_are_limited_too() -> None:
    key = KEYED.keys[0].model_copy(
        update={"pictures_per_minute": 100, "megapixels_per_day": 3 * 64 * 64 / 1e6}
    )
    answers = ask(draw(3), draw(1), service=ServiceConfig(keys=(key,)))
    assert codes(answers) == [(200, None), (429, "rate_limit_exceeded")]
    assert "megapixels per day" in answers[1].text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (Call(BackPressureError(10, 10, 429, 1)), 429),
        (Call(DEADLINE_EXCEEDED), 503),
        (Call(Refusal("the image is cut off", "image")), 400),
        (Call(RuntimeError()), 500),
    ],
)
def test_what_is_not_drawn_costs_nothing(failure: Call, status: int, stream: bool) -> None:
    body = {"json": {"prompt": "a", "n": 1 if stream else 3, "stream": stream}}
    failing = keyed(("POST", DRAW[1], body))
    handle = Streaming(*[failure] * 3) if stream else Handle(*[failure] * 3)
    answers = ask(failing, draw(3), draw(1), service=KEYED, handle=handle)
    assert [answer.status_code for answer in answers] == [status, 200, 429]


def test_a_stream_that_breaks_off_costs_the_images_that_came() -> None:
    class Pool:
        async def model_info(self) -> ModelInfo:
            return MODEL

        async def stream(self, jobs: Sequence[ImageJob]) -> AsyncIterator[GeneratedImage]:
            yield IMAGE
            raise ApiError(503, "too late", code="deadline_exceeded")

    access = AccessControl(KEYED.keys)
    service = ImageService(Pool(), access, AllowAll(), Metrics(), KEYED)  # type: ignore[arg-type]

    async def break_off() -> None:
        asked = await service.understand(ImageRequest(prompt="a", n=3, stream=True))
        with pytest.raises(ApiError, match="too late"):
            _ = [image async for image in service.stream(asked, Client("alice"))]

    asyncio.run(break_off())
    access.charge("alice", num_images=2, pixels=1)
    with pytest.raises(ApiError, match="3 pictures per minute"):
        access.charge("alice", num_images=1, pixels=1)


def test_what_is_drawn_and_withheld_is_paid_for() -> None:
    withheld = Call(Refusal("not this one", None, "content_policy_violation"))
    answers = ask(draw(3), draw(1), service=KEYED, handle=Handle(*[withheld] * 3))
    assert [answer.status_code for answer in answers] == [400, 429]


class Streaming(Handle):
    """A Handle whose first answer is a stream."""

    def options(self, *, stream: bool) -> Any:
        first = self.waiting[0]

        class Stream:
            cancel = staticmethod(lambda: None)

            async def __anext__(self) -> Any:
                return await first

        self.waiting = []
        return SimpleNamespace(stream=SimpleNamespace(remote=lambda job: Stream()))


@given(costs=st.lists(st.floats(0.1, 5), max_size=20), gap=st.floats(0, 10))
def test_a_bucket_never_gives_more_than_it_gets(costs: list[float], gap: float) -> None:
    now, taken = 0.0, 0.0
    bucket = TokenBucket(5, 10, lambda: now)
    for cost in costs:
        now += gap
        if bucket.wait_s(cost) == 0:
            bucket.take(cost)
            taken += cost
        assert taken <= 5 + now * 0.5 + 1e-6
    bucket.give_back(5)
    assert bucket.wait_s(5.1) > 0, "never more than its size"


@pytest.mark.parametrize(
    ("prompt", "passes"),
    [
        ("a grape on a plate", True),
        ("rapeseed field", True),
        ("Ｒape", False),
        ("r\u200bape", False),
        ("rápe", False),
        ("Child   Pornography", False),
        ("画一幅儿童色情图", False),
        ("一个红苹果", True),
    ],
)
def test_the_word_list(prompt: str, passes: bool) -> None:
    words = load_safety(ServiceConfig())
    assert (words.prompt(prompt) is None) == passes
    assert load_safety(ServiceConfig(safety="off")).prompt(prompt) is None


def test_operators_add_words_and_hooks() -> None:
    assert load_safety(ServiceConfig(blocked_words=("Mauve",))).prompt("a mauve cat")
    assert WordList([]).prompt("anything") is None
    for wrong in ("nowhere:Nothing", "json:loads", "sillyname", "builtins:object"):
        with pytest.raises(RecipeError, match="safety="):
            load_safety(ServiceConfig(safety=wrong))


def test_pages_of_other_sites_are_kept_out() -> None:
    def origin(value: str) -> Ask:
        return ("POST", "/v1/images/generations", {**DRAW[2], "headers": {"origin": value}})

    foreign = [origin(said) for said in ("http://evil.example", "null", "http://[")]
    bent = origin("http://test")  # a name of another site that leads to this machine
    answers = ask(*foreign, bent)
    assert codes(answers) == [(403, "origin_not_allowed")] * 4
    (own,) = ask(bent, service=ServiceConfig(allow_anonymous=True))
    assert own.status_code == 200, "where others are served, the host's own pages may call"
    friendly = ServiceConfig(cors_origins=("https://a.example",))
    (allowed,) = ask(origin("https://a.example"), service=friendly)
    assert allowed.headers["access-control-allow-origin"] == "https://a.example"
    (refused,) = ask(origin("https://b.example"), service=friendly)
    assert refused.status_code == 403 and "access-control-allow-origin" not in refused.headers


def test_a_page_may_send_any_header_and_read_any_answer() -> None:
    page = {"origin": "https://a.example"}
    wanted = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,x-stainless-lang,x-request-id",
    }
    asked: list[Ask] = [
        ("OPTIONS", DRAW[1], {"headers": page | wanted}),
        ("POST", DRAW[1], {"json": {"prompt": "a cat", "n": 0}, "headers": page}),
    ]
    friendly = ServiceConfig(cors_origins=("https://A.example",))
    allowed, failed = ask(*asked, service=friendly)
    assert allowed.status_code == 200
    assert "x-stainless-lang" in allowed.headers["access-control-allow-headers"]
    assert failed.status_code == 400 and "access-control-allow-origin" in failed.headers
    assert "x-error-code" in failed.headers["access-control-expose-headers"]


@pytest.mark.parametrize("origin", ["*", "https://a.example/", "a.example", "https://a.example/x"])
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(ValidationError, match="is no origin"):
        ServiceConfig(cors_origins=(origin,))


def test_a_key_may_have_any_name() -> None:
    key = KEYED.keys[0].model_copy(update={"name": "anonymous"})
    assert ask(keyed(DRAW), service=ServiceConfig(keys=(key,)))[0].status_code == 200
    small = KEYED.keys[0].model_copy(update={"megapixels_per_day": 0.001})
    (answer,) = ask(draw(1), service=ServiceConfig(keys=(small,)))
    assert "not even one fits" in answer.json()["error"]["message"]


def test_security_headers_are_on_everything() -> None:
    for answer in ask(DRAW, ("GET", "/nowhere", {}), ("GET", "/healthz", {})):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_the_same_picture_is_not_drawn_twice() -> None:
    handle = Handle(*[Call(IMAGE) for _ in range(9)])
    other = ("POST", "/v1/images/generations", {"json": {"prompt": "a dog", "seed": 1}})
    jpeg = ("POST", DRAW[1], {"json": {**DRAW[2]["json"], "output_format": "jpeg"}})
    unseeded = ("POST", DRAW[1], {"json": {"prompt": "a cat"}})
    answers = ask(DRAW, DRAW, other, jpeg, unseeded, unseeded, handle=handle)
    assert {answer.status_code for answer in answers} == {200}
    assert len(handle.asked) == 5
    off = Handle(*[Call(IMAGE) for _ in range(9)])
    ask(DRAW, DRAW, service=ServiceConfig(result_cache_bytes=0), handle=off)
    assert len(off.asked) == 2


def test_another_version_is_another_picture() -> None:
    newer = GeneratedImage(b"new", 0, type(MODEL)(**{**vars(MODEL), "version": "4"}))
    handle = Handle(Call(IMAGE), Call(newer), Call(newer))
    unseeded = ("POST", DRAW[1], {"json": {"prompt": "a cat"}})
    answers = ask(DRAW, unseeded, DRAW, handle=handle)  # the second one tells of the new version
    assert len(handle.asked) == 3
    assert answers[2].json()["model_version"] == "4"


def repeat(key: str, prompt: str = "a cat") -> Ask:
    body = {"json": {"prompt": prompt}, "headers": {"idempotency-key": key}}
    return "POST", "/v1/images/generations", body


def test_a_request_sent_again_gets_the_same_answer() -> None:
    handle = Handle(*[Call(IMAGE) for _ in range(9)])
    answers = ask(
        repeat("k1"), repeat("k1"), repeat("k2"), repeat("k1", "a dog"), repeat("x" * 256),
        handle=handle,
    )  # fmt: skip
    assert codes(answers) == [
        (200, None), (200, None), (200, None), (409, "idempotency_key_reused"),
        (400, "invalid_value"),
    ]  # fmt: skip
    assert answers[0].json()["data"] == answers[1].json()["data"]
    assert len(handle.asked) == 2


def test_a_failure_is_not_remembered() -> None:
    handle = Handle(Call(RuntimeError("once")), Call(IMAGE))
    assert [a.status_code for a in ask(repeat("k"), repeat("k"), handle=handle)] == [500, 200]


def test_a_deadline_goes_with_the_job() -> None:
    def within(value: str) -> Ask:
        return ("POST", DRAW[1], {**DRAW[2], "headers": {"x-deadline-s": value}})

    handle = Handle(Call(IMAGE), Call(IMAGE))
    answers = ask(
        within("2.5"), within("soon"), within("-1"), within("nan"), within("inf"), handle=handle
    )
    assert codes(answers) == [(200, None)] + [(400, "invalid_value")] * 4
    (job,) = handle.asked
    assert isinstance(job, ImageJob)


def test_metrics_and_the_dashboard_agree() -> None:
    scrape: Ask = ("GET", "/metrics", {})
    failed = ("POST", DRAW[1], {"json": {"prompt": "a", "n": 99}})
    answers = ask(DRAW, DRAW, failed, ("GET", "/healthz", {}), scrape, scrape)
    text = answers[-1].text
    route = 'route="/v1/images/generations"'
    assert f'tessera_requests_total{{code="",{route},status="200"}} 2.0' in text
    assert f'tessera_requests_total{{code="invalid_value",{route},status="400"}} 1.0' in text
    assert 'tessera_pictures_total{model_version="3"} 1.0' in text
    assert 'tessera_model_info{model="tiny",notice="",version="3"} 1.0' in text
    assert 'tessera_result_cache_total{found="yes"} 1.0' in text
    for stage, times in {"queue": 1, "model": 1, "encode": 1, "request": 2}.items():
        assert f'tessera_stage_seconds_count{{stage="{stage}"}} {times}.0' in text
    assert "tessera_batch_size_count 1.0" in text and "tessera_waiting_pictures 0.0" in text
    dashboard = json.loads(
        (Path(__file__).parents[2] / "infra" / "grafana.json").read_text(encoding="utf-8")
    )
    queries = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    names = {word for query in queries for word in _words(query) if word.startswith("tessera_")}
    assert len(names) >= 7
    for name in names:
        assert f"\n{name}" in text, name


def _words(query: str) -> list[str]:
    return "".join(c if c.isalnum() or c == "_" else " " for c in query).split()


def test_what_nobody_foresaw_is_logged_and_counted_as_what_it_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    handle = Handle(Call(RuntimeError("a secret")))
    with caplog.at_level(logging.INFO, logger="ray.serve"):
        failed, metrics = ask(DRAW, ("GET", "/metrics", {}), handle=handle)
    assert codes([failed]) == [(500, "internal_error")] and "secret" not in failed.text
    assert failed.headers["x-content-type-options"] == "nosniff"
    said = next(r.http for r in caplog.records if r.getMessage() == "answered")
    assert (said["status"], said["code"]) == (500, "internal_error")
    assert "a secret" in caplog.text
    counted = 'code="internal_error",route="/v1/images/generations",status="500"'
    assert f"tessera_requests_total{{{counted}}} 1.0" in metrics.text
    assert 'tessera_stage_seconds_count{stage="request"} ' not in metrics.text


@pytest.mark.parametrize(
    ("began", "failure", "status"),
    [(True, RuntimeError, 200), (False, asyncio.CancelledError, 499), (False, None, 499)],
)
def test_what_cannot_be_answered_any_more(
    began: bool, failure: type[BaseException] | None, status: int
) -> None:
    """An answer that breaks off, a request that is withdrawn, a client that leaves."""
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if began:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        if failure is None:
            raise ClientDisconnect
        raise failure

    async def keep(message: Any) -> None:
        sent.append(message)

    metrics = Metrics()
    logged = RequestLogMiddleware(app, metrics, log_text=False)
    scope = {"type": "http", "method": "GET", "headers": []}
    with pytest.raises(failure) if failure else contextlib.nullcontext():
        asyncio.run(logged(scope, keep, keep))  # type: ignore[arg-type]
    assert len(sent) == began
    text = metrics.render(None, 0).decode()
    assert f'tessera_requests_total{{code="",route="unknown",status="{status}"}} 1.0' in text


def test_a_client_that_leaves_while_it_sends_is_logged_as_gone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"100")]
    scope = {
        "type": "http", "method": "POST", "path": DRAW[1], "query_string": b"", "headers": headers,
    }  # fmt: skip

    async def leave() -> Any:
        return {"type": "http.disconnect"}

    async def unwanted(message: Any) -> None:
        raise AssertionError(message)

    async def send() -> None:
        await create_api(ReplicaPool(Handle()))(scope, leave, unwanted)  # type: ignore[arg-type]

    with caplog.at_level(logging.INFO, logger="ray.serve"):
        asyncio.run(send())
    assert next(r.http for r in caplog.records if r.getMessage() == "answered")["status"] == 499


def test_a_line_in_the_log_holds_no_raw_control_character(
    caplog: pytest.LogCaptureFixture,
) -> None:
    body = {"json": {"prompt": "a cat", "user": "mallory\n\x1b[2Jroot"}}
    with caplog.at_level(logging.INFO, logger="ray.serve"):
        ask(("POST", DRAW[1], body))
    from ray._common.formatters import JSONFormatter

    (record,) = [r for r in caplog.records if r.getMessage() == "answered"]
    line = JSONFormatter().format(record)
    said = json.loads(line)["http"]
    assert (said["status"], said["caller"], said["pictures"]) == (200, "anonymous", 1)
    assert said["user"] == "mallory\n\x1b[2Jroot" and "a cat" not in line
    assert line.isprintable()


def test_the_text_log_says_as_much(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="ray.serve"):
        ask(
            ("POST", DRAW[1], {"json": {"prompt": "a cat", "user": "me\n"}}),
            service=ServiceConfig(log_format="text"),
        )
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("answered")]
    assert json.loads(line.removeprefix("answered "))["status"] == 200 and line.isprintable()


def test_a_stream_that_fails_is_no_success() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope)
        request.state.log_fields = {}

        async def late() -> AsyncIterator[Any]:
            raise ApiError(503, "too late", code="deadline_exceeded")
            yield

        request.scope["app"] = SimpleNamespace(
            state=SimpleNamespace(pool=SimpleNamespace(model_info=lambda: asyncio.sleep(0, MODEL)))
        )
        asked = understand(ImageRequest(prompt="a"), None, MODEL, ServiceConfig())
        told = stream_events("image_generation", asked, IMAGE, late(), request)
        await StreamingResponse(told)(scope, receive, send)

    sent: list[Any] = []

    async def keep(message: Any) -> None:
        sent.append(message)

    async def silent() -> Any:
        await asyncio.sleep(60)

    metrics = Metrics()
    scope = {"type": "http", "method": "POST", "headers": [], "state": {}}
    logged = RequestLogMiddleware(app, metrics, log_text=False)
    asyncio.run(logged(scope, silent, keep))  # type: ignore[arg-type]
    assert b"event: error" in b"".join(m.get("body", b"") for m in sent)
    text = metrics.render(None, 0).decode()
    assert 'code="deadline_exceeded",route="unknown",status="200"} 1.0' in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("keyz: []", "settings: keys,"),
        ("keys: [{name: a, sha256: short}]", "keys.0.sha256"),
        ("keys: [", "cannot read"),
        (f"keys: [{{name: a, sha256: {DIGEST}x}}]", "keys.0.sha256"),
        ("[]", "must hold a mapping"),
        ("serve: 3", "its section `serve`"),
        ("serve: {num_gpu: 1}", "unknown key 'serve.num_gpu'; did you mean 'num_gpus'"),
        ("serve: {max_replicas: 0}", "serve.max_replicas"),
        (f"keys: [{{name: a, sha256: {DIGEST}}}, {{name: a, sha256: {DIGEST}}}]", "same name"),
    ],
)
def test_a_mistake_in_the_settings_is_named(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "service.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=said) as caught:
        resolve_service(file=file)
    assert DIGEST not in str(caught.value), "what stands in the wrong place may be a secret"
    file.write_text(f"keys: [{{name: alice, sha256: {DIGEST}}}]")
    assert resolve_service(file=file).keys[0].name == "alice"


def test_replicas_are_as_the_environment_the_file_and_the_recipe_say(tmp_path: Path) -> None:
    file = tmp_path / "service.yaml"
    file.write_text("serve: {max_batch_size: 3, max_replicas: 5}\ndeadline_s: 7")
    recipe = ServeConfig(max_batch_size=2, max_replicas=4, num_cpus=2)
    service = resolve_service(recipe, file, {"TESSERA__SERVE__MAX_BATCH_SIZE": "16"})
    assert service.deadline_s == 7
    assert service.serve == ServeConfig(max_batch_size=16, max_replicas=5, num_cpus=2)
    assert resolve_service(environment={}) == ServiceConfig()
