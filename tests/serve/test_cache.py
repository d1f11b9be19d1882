"""What is kept of pictures and answers, and that it is bounded."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from test_pool import CARD

from pipeline.contracts import GenerationRequest
from serve import cache
from serve.cache import Repeats, ResultCache
from serve.errors import ApiError
from serve.pictures import Job, Output, Picture, Upload

PICTURE = Picture(bytes(1_000), 0, CARD)
JOB = Job(GenerationRequest("a hat"), deadline=0, upload=Upload(bytes(10**6), mask=b"mask"))


def test_a_kept_picture_does_not_keep_its_upload() -> None:
    kept = ResultCache(10**6)
    kept.put(JOB, PICTURE)
    assert sum(map(sys.getsizeof, kept._kept)) < 100
    assert kept.get(replace(JOB, deadline=9.0, previews=2), "3") is PICTURE


@pytest.mark.parametrize(
    "other",
    [
        replace(JOB, request=GenerationRequest("a hat", seed=1)),
        replace(JOB, output=Output("jpeg")),
        replace(JOB, upload=None),
        replace(JOB, upload=Upload(bytes(10**6))),
        replace(JOB, upload=Upload(bytes(10**6), share=0.5)),
        replace(JOB, upload=Upload(b"mask", mask=bytes(10**6))),
    ],
)
def test_what_the_picture_depends_on_is_another_picture(other: Job) -> None:
    kept = ResultCache(10**6)
    kept.put(JOB, PICTURE)
    assert kept.get(other, "3") is None and kept.get(JOB, "4") is None


class Desk:
    """A Repeats whose clock a test moves; counts what is drawn."""

    def __init__(self) -> None:
        self.now, self.drawn = 0.0, 0
        self.repeats = Repeats(600, lambda: self.now)

    async def ask(self, caller: str, key: str, until: Awaitable[object] | None = None) -> None:
        async def work() -> list[Picture]:
            self.drawn += 1
            if until is not None:
                await until
            return [PICTURE]

        assert await self.repeats.once(caller, key, "a cat", work) == [PICTURE]


def at_a_desk(work: Callable[[Desk], Awaitable[None]]) -> None:
    async def main() -> None:
        await work(Desk())

    asyncio.run(main())


def test_one_callers_keys_push_out_nobody_elses() -> None:
    async def work(desk: Desk) -> None:
        await desk.ask("alice", "mine")
        for number in range(cache.MAX_KEYS + 1):
            await desk.ask("bob", str(number))
        drawn = desk.drawn
        await desk.ask("alice", "mine")
        await desk.ask("bob", "1")
        assert desk.drawn == drawn
        await desk.ask("bob", "0")
        assert desk.drawn == drawn + 1, "his own oldest is forgotten"
        desk.now = 601.0
        await desk.ask("alice", "mine")
        assert desk.drawn == drawn + 2

    at_a_desk(work)


def test_what_is_under_way_is_never_drawn_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MAX_KEYS", 2)

    async def work(desk: Desk) -> None:
        opened = asyncio.Event()
        first = asyncio.ensure_future(desk.ask("alice", "slow", opened.wait()))
        await asyncio.sleep(0)
        for number in range(5):
            await desk.ask("alice", str(number))
        again = asyncio.ensure_future(desk.ask("alice", "slow"))
        await asyncio.sleep(0)
        opened.set()
        await asyncio.gather(first, again)
        assert desk.drawn == 6

    at_a_desk(work)


def test_answers_are_bounded_in_bytes_at_the_cost_of_who_holds_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cache, "MAX_ANSWER_BYTES", 10_000)  # of four answers

    async def work(desk: Desk) -> None:
        await desk.ask("alice", "mine")
        for number in range(9):
            await desk.ask("bob", str(number))
        assert desk.drawn == 10
        await desk.ask("alice", "mine")
        await desk.ask("bob", "8")
        assert desk.drawn == 10
        await desk.ask("bob", "0")
        assert desk.drawn == 11

    at_a_desk(work)


def test_a_key_is_of_one_request() -> None:
    async def work(desk: Desk) -> None:
        await desk.ask("alice", "k")
        with pytest.raises(ApiError) as caught:
            await desk.repeats.once("alice", "k", "a dog", lambda: asyncio.sleep(0, [PICTURE]))
        assert caught.value.code == "idempotency_key_reused"

    at_a_desk(work)
