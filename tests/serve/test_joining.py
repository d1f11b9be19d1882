"""Pictures of a causal model join a batch that is under way and leave it when they are done."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config import GeneratorConfig
from pipeline.contracts import ContinuousBatch, GenerationRequest, ModelParts, ModelSpec
from pipeline.errors import RequestError
from pipeline.models.causal import CausalConfig
from pipeline.models.decoding.sequential import SequentialDecoding
from pipeline.models.networks import causal
from pipeline.models.networks.causal import CausalGenerator
from pipeline.text.caption_readers import HFCaptionTokenizer
from serve.batch import DeadlineExceeded, QueuedRequest, RawImage
from serve.engine import Engine

CONFIG = GeneratorConfig(
    family="causal", width=32, depth=2, heads=2, dropout=0, num_styles=3, guidance_scale=2.0,
    causal=CausalConfig(max_prompt_tokens=12),
)  # fmt: skip
TOKENS = 16


class Grey:
    """A tokenizer whose tokens are shades."""

    image_size, grid_size, codebook_size = 32, 4, 40
    levels: tuple[int, ...] = ()

    def encode(self, images: Tensor) -> Tensor:
        cells = torch.nn.functional.avg_pool2d(images, 8).mean(1).flatten(1)
        return ((cells + 1) * 19.5).round().long()

    def decode(self, image_tokens: Tensor) -> Tensor:
        shades = image_tokens.view(-1, 1, 4, 4) / 19.5 - 1
        return shades.repeat_interleave(8, 2).repeat_interleave(8, 3).expand(-1, 3, -1, -1)


@pytest.fixture(scope="module")
def model() -> CausalGenerator:
    torch.manual_seed(0)
    spec = ModelSpec(
        image_size=32, codebook_size=40, num_tokens=TOKENS, levels=(), caption_width=8,
        styles=("a", "b"), language_model=causal.language_model_config(CONFIG, None),
    )  # fmt: skip
    made = causal.CausalTransformer(CONFIG, spec)
    for parameter in made.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    ids = HFCaptionTokenizer(None, 12)
    parts = ModelParts(Grey(), None, torch.device("cpu"), ids)  # type: ignore[arg-type]
    return CausalGenerator(made, CONFIG, spec, parts)


REQUESTS = [
    GenerationRequest("a red house", seed=1, style="a"),
    GenerationRequest("猫", seed=2, guidance_scale=1.0),
    GenerationRequest("a dog", seed=3, temperature=0.5, guidance_scale=4.0),
    GenerationRequest("a red house", seed=4, style="b", temperature=0.0),
]


def test_a_picture_does_not_show_when_it_joined(model: CausalGenerator) -> None:
    alone = [model.generate([request])[0] for request in REQUESTS]
    drawing = model.start(REQUESTS[:1])
    assert isinstance(drawing, ContinuousBatch) and drawing.joinable
    joins = {3: [REQUESTS[1]], 7: REQUESTS[2:]}
    for step in range(3 * TOKENS):
        if step in joins:
            drawing.join(joins[step])
        drawing.step()
        if step == TOKENS - 1:
            assert torch.equal(drawing.images([0])[0], alone[0])
            drawing.forget([0])
            assert [drawing.progress(row)[0] for row in (1, 2, 3)] == [13, 9, 9]
    assert torch.equal(drawing.images([1, 2, 3]), torch.stack(alone[1:]))
    assert not drawing.step(), "all are done"
    assert list(drawing.join([REQUESTS[0]])) == [4], "it may begin again"
    while drawing.step():
        pass
    assert torch.equal(drawing.images([4])[0], alone[0])


def test_dropped_pictures_cost_no_more_steps(model: CausalGenerator) -> None:
    drawing = model.start(REQUESTS)
    drawing.step()
    drawing.drop([0, 1, 2])
    rows = []
    step = drawing._decoder.step
    drawing._decoder.step = lambda inputs: rows.append(len(inputs)) or step(inputs)  # type: ignore
    while drawing.step():
        pass
    assert set(rows) == {2}, "one picture, guided and not"
    assert drawing.progress(0) == (1, TOKENS) and drawing.progress(3) == (TOKENS, TOKENS)


def test_a_picture_in_the_making_is_white_where_nothing_is_drawn(
    model: CausalGenerator,
) -> None:
    drawing = model.start(REQUESTS[:1])
    for _ in range(8):
        drawing.step()
    half, whole = drawing.images([0])[0], model.generate(REQUESTS[:1])[0]
    assert torch.equal(half[:, :16], whole[:, :16])
    assert (half[:, 16:] == 255).all() and not (whole[:, 16:] == 255).all()


def test_a_refused_request_changes_nothing(model: CausalGenerator) -> None:
    drawing = model.start(REQUESTS[:1])
    drawing.step()
    with pytest.raises(RequestError, match="num_steps"):
        drawing.join([replace(REQUESTS[1], num_steps=3)])
    while drawing.step():
        pass
    assert torch.equal(drawing.images([0]), model.generate(REQUESTS[:1]))


def test_the_engine_lets_pictures_in_between_steps(
    model: CausalGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, seated = SequentialDecoding.step, []

    def slow(self: SequentialDecoding) -> bool:
        time.sleep(0.03)
        seated.append(len(self._states))
        return step(self)

    monkeypatch.setattr(SequentialDecoding, "step", slow)

    async def main() -> list[Any]:
        engine = Engine(model, max_batch_size=3, batch_wait_s=0.01)
        deadline = time.time() + 60
        places: list[QueuedRequest] = []
        for request in REQUESTS:
            places.append(engine.submit(request, deadline=deadline, num_partial_images=1))
            await asyncio.sleep(0.1)
        refused = engine.submit(replace(REQUESTS[0], num_steps=3), deadline=deadline)
        gone = engine.submit(REQUESTS[1], deadline=deadline)
        await asyncio.sleep(0.45)
        gone.done.cancel()
        found = await asyncio.gather(*[p.done for p in (*places, refused)], return_exceptions=True)
        assert all(place.partial_images.qsize() == 1 for place in places)
        engine.close()
        return found

    *drawn, refused = asyncio.run(main())
    assert isinstance(refused, RequestError)
    for picture, request in zip(drawn, REQUESTS, strict=True):
        assert isinstance(picture, RawImage)
        assert torch.equal(picture.pixels, model.generate([request])[0])
    assert drawn[1].queue_s < drawn[0].model_s / 2, "it did not wait for the first to end"
    assert max(seated) == 3


def test_nobody_waits_for_who_may_join_later(model: CausalGenerator) -> None:
    async def main() -> None:
        engine = Engine(model, max_batch_size=3, batch_wait_s=10.0)
        for _ in range(2):  # the second time just after a shared batch
            places = [engine.submit(request, deadline=time.time() + 60) for request in REQUESTS[:2]]
            assert all([(await place.done).queue_s < 1.0 for place in places])
            await asyncio.sleep(0.2)  # that batch is over
        engine.close()

    asyncio.run(main())


def test_under_a_load_that_never_ends_who_cannot_be_in_time_is_told_early(
    model: CausalGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, join, joined = SequentialDecoding.step, SequentialDecoding.join, list[str]()

    def slow(self: SequentialDecoding) -> bool:
        time.sleep(0.03)
        return step(self)

    def seen(self: SequentialDecoding, requests: Sequence[GenerationRequest]) -> Sequence[int]:
        joined.extend(request.prompt for request in requests)
        return join(self, requests)

    monkeypatch.setattr(SequentialDecoding, "step", slow)
    monkeypatch.setattr(SequentialDecoding, "join", seen)

    async def main() -> None:
        engine = Engine(model, max_batch_size=3, batch_wait_s=0.01)

        def enter(prompt: str, left_s: float) -> QueuedRequest:
            return engine.submit(GenerationRequest(prompt), deadline=time.time() + left_s)

        first = enter("first", 60)
        await asyncio.sleep(0.2)
        second = enter("second", 60)
        await first.done  # the second one keeps the batch going
        with pytest.raises(DeadlineExceeded):
            await enter("hurried", 0.2).done
        await second.done
        engine.close()

    asyncio.run(main())
    assert joined == ["first", "second"], "the hurried one is told before it is drawn"
