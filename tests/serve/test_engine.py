"""The queue and the batches of a replica, without Ray: who leaves, who is late, what is shown."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import SLOW_S, STEPS, HashDrawing, HashGenerator, settings

from pipeline.contracts import GenerationRequest
from pipeline.errors import BundleError
from serve.batch import DeadlineExceeded, QueuedRequest
from serve.engine import Engine
from serve.messages import GeneratedImage, ImageJob, PartialImage, Refusal
from serve.replica import GeneratorReplica
from serve.versions import ModelVersion

SLOW = GenerationRequest("slow cat")
LONG = 60.0


def run(tmp_path: Path, work: Callable[[Engine], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        engine = Engine(HashGenerator(tmp_path / "log"), max_batch_size=4, batch_wait_s=0.02)
        try:
            return await work(engine)
        finally:
            engine.close()

    return asyncio.run(main())


def enter(
    engine: Engine, request: GenerationRequest, left_s: float = LONG, **more: Any
) -> QueuedRequest:
    return engine.submit(request, deadline=time.time() + left_s, **more)


def steps(tmp_path: Path) -> list[int]:
    return [int(line) for line in (tmp_path / "log.steps").read_text().split()]


def test_who_waits_is_drawn_together_in_turn(tmp_path: Path) -> None:
    async def work(engine: Engine) -> None:
        places = [enter(engine, replace(SLOW, seed=i)) for i in range(6)]
        drawn = await asyncio.gather(*[place.done for place in places])
        assert [picture.batch_size for picture in drawn] == [4, 4, 4, 4, 2, 2]
        assert drawn[5].queue_s > SLOW_S * 0.8 > drawn[0].queue_s
        assert drawn[0].tokens is not None and drawn[0].tokens.text == 2

    run(tmp_path, work)


def patient(tmp_path: Path, work: Callable[[Engine], Awaitable[Any]]) -> None:
    """Run `work` with an engine that would wait ten seconds for a batch to fill."""

    async def main() -> None:
        engine = Engine(HashGenerator(tmp_path / "log"), max_batch_size=4, batch_wait_s=10.0)
        await work(engine)
        engine.close()

    asyncio.run(main())


def test_who_is_alone_does_not_wait_and_who_shared_a_batch_meets_again(tmp_path: Path) -> None:
    async def work(engine: Engine) -> None:
        began = time.monotonic()
        drawn = await enter(engine, GenerationRequest("cat")).done
        assert (drawn.batch_size, drawn.queue_s < 1.0) == (1, True)
        for pause_s in (0.0, 0.05):  # who comes back one after the other is waited for
            places = []
            for seed in range(4):
                places.append(enter(engine, replace(SLOW, seed=seed), num_following=3 - seed))
                await asyncio.sleep(pause_s)
            drawn = await asyncio.gather(*[place.done for place in places])
            assert [picture.batch_size for picture in drawn] == [4] * 4
        assert time.monotonic() - began < 8.0

    patient(tmp_path, work)


def test_two_who_took_turns_draw_together(tmp_path: Path) -> None:
    async def work(engine: Engine) -> None:
        first = enter(engine, SLOW)
        await asyncio.sleep(SLOW_S / 4)
        second = enter(engine, replace(SLOW, seed=1))  # finds the first one drawing
        assert (await first.done).batch_size == 1
        again = enter(engine, replace(SLOW, seed=2), num_following=2)
        third = enter(engine, replace(SLOW, seed=3)), enter(engine, replace(SLOW, seed=4))
        drawn = await asyncio.gather(*[place.done for place in (second, again, *third)])
        assert [picture.batch_size for picture in drawn] == [4] * 4

    patient(tmp_path, work)


def test_siblings_that_never_come_are_hardly_waited_for(tmp_path: Path) -> None:
    async def work(engine: Engine) -> None:
        drawn = await enter(engine, GenerationRequest("cat"), num_following=9).done
        assert (drawn.batch_size, drawn.queue_s < 1.0) == (1, True)

    patient(tmp_path, work)


def test_who_leaves_frees_the_place_within_a_step(tmp_path: Path) -> None:
    async def work(engine: Engine) -> None:
        gone, stays = enter(engine, replace(SLOW, seed=1)), enter(engine, replace(SLOW, seed=2))
        never = [enter(engine, replace(SLOW, seed=i)) for i in range(3, 8)]
        for place in never[2:]:
            place.done.cancel()  # still in line
        await asyncio.sleep(SLOW_S / STEPS * 1.5)
        gone.done.cancel()
        await stays.done

    run(tmp_path, work)
    rows = steps(tmp_path)
    assert rows[:2] == [4, 4] and rows[2:4] == [3, 3]
    assert sum(rows) == 14, "whoever left the line was never drawn"


def test_when_all_have_left_the_model_is_free(tmp_path: Path) -> None:
    async def work(engine: Engine) -> float:
        place = enter(engine, GenerationRequest("endless"))
        await asyncio.sleep(0.2)
        place.done.cancel()
        began = time.monotonic()
        await enter(engine, GenerationRequest("cat")).done
        return time.monotonic() - began

    assert run(tmp_path, work) < 2.0


def test_who_cannot_be_in_time_is_told_early(tmp_path: Path) -> None:
    async def work(engine: Engine) -> None:
        await enter(engine, SLOW).done  # now it knows how long a batch takes
        drawing = enter(engine, GenerationRequest("endless"), left_s=LONG)
        waiting = enter(engine, SLOW, left_s=SLOW_S / 4)
        with pytest.raises(DeadlineExceeded):
            await waiting.done
        drawing.done.cancel()
        with pytest.raises(DeadlineExceeded):
            await enter(engine, GenerationRequest("endless"), left_s=1.2).done

    run(tmp_path, work)


def test_one_slow_picture_does_not_turn_everyone_away_for_ever(tmp_path: Path) -> None:
    async def work(engine: Engine) -> None:
        engine._record_duration(100.0)  # as a machine that slept would have it
        outcomes = []
        for seed in range(12):
            place = enter(engine, GenerationRequest("cat", seed=seed), left_s=5.0)
            outcomes.append(await asyncio.gather(place.done, return_exceptions=True))
        late = [isinstance(outcome, DeadlineExceeded) for (outcome,) in outcomes]
        assert late[0] and not late[-1] and late == sorted(late, reverse=True)

    run(tmp_path, work)


def test_pictures_in_the_making(tmp_path: Path) -> None:
    async def work(engine: Engine) -> list[tuple[int, torch.Tensor]]:
        place = enter(engine, SLOW, num_partial_images=3)
        plain = enter(engine, replace(SLOW, seed=1))
        await asyncio.gather(place.done, plain.done)
        assert plain.partial_images.empty()
        return [place.partial_images.get_nowait() for _ in range(place.partial_images.qsize())]

    shown = run(tmp_path, work)
    assert [number for number, _ in shown] == [0, 1, 2]
    assert not torch.equal(shown[0][1], shown[2][1])


def test_a_failing_neighbour_harms_nobody(tmp_path: Path) -> None:
    async def work(engine: Engine) -> list[Any]:
        prompts = ["cat", "explode", "refuse"]
        places = [enter(engine, GenerationRequest(prompt)) for prompt in prompts]
        return await asyncio.gather(*[place.done for place in places], return_exceptions=True)

    fine, exploded, refused = run(tmp_path, work)
    assert fine.pixels.shape == (3, 64, 64)
    assert isinstance(exploded, RuntimeError) and refused.param == "num_steps"


def image_job(prompt: str, **more: Any) -> ImageJob:
    return ImageJob(GenerationRequest(prompt), deadline=time.time() + LONG, **more)


class Registry:
    """What an alias stands for, as a test wants it."""

    def __init__(self, log: Path) -> None:
        self.log, self.version = log, "1"
        self.niceness: dict[str, int] = {}  # of the thread that loaded a version

    def __call__(self) -> ModelVersion:
        if self.version == "gone":
            raise BundleError("no answer from https://me:secret@registry")
        return ModelVersion("tiny", self.version, partial(self._load, self.version))

    def _load(self, version: str) -> HashGenerator:
        if version == "bad":
            raise BundleError("/srv/model.safetensors is damaged")
        self.niceness[version] = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        return HashGenerator(self.log)


def test_a_moved_alias_is_followed_and_a_bad_bundle_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        registry = Registry(tmp_path / "log")
        replica = GeneratorReplica(registry(), registry, settings(watch_every_s=0.02))

        async def until(version: str, notice: str) -> None:
            async with asyncio.timeout(10):
                while True:
                    model = await replica.model_info()
                    if model.version == version and notice in model.notice:
                        return
                    await asyncio.sleep(0.01)

        job = image_job("slow cat")
        during = asyncio.ensure_future(replica.generate(job))
        await asyncio.sleep(SLOW_S / 2)
        registry.version = "2"
        await until("2", "")
        assert (await during).model.version == "1"  # type: ignore[union-attr]
        assert (await replica.generate(job)).model.version == "2"  # type: ignore[union-attr]
        registry.version = "bad"
        await until("2", "version bad is refused; the replicas' log says why")
        drawn = await replica.generate(job)
        assert isinstance(drawn, GeneratedImage) and "/srv" not in drawn.model.notice
        registry.version = "gone"
        await until("2", "the registry does not answer")
        assert "secret" not in (await replica.model_info()).notice
        registry.version = "bad"
        await until("2", "version bad is refused")
        assert "/srv" in caplog.text and "secret" in caplog.text
        registry.version = "3"
        await until("3", "")
        assert (await replica.model_info()).notice == ""
        if sys.platform == "linux":  # where loading gives way to drawing
            assert registry.niceness["1"] < registry.niceness["2"] == registry.niceness["3"]

    asyncio.run(main())


@pytest.mark.parametrize(("now", "served"), [("2", "2"), ("gone", "1"), ("bad", "1")])
def test_a_replica_that_starts_later_begins_with_what_the_alias_stands_for(
    now: str, served: str, tmp_path: Path
) -> None:
    async def main() -> None:
        registry = Registry(tmp_path / "log")
        built = registry()
        registry.version = now
        replica = GeneratorReplica(built, registry, settings(watch_every_s=60))
        assert (await replica.model_info()).version == served

    asyncio.run(main())


def test_a_stream_shows_then_finishes_and_leaving_it_frees_the_place(tmp_path: Path) -> None:
    async def main() -> None:
        version = ModelVersion("tiny", "1", lambda: HashGenerator(tmp_path / "log"))
        replica = GeneratorReplica(version, None, settings())
        job = image_job("slow cat", num_partial_images=2)
        seen = [answer async for answer in replica.stream(job)]
        assert [type(answer) for answer in seen] == [PartialImage, PartialImage, GeneratedImage]
        assert seen[0].encoded != seen[1].encoded  # type: ignore[union-attr]
        endless = ImageJob(
            GenerationRequest("endless"), deadline=time.time() + LONG, num_partial_images=3
        )
        stream = replica.stream(endless)
        await anext(stream)
        await stream.aclose()
        began = time.monotonic()
        await replica.generate(image_job("cat"))
        assert time.monotonic() - began < 2.0

    asyncio.run(main())


class LostDevice(HashGenerator):
    """Fails as a GPU does, once and for all."""

    def start(self, requests: Sequence[GenerationRequest]) -> HashDrawing:
        if any("explode" in request.prompt for request in requests):
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return super().start(requests)


def test_a_replica_whose_gpu_has_failed_is_not_healthy(tmp_path: Path) -> None:
    async def main() -> None:
        version = ModelVersion("tiny", "1", lambda: LostDevice(tmp_path / "log"))
        replica = GeneratorReplica(version, None, settings())

        async def draw(prompt: str) -> Any:
            return await replica.generate(
                ImageJob(GenerationRequest(prompt), deadline=time.time() + LONG)
            )

        assert isinstance(await draw("refuse"), Refusal)
        await replica.check_health()
        with pytest.raises(torch.AcceleratorError):
            await draw("explode")
        with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
            await replica.check_health()

    asyncio.run(main())


class Censor:
    """A serve.safety.Safety that lets no picture pass."""

    def prompt(self, text: str) -> str | None:
        return None

    def picture(self, pixels: Any) -> str | None:
        assert pixels.shape == (64, 64, 3)
        return "not this one"


def test_a_picture_may_be_refused(tmp_path: Path) -> None:
    async def main() -> Any:
        version = ModelVersion("tiny", "1", lambda: HashGenerator(tmp_path / "log"))
        replica = GeneratorReplica(version, None, settings(safety=f"{__name__}:Censor"))
        return await replica.generate(
            ImageJob(GenerationRequest("cat"), deadline=time.time() + LONG)
        )

    assert asyncio.run(main()) == Refusal("not this one", None, "content_policy_violation")


def test_previews_of_a_refused_picture_are_not_shown(tmp_path: Path) -> None:
    async def main() -> list[Any]:
        version = ModelVersion("tiny", "1", lambda: HashGenerator(tmp_path / "log"))
        replica = GeneratorReplica(version, None, settings(safety=f"{__name__}:Censor"))
        job = ImageJob(
            GenerationRequest("slow cat"), deadline=time.time() + LONG, num_partial_images=3
        )
        return [answer async for answer in replica.stream(job)]

    assert asyncio.run(main()) == [Refusal("not this one", None, "content_policy_violation")]


def test_an_exchanged_model_is_let_go(tmp_path: Path) -> None:
    async def work(engine: Engine) -> None:
        old = weakref.ref(engine.model)
        await enter(engine, GenerationRequest("cat")).done
        engine.model = HashGenerator(tmp_path / "log")
        await asyncio.sleep(0.05)
        gc.collect()
        assert old() is None

    run(tmp_path, work)
