"""The load generator against a server whose speed and errors are known."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from aiohttp import web
from typer.testing import CliRunner

from jobs.cli import app
from serve.access import digest

DELAY_S = 0.05


class Stub:
    """Answers after DELAY_S, two at a time; more at once are refused with 429."""

    def __init__(self) -> None:
        self.busy = 0
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()

    async def draw(self, request: web.Request) -> web.Response:
        self.bodies.append(await request.json())
        self.keys.add(request.headers.get("authorization"))
        if self.busy >= 2:
            return web.json_response({"error": {}}, status=429)
        self.busy += 1
        await asyncio.sleep(DELAY_S)
        self.busy -= 1
        return web.json_response({"data": []})


@pytest.fixture
def stub() -> Iterator[tuple[str, Stub]]:
    loop, stub = asyncio.new_event_loop(), Stub()
    served = web.Application()
    served.router.add_post("/v1/images/generations", stub.draw)
    runner = web.AppRunner(served)

    async def start() -> int:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return int(runner.addresses[0][1])

    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    port = asyncio.run_coroutine_threadsafe(start(), loop).result(30)
    yield f"http://127.0.0.1:{port}", stub
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(30)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def bench(url: str, *arguments: str) -> list[dict[str, Any]]:
    shown = CliRunner().invoke(app, ["bench", "serve", "--url", url, "--json", *arguments])
    assert shown.exit_code == 0, shown.output
    results: list[dict[str, Any]] = json.loads(shown.stdout)
    return results


def test_a_closed_loop_counts_pictures_latencies_and_errors(stub: tuple[str, Stub]) -> None:
    url, seen = stub
    arguments = ("--concurrency", "1", "--concurrency", "4", "--duration-s", "0.6", "--n", "2")
    one, four = bench(url, *arguments, "--api-key", "k", "--num-steps", "3")
    assert one["load"] == "concurrency 1" and one["errors"] == {}
    assert 2 <= one["requests"] <= 0.6 / DELAY_S + 1
    assert one["images_per_s"] == pytest.approx(2 * one["requests"] / one["seconds"])
    assert DELAY_S <= one["p50"] <= one["p95"] <= one["p99"] <= one["worst"]
    assert four["errors"]["429"] > 0 and four["requests"] > 0
    assert len(seen.bodies) == 1 + one["requests"] + four["requests"] + four["errors"]["429"]
    assert len({body["seed"] for body in seen.bodies}) == len(seen.bodies)
    assert {(body["n"], body["num_steps"]) for body in seen.bodies} == {(2, 3)}
    assert seen.keys == {"Bearer k"}


def test_poisson_arrivals_do_not_wait_for_answers(stub: tuple[str, Stub]) -> None:
    url, _ = stub
    (result,) = bench(url, "--rate", "60", "--duration-s", "1", "--seed", "1")
    sent = result["requests"] + sum(result["errors"].values())
    assert 35 <= sent <= 90 and set(result["errors"]) == {"429"}


def test_a_second_run_asks_for_other_pictures_unless_the_seed_is_given(
    stub: tuple[str, Stub],
) -> None:
    url, seen = stub

    def seeds(*arguments: str) -> list[int]:
        seen.bodies.clear()
        bench(url, "--concurrency", "1", "--duration-s", "0.1", *arguments)
        return [body["seed"] for body in seen.bodies]

    assert not set(seeds()) & set(seeds())
    assert seeds("--seed", "1")[:2] == seeds("--seed", "1")[:2]


def test_a_server_that_is_not_there_is_named() -> None:
    shown = CliRunner().invoke(app, ["bench", "serve", "--url", "http://127.0.0.1:9"])
    assert shown.exit_code == 1 and "tessera serve" in str(shown.exception)


def test_a_key_is_shown_with_its_digest() -> None:
    shown = json.loads(CliRunner().invoke(app, ["key", "alice", "--json"]).stdout)
    assert shown["name"] == "alice" and digest(shown["key"]) == shown["sha256"]
    plain = CliRunner().invoke(app, ["key", "bob"]).stdout
    assert "{name: bob, sha256: " in plain and "tsr-" in plain
