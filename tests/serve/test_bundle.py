"""Real bundles, their weights random, in a real registry, behind the whole service."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from harness import Running, settings
from openai import OpenAI
from PIL import Image
from ray import serve
from served import free_port
from test_features import mask, png, source

from pipeline.bundles.decisions import Verdict
from pipeline.bundles.registry import ModelRegistry
from pipeline.tracking.runs import Tracker
from serve.app import build_app
from serve.launch import deploy
from serve.listener import Address


@dataclass(frozen=True)
class Served:
    """The champion of a registry, served."""

    client: OpenAI
    tracker: Tracker
    registry: ModelRegistry
    url: str

    def promote(self, bundle: Path) -> None:
        """Register a bundle and make it champion."""
        with self.tracker.run("made") as handle:
            version = self.registry.register(bundle, model_name="tiny", handle=handle)
        over = self.registry.standing("tiny").champion
        self.registry.promote("tiny", version, Verdict(True, over, ("it is newer",)))

    def until(self, said: Callable[[dict[str, Any]], bool]) -> None:
        deadline = time.monotonic() + 120
        with httpx.Client(timeout=60) as http:
            while not said(answer := http.get(f"{self.url}/readyz").json()):
                assert time.monotonic() < deadline, answer
                time.sleep(0.2)


@pytest.fixture(scope="module")
def served(
    server: Running,
    tiny_bundles: dict[str, Path],
    pretrained_cache: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("home")
    (home / "pretrained").symlink_to(pretrained_cache)
    address = Address("127.0.0.1", free_port())
    client = OpenAI(base_url=f"{address.url}/v1", api_key="none", max_retries=0, timeout=120)
    served = Served(client, Tracker(home), ModelRegistry(home), address.url)
    served.promote(tiny_bundles["masked"])
    service = settings(watch_every_s=0.5)
    app = build_app("models:/tiny@champion", service, home=str(home), listen=address)
    deploy(app, name="bundle", route_prefix="/bundle")
    yield served
    serve.delete("bundle")


def pixels(picture: Any) -> np.ndarray[Any, Any]:
    encoded = base64.b64decode(picture.b64_json)
    return np.asarray(Image.open(io.BytesIO(encoded), formats=["PNG"]))


def test_a_bundle_draws(served: Served) -> None:
    def draw(prompt: str, seed: int) -> Any:
        extra = {"seed": seed, "guidance_scale": 3.0, "num_steps": 2}
        return served.client.images.generate(
            model="champion", prompt=prompt, size="64x64", extra_body=extra
        )

    alone = draw("一个红苹果", 1)
    with ThreadPoolExecutor(4) as users:
        others = [users.submit(draw, f"dog {i}", i) for i in range(3)]
        amid = users.submit(draw, "一个红苹果", 1).result()
    assert pixels(alone.data[0]).shape == (64, 64, 3)
    assert amid.data[0].b64_json == alone.data[0].b64_json
    assert len({other.result().data[0].b64_json for other in others}) == 3
    assert alone.usage.output_tokens == 64 and alone.usage.input_tokens > 2
    model = served.client.models.retrieve("tiny")
    assert (model.version, model.styles) == ("1", ["noto", "twemoji"])


def test_a_bundle_edits_and_varies(served: Served) -> None:
    image = ("image.png", png(source()))
    edited = served.client.images.edit(
        image=image, mask=("mask.png", png(mask())), prompt="a red apple", extra_body={"seed": 2}
    )
    original = np.asarray(source().resize((64, 64), Image.Resampling.LANCZOS))
    drawn = pixels(edited.data[0])
    assert np.array_equal(drawn[:32], original[:32])
    assert np.array_equal(drawn[:, :32], original[:, :32])
    assert not np.array_equal(drawn[32:, 32:], original[32:, 32:])
    varied = served.client.images.create_variation(image=image, n=2).data
    assert varied[0].b64_json != varied[1].b64_json


def test_a_moved_champion_is_followed_and_a_bad_bundle_refused(
    served: Served, tiny_bundles: dict[str, Path], tmp_path: Path
) -> None:
    stop, versions = threading.Event(), list[str]()

    def user() -> None:
        while not stop.is_set():
            answer = served.client.images.generate(prompt="a cat")
            versions.append(answer.model_version)

    with ThreadPoolExecutor(1) as users:
        drawing = users.submit(user)
        try:
            served.promote(tiny_bundles["gan"])
            served.until(lambda ready: ready.get("model_version") == "2")
            served.until(lambda ready: drawing.done() or versions[-1:] == ["2"])
        finally:
            stop.set()
        drawing.result()  # no request failed
    assert versions == sorted(versions) and set(versions) == {"1", "2"}

    damaged = tmp_path / "damaged"
    (damaged / "tokenizer").mkdir(parents=True)
    for file in tiny_bundles["masked"].rglob("*.*"):
        (damaged / file.relative_to(tiny_bundles["masked"])).write_bytes(file.read_bytes())
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    served.promote(damaged)
    served.until(lambda ready: "version 3 is refused" in ready.get("notice", ""))
    assert served.client.images.generate(prompt="a cat").model_version == "2"
    with pytest.raises(openai.BadRequestError) as caught:  # the gan draws, and that is all
        served.client.images.create_variation(image=("image.png", png(source())))
    assert caught.value.code == "unsupported_task"
