"""The image API over real HTTP, with the official openai client: pictures, batches, overload."""

from __future__ import annotations

import base64
import io
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from harness import CONFIG, SLOW_S, HashGenerator, Running
from PIL import Image

from pipeline.contracts import MAX_SEED


def draw(server: Running, prompt: str = "a red apple", **extra: Any) -> Any:
    """client.images.generate(...) with Tessera's own fields in extra_body."""
    own = {k: extra.pop(k) for k in ("seed", "guidance_scale", "num_steps") if k in extra}
    return server.openai().images.generate(model="champion", prompt=prompt, extra_body=own, **extra)


def png(picture: Any) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(picture.b64_json)), formats=["PNG"])


def test_openai_client_draws(server: Running) -> None:
    answer = draw(server, n=2, size="64x64", response_format="b64_json", seed=1, guidance_scale=3.0)
    assert [picture.seed for picture in answer.data] == [1, 2]
    assert [(png(p).size, png(p).mode) for p in answer.data] == [((64, 64), "RGB")] * 2
    assert (answer.size, answer.output_format) == ("64x64", "png")
    assert (answer.model, answer.model_version) == ("tiny", "3")
    assert abs(answer.created - time.time()) < 60


def test_a_seed_repeats_its_picture(server: Running) -> None:
    both = draw(server, n=2, seed=1).data
    assert draw(server, seed=1).data[0].b64_json == both[0].b64_json
    assert draw(server, seed=2).data[0].b64_json == both[1].b64_json
    assert both[0].b64_json != both[1].b64_json
    assert draw(server, seed=1, guidance_scale=9).data[0].b64_json != both[0].b64_json


def test_a_seed_is_chosen_and_told_when_absent(server: Running) -> None:
    first, second = draw(server).data[0], draw(server).data[0]
    assert first.seed != second.seed
    assert draw(server, seed=first.seed).data[0].b64_json == first.b64_json


def test_seeds_wrap(server: Running) -> None:
    assert [p.seed for p in draw(server, n=2, seed=MAX_SEED).data] == [MAX_SEED, 0]


def test_neighbours_do_not_change_a_picture(server: Running) -> None:
    alone = draw(server, "slow cat", seed=7).data[0].b64_json
    before = len(server.batch_sizes())
    with ThreadPoolExecutor(8) as users:
        others = [users.submit(draw, server, f"slow dog {i}", seed=7) for i in range(7)]
        amid = users.submit(draw, server, "slow cat", seed=7).result()
    assert amid.data[0].b64_json == alone
    assert len({other.result().data[0].b64_json for other in others}) == 7
    assert max(server.batch_sizes()[before:]) > 1


def test_requests_that_trickle_in_share_model_calls(server: Running) -> None:
    """They come further apart than the batch wait, while the model is busy with the first."""
    before = len(server.batch_sizes())
    with ThreadPoolExecutor(5) as users, server.http() as http:
        calls = []
        for seed in range(5):
            body = {"prompt": "slow cat", "seed": seed}
            calls.append(users.submit(http.post, "/v1/images/generations", json=body))
            time.sleep(2 * CONFIG.batch_wait_s)
        assert [call.result().status_code for call in calls] == [200] * 5
    sizes = server.batch_sizes()[before:]
    assert sum(sizes) == 5 and len(sizes) <= 3


def test_n_pictures_are_drawn_in_full_batches(server: Running) -> None:
    before = len(server.batch_sizes())
    assert len(draw(server, n=10, seed=0).data) == 10
    sizes = server.batch_sizes()[before:]
    assert sum(sizes) == 10 and max(sizes) == CONFIG.max_batch_size


def test_a_png_says_how_it_was_drawn(server: Running) -> None:
    picture = draw(server, "一个红苹果 🍎", seed=3, num_steps=4, style="noto").data[0]
    text = png(picture).text
    assert text["prompt"] == "一个红苹果 🍎"
    assert (text["seed"], text["model"], text["model_version"]) == ("3", "tiny", "3")
    assert json.loads(text["settings"]) == {"num_steps": 4, "style": "noto"}


def test_a_failing_neighbour_harms_nobody(server: Running) -> None:
    prompts = ["slow cat", "slow dog", "explode slow", "refuse slow"]
    with ThreadPoolExecutor(5) as users:
        users.submit(draw, server, "slow first")  # keeps the model busy until the others wait
        time.sleep(SLOW_S / 4)
        answers = list(users.map(lambda prompt: server.post({"prompt": prompt}), prompts))
    assert [answer.status_code for answer in answers] == [200, 200, 500, 400]
    assert "secret" not in answers[2].text and "Traceback" not in answers[2].text
    assert answers[2].headers["x-request-id"] in answers[2].json()["error"]["message"]
    assert answers[3].json()["error"]["param"] == "num_steps"


def test_overload_is_answered_429(server: Running) -> None:
    with ThreadPoolExecutor(40) as users:
        answers = list(users.map(lambda i: server.post({"prompt": f"slow {i}"}), range(40)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    assert len(answers) - len(refused) >= CONFIG.max_queued_requests
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert {answer.json()["error"]["code"] for answer in refused} == {"overloaded"}
    assert len(draw(server, n=10).data) == 10  # what was refused holds no place


def test_models(server: Running) -> None:
    models = server.openai().models.list().data
    assert [model.id for model in models] == [
        "champion",
        "tiny",
        "tessera",
        "dall-e-2",
        "dall-e-3",
        "gpt-image-1",
    ]
    assert models[0].styles == list(HashGenerator.styles)
    assert server.openai().models.retrieve("tiny").version == "3"
    with pytest.raises(openai.NotFoundError) as caught:
        server.openai().images.generate(model="sdxl", prompt="a cat")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_health_and_readiness(server: Running) -> None:
    with server.http() as http:
        assert http.get("/healthz").json() == {"status": "ok"}
        ready = {"status": "ready", "model": "tiny", "model_version": "3"}
        assert http.get("/readyz").json() == ready


def test_every_response_has_one_request_id(server: Running) -> None:
    with server.http() as http:
        for path in ("/healthz", "/nowhere", "/v1/models/none"):
            assert len(http.get(path).headers.get_list("x-request-id")) == 1
        named = http.get("/healthz", headers={"x-request-id": "mine-1"})
        assert named.headers.get_list("x-request-id") == ["mine-1"]
