"""What is kept of pictures and answers, and that it is bounded."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from test_pool import MODEL

from pipeline.contracts import GenerationRequest
from serve import cache
from serve.cache import LINK_TTL_S, IdempotencyCache, LinkedImages, ResultCache
from serve.errors import ApiError
from serve.messages import GeneratedImage, ImageJob, OutputOptions, Upload

IMAGE = GeneratedImage(bytes(1_000), 0, MODEL)
JOB = ImageJob(GenerationRequest("a hat"), deadline=0, upload=Upload(bytes(10**6), mask=b"mask"))


def test_a_kept_picture_does_not_keep_its_upload() -> None:
    kept = ResultCache(10**6)
    kept.put(JOB, IMAGE)
    assert sum(map(sys.getsizeof, kept._images)) < 100
    assert kept.get(replace(JOB, deadline=9.0, num_partial_images=2), "3") is IMAGE


@pytest.mark.parametrize(
    "other",
    [
        replace(JOB, request=GenerationRequest("a hat", seed=1)),
        replace(JOB, output=OutputOptions("jpeg")),
        replace(JOB, upload=None),
        replace(JOB, upload=Upload(bytes(10**6))),
        replace(JOB, upload=Upload(bytes(10**6), share=0.5)),
        replace(JOB, upload=Upload(bytes(10**6), share=0.5, transparency_is_mask=False)),
        replace(JOB, upload=Upload(b"mask", mask=bytes(10**6))),
        replace(JOB, output=OutputOptions(size=(128, 64))),
        replace(JOB, output=OutputOptions(size=(64, 128))),
        replace(JOB, output=OutputOptions(fit="crop")),
    ],
)
def test_what_the_picture_depends_on_is_another_picture(other: ImageJob) -> None:
    kept = ResultCache(10**6)
    kept.put(JOB, IMAGE)
    assert kept.get(other, "3") is None and kept.get(JOB, "4") is None


class Service:
    """An IdempotencyCache whose clock a test moves; counts what is generated."""

    def __init__(self) -> None:
        self.now, self.drawn = 0.0, 0
        self.cache = IdempotencyCache(600, lambda: self.now)

    async def ask(self, client: str, key: str, until: Awaitable[object] | None = None) -> None:
        async def work() -> list[GeneratedImage]:
            self.drawn += 1
            if until is not None:
                await until
            return [IMAGE]

        assert await self.cache.run_once(client, key, "a cat", work) == [IMAGE]


def with_a_service(work: Callable[[Service], Awaitable[None]]) -> None:
    async def main() -> None:
        await work(Service())

    asyncio.run(main())


def test_one_callers_keys_push_out_nobody_elses() -> None:
    async def work(service: Service) -> None:
        await service.ask("alice", "mine")
        for number in range(cache.MAX_KEYS + 1):
            await service.ask("bob", str(number))
        drawn = service.drawn
        await service.ask("alice", "mine")
        await service.ask("bob", "1")
        assert service.drawn == drawn
        await service.ask("bob", "0")
        assert service.drawn == drawn + 1, "his own oldest is forgotten"
        service.now = 601.0
        await service.ask("alice", "mine")
        assert service.drawn == drawn + 2

    with_a_service(work)


def test_what_is_under_way_is_never_drawn_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MAX_KEYS", 2)

    async def work(service: Service) -> None:
        opened = asyncio.Event()
        first = asyncio.ensure_future(service.ask("alice", "slow", opened.wait()))
        await asyncio.sleep(0)
        for number in range(5):
            await service.ask("alice", str(number))
        again = asyncio.ensure_future(service.ask("alice", "slow"))
        await asyncio.sleep(0)
        opened.set()
        await asyncio.gather(first, again)
        assert service.drawn == 6

    with_a_service(work)


def test_answers_are_bounded_in_bytes_at_the_cost_of_who_holds_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cache, "MAX_ANSWER_BYTES", 10_000)  # of four answers

    async def work(service: Service) -> None:
        await service.ask("alice", "mine")
        for number in range(9):
            await service.ask("bob", str(number))
        assert service.drawn == 10
        await service.ask("alice", "mine")
        await service.ask("bob", "8")
        assert service.drawn == 10
        await service.ask("bob", "0")
        assert service.drawn == 11

    with_a_service(work)


def test_a_key_is_of_one_request() -> None:
    async def work(service: Service) -> None:
        await service.ask("alice", "k")
        with pytest.raises(ApiError) as caught:
            await service.cache.run_once("alice", "k", "a dog", lambda: asyncio.sleep(0, [IMAGE]))
        assert caught.value.code == "idempotency_key_reused"

    with_a_service(work)


def test_a_linked_image_is_its_client_s_for_an_hour() -> None:
    now = 0.0
    links = LinkedImages(10**6, lambda: now)
    name = links.add("alice", b"image", "webp")
    assert (
        name.endswith(".webp") and len(name) > 40 and name != links.add("alice", b"image", "webp")
    )
    found = links.get("alice", name)
    assert found is not None and (found.encoded, found.format) == (b"image", "webp")
    assert links.get("bob", name) is None
    now = LINK_TTL_S - 1
    assert links.get("alice", name) is not None
    now = LINK_TTL_S + 1
    assert links.get("alice", name) is None


def test_linked_images_are_bounded_at_the_cost_of_who_holds_most() -> None:
    links = LinkedImages(10_000)
    mine = links.add("alice", bytes(1_000), "png")
    others = [links.add("bob", bytes(1_000), "png") for _ in range(9)]
    assert links.get("alice", mine) is not None
    kept = [name for name in others if links.get("bob", name) is not None]
    assert kept == others[-len(kept) :] and len(kept) == 3
