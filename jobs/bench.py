"""A load generator for a running image API: images per second, latencies, errors.

tessera bench serve --concurrency 1 --concurrency 8 --duration-s 30     closed loop: N clients, each
                                                                        asking again when answered
tessera bench serve --rate 2 --rate 4                                   open loop: N requests per
                                                                        second, Poisson arrivals

Latency is that of requests answered with images. In an open loop it counts from when the request
was due, so that a load generator that falls behind hides nothing (coordinated omission).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import aiohttp
import numpy as np

from pipeline.errors import ResourceError

UNREACHABLE = "unreachable"


@dataclass(frozen=True)
class Load:
    """The requests to send.

    Attributes:
        url: URL of the server, without /v1.
        duration_s: seconds for which requests are sent; those under way are then waited for.
        prompt, num_images, num_steps: the same in every request, which has a seed of its own.
        api_key: sent if given.
        timeout_s: seconds that one request may take.
        seed: of the arrival times and of the requests' seeds. None: a random one, because a server
            answers from its cache what it was asked for before.
    """

    url: str
    duration_s: float = 10.0
    prompt: str = "a red apple"
    num_images: int = 1
    num_steps: int | None = None
    api_key: str | None = None
    timeout_s: float = 120.0
    seed: int | None = None


@dataclass
class Tally:
    """The answers to one load: seconds of every success, failures by HTTP status or kind."""

    latencies: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Result:
    """One line of the report; all times in seconds.

    Attributes:
        load: "concurrency N" or "rate N".
        requests: number of requests answered with images.
        seconds: from the first request to the last answer.
        images_per_s: images over seconds.
        p50, p95, p99, worst: latency of those requests; None where there were none.
        errors: number of other requests by HTTP status or kind.
    """

    load: str
    requests: int
    seconds: float
    images_per_s: float
    p50: float | None
    p95: float | None
    p99: float | None
    worst: float | None
    errors: dict[str, int]


def bench(load: Load, *, concurrencies: list[int], rates: list[float]) -> list[Result]:
    """Put every load on the server, one after the other, after one request that is not counted.

    Raises:
        ResourceError: the server cannot be reached or refuses the first request.
    """
    return asyncio.run(_bench(load, concurrencies, rates))


async def _bench(load: Load, concurrencies: list[int], rates: list[float]) -> list[Result]:
    timeout = aiohttp.ClientTimeout(total=load.timeout_s)
    headers = {"authorization": f"Bearer {load.api_key}"} if load.api_key else {}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        timeout=timeout, headers=headers, connector=connector
    ) as session:
        generator = LoadGenerator(session, load)
        await generator.warm_up()
        loads: dict[str, Callable[[], Awaitable[None]]] = {}
        loads |= {f"concurrency {n}": partial(generator.closed_loop, n) for n in concurrencies}
        loads |= {f"rate {rate:g}": partial(generator.open_loop, rate) for rate in rates}
        return [await generator.measure(name, work) for name, work in loads.items()]


class LoadGenerator:
    """Sends requests and keeps the tally."""

    def __init__(self, session: aiohttp.ClientSession, load: Load) -> None:
        self._session, self._load = session, load
        self._random = random.Random(load.seed)
        self._tally = Tally()

    async def warm_up(self) -> None:
        """Send one request, to fail early and clearly.

        Raises:
            ResourceError: it is not answered with images.
        """
        await self.ask(time.monotonic())
        if self._tally.errors:
            (kind,) = self._tally.errors
            raise ResourceError(
                f"{self._load.url} does not draw ({kind}); start it with `tessera serve`, "
                "name another with --url, or send a key with --api-key"
            )

    async def measure(self, name: str, work: Callable[[], Awaitable[None]]) -> Result:
        """Run one load and return its line of the report."""
        self._tally, began = Tally(), time.monotonic()
        await work()
        seconds, done = time.monotonic() - began, self._tally.latencies
        quantiles = np.quantile(done, (0.5, 0.95, 0.99, 1.0)).tolist() if done else [None] * 4
        p50, p95, p99, worst = quantiles
        return Result(
            load=name,
            requests=len(done),
            seconds=seconds,
            images_per_s=len(done) * self._load.num_images / seconds,
            p50=p50,
            p95=p95,
            p99=p99,
            worst=worst,
            errors=dict(self._tally.errors),
        )

    async def closed_loop(self, num_clients: int) -> None:
        """`num_clients` at once, each asking again as soon as it is answered."""
        end = time.monotonic() + self._load.duration_s

        async def client() -> None:
            while time.monotonic() < end:
                await self.ask(time.monotonic())

        await asyncio.gather(*[client() for _ in range(num_clients)])

    async def open_loop(self, rate: float) -> None:
        """`rate` requests per second at exponential intervals, however long answers take."""
        due = time.monotonic()
        end = due + self._load.duration_s
        asked: list[asyncio.Task[None]] = []
        while (due := due + self._random.expovariate(rate)) < end:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            asked.append(asyncio.create_task(self.ask(due)))
        await asyncio.gather(*asked)

    async def ask(self, due: float) -> None:
        """Send one request; its latency counts from `due`."""
        body: dict[str, Any] = {
            "prompt": self._load.prompt,
            "n": self._load.num_images,
            "seed": self._random.randrange(2**62),
        }
        if self._load.num_steps is not None:
            body["num_steps"] = self._load.num_steps
        url = f"{self._load.url}/v1/images/generations"
        try:
            async with self._session.post(url, json=body) as answer:
                await answer.read()
                failure = "" if answer.status == 200 else str(answer.status)
        except TimeoutError:
            failure = "timeout"
        except aiohttp.ClientError:
            failure = UNREACHABLE
        if failure:
            self._tally.errors[failure] += 1
            await asyncio.sleep(0.05)  # a closed loop of refusals must not become a flood
        else:
            self._tally.latencies.append(time.monotonic() - due)
