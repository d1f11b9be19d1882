"""The ingress listens itself: real sockets, a real uvicorn, and a replica that is killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest
import ray
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse
from harness import HashGenerator, Running, settings
from ray import serve
from served import free_port, ready

from serve.app import assemble
from serve.errors import install_error_handlers
from serve.launch import deploy
from serve.listener import Address, ingress_may_listen, listening
from serve.middleware import BodyMiddleware
from serve.versions import ModelVersion


class Slow:
    """An application whose /slow answers when it is let go, and who came and went meanwhile."""

    def __init__(self) -> None:
        self.app = FastAPI()
        self.began, self.let_go, self.withdrawn = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.app.add_api_route("/slow", self._slow, methods=["GET", "POST"])
        self.app.add_api_route("/echo", self._echo, methods=["POST"])
        self.app.add_api_route("/broken", self._broken)

    async def _slow(self, request: Request) -> str:
        await request.body()
        self.began.set()
        try:
            await self.let_go.wait()
        except asyncio.CancelledError:
            self.withdrawn.set()
            raise
        return "there"

    async def _echo(self, request: Request) -> PlainTextResponse:
        return PlainTextResponse(await request.body())

    async def _broken(self) -> None:
        raise ValueError("broken")


@contextlib.asynccontextmanager
async def opened(slow: Slow, max_concurrency: int = 8) -> AsyncIterator[httpx.AsyncClient]:
    address = Address("127.0.0.1", free_port())
    async with (
        listening(slow.app, address, max_concurrency=max_concurrency),
        httpx.AsyncClient(base_url=address.url, timeout=20) as http,
    ):
        yield http


def test_every_request_has_an_id_of_its_own_or_the_client_s() -> None:
    async def ask() -> None:
        async with opened(Slow()) as http:
            first, second = await http.post("/echo"), await http.post("/echo")
            named = await http.post("/echo", headers={"x-request-id": "mine"})
        ids = [answer.headers["x-request-id"] for answer in (first, second)]
        assert len(set(ids)) == 2 and all(ids)
        assert named.headers.get_list("x-request-id") == ["mine"]

    asyncio.run(ask())


def test_a_body_of_many_parts_arrives_whole() -> None:
    async def ask() -> None:
        body = os.urandom(3_000_000)
        async with opened(Slow()) as http:
            assert (await http.post("/echo", content=body)).content == body

    asyncio.run(ask())


async def sent_slowly(url: str, *pieces: bytes, every_s: float) -> tuple[bytes, dict[str, object]]:
    """The status line of the answer to a body that comes in pieces and never ends, and its error;
    the answer ends with the connection."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /echo HTTP/1.1\r\nhost: here\r\ncontent-length: 1000\r\n\r\n")
    for piece in pieces:
        writer.write(piece)
        await asyncio.sleep(every_s)
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    return answer.partition(b"\r\n")[0], json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


def test_a_body_that_does_not_come_in_time_is_answered() -> None:
    async def ask() -> None:
        slow = Slow()
        install_error_handlers(slow.app)
        slow.app.add_middleware(BodyMiddleware, max_multipart_bytes=1000, timeout_s=0.4)
        async with opened(slow) as http:
            url = str(http.base_url)
            nothing, dripping = await asyncio.gather(
                sent_slowly(url, every_s=0), sent_slowly(url, *[b"x"] * 3, every_s=0.15)
            )
            taking_long = asyncio.create_task(http.post("/slow", content=b"all of it"))
            await asyncio.sleep(0.6)
            slow.let_go.set()
            assert (await taking_long).status_code == 200
        for status, error in (nothing, dripping):
            assert status == b"HTTP/1.1 408 Request Timeout"
            assert error["code"] == "request_timeout" and "within 0.4 s" in str(error["message"])
        assert "only 3 bytes" in str(dripping[1]["message"])

    asyncio.run(ask())


def test_who_leaves_is_worked_for_no_longer() -> None:
    async def ask() -> None:
        slow = Slow()
        async with opened(slow) as http:
            with pytest.raises(httpx.ReadTimeout):
                await http.get("/slow", timeout=0.3)
            await asyncio.wait_for(slow.withdrawn.wait(), 5)
            assert (await http.post("/echo", content=b"others")).text == "others"

    asyncio.run(ask())


def test_a_websocket_is_not_opened() -> None:
    async def ask() -> None:
        headers = {
            "connection": "Upgrade", "upgrade": "websocket",
            "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==", "sec-websocket-version": "13",
        }  # fmt: skip
        async with opened(Slow()) as http:
            assert (await http.get("/echo", headers=headers)).status_code == 405
            assert (await http.post("/echo", content=b"next")).text == "next"

    asyncio.run(ask())


def test_only_so_many_come_in_at_a_time() -> None:
    async def ask() -> None:
        slow = Slow()
        async with opened(slow, max_concurrency=1) as http:
            first = asyncio.create_task(http.get("/slow"))
            await slow.began.wait()
            second = asyncio.create_task(http.post("/echo", content=b"second"))
            await asyncio.wait({second}, timeout=0.3)
            assert not second.done()
            slow.let_go.set()
            assert (await first).json() == "there" and (await second).text == "second"

    asyncio.run(ask())


def test_a_failure_is_one_request_s() -> None:
    async def ask() -> None:
        async with opened(Slow()) as http:
            failed = await http.get("/broken", headers={"connection": "close"})
            assert failed.status_code == 500
            assert (await http.post("/echo", content=b"next")).text == "next"

    asyncio.run(ask())


def test_answers_that_have_begun_are_finished_and_the_port_is_free_at_once() -> None:
    async def ask() -> None:
        slow, address = Slow(), Address("127.0.0.1", free_port())
        async with httpx.AsyncClient(base_url=address.url, timeout=20) as http:
            async with listening(slow.app, address, max_concurrency=8):
                asking = asyncio.create_task(http.get("/slow"))
                await slow.began.wait()
                asyncio.get_running_loop().call_later(0.3, slow.let_go.set)
            assert asking.done() or (await asyncio.wait({asking}, timeout=1))[0]
            assert asking.result().json() == "there"
            with pytest.raises(httpx.ConnectError):
                await http.post("/echo")
            async with listening(
                slow.app, address, max_concurrency=8
            ):  # connections linger in TIME_WAIT
                assert (await http.post("/echo", content=b"again")).text == "again"

    asyncio.run(ask())


def test_the_url_is_this_machine_s_way_there() -> None:
    urls = {host: Address(host, 80).url for host in ("localhost", "0.0.0.0", "::", "::1")}
    assert urls == {
        "localhost": "http://localhost:80", "0.0.0.0": "http://127.0.0.1:80",
        "::": "http://[::1]:80", "::1": "http://[::1]:80",
    }  # fmt: skip


def test_a_replica_listens_itself_where_there_is_one_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert ingress_may_listen()
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: [{}, {}])
    assert not ingress_may_listen()
    monkeypatch.setattr(ray, "nodes", lambda: [{}])
    assert ingress_may_listen()
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # a cluster, which may grow
    assert not ingress_may_listen()
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    assert not ingress_may_listen()


def test_a_killed_ingress_is_back_at_the_same_address(server: Running, tmp_path: Path) -> None:
    address = Address("127.0.0.1", free_port())
    version = ModelVersion("tiny", "5", partial(HashGenerator, tmp_path / "log"))
    app = assemble(version, settings(), listen=address)
    deploy(app, name="direct", route_prefix="/direct")
    with httpx.Client(base_url=address.url, timeout=60) as http:
        for _ in range(2):
            assert http.get("/readyz").json()["model_version"] == "5"
            os.kill(ingress_pid("direct"), signal.SIGKILL)
            deadline = time.monotonic() + 60
            while not ready(address.url):
                assert time.monotonic() < deadline
                time.sleep(0.2)
    serve.delete("direct")


def ingress_pid(app: str) -> int:
    (pid,) = [
        process.pid
        for process in psutil.process_iter(["name", "status"])
        if process.info["name"] == f"ray::ServeReplica:{app}:api"
        and process.info["status"] != psutil.STATUS_ZOMBIE
    ]
    return pid
