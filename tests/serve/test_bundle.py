"""A real bundle, its weights random, behind the whole service."""

from __future__ import annotations

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from harness import CONFIG, Running
from openai import OpenAI
from PIL import Image
from ray import serve

from serve.app import build_app
from serve.launch import deploy


@pytest.fixture(scope="module")
def client(server: Running, tiny_bundle: Path, pretrained_cache: Path) -> Any:
    home = pretrained_cache.parent
    assert home / "pretrained" == pretrained_cache
    app = build_app(str(tiny_bundle), CONFIG, home=str(home))
    deploy(app, name="bundle", route_prefix="/bundle")
    yield OpenAI(base_url=f"{server.url}/bundle/v1", api_key="none", max_retries=0, timeout=60)
    serve.delete("bundle")


def test_a_bundle_draws(client: OpenAI) -> None:
    def draw(prompt: str, seed: int) -> Any:
        extra = {"seed": seed, "guidance_scale": 3.0, "num_steps": 2}
        return client.images.generate(
            model="champion", prompt=prompt, size="64x64", extra_body=extra
        )

    alone = draw("一个红苹果", 1)
    with ThreadPoolExecutor(4) as users:
        others = [users.submit(draw, f"dog {i}", i) for i in range(3)]
        amid = users.submit(draw, "一个红苹果", 1).result()
    picture = Image.open(io.BytesIO(base64.b64decode(alone.data[0].b64_json)), formats=["PNG"])
    assert (picture.size, picture.mode) == ((64, 64), "RGB")
    assert amid.data[0].b64_json == alone.data[0].b64_json
    assert len({other.result().data[0].b64_json for other in others}) == 3
    assert client.models.retrieve("tiny").styles == ["noto", "twemoji"]
