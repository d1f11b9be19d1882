"""Streams, edits, variations, formats, clients that leave and replicas that die, over real HTTP."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import threading
import time
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from harness import SLOW_S, STEPS, Running
from PIL import Image
from test_mistakes import check_envelope

from serve.encode import source_type

PROMPT = "a red apple"


def decoded(b64: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64)), formats=["PNG", "JPEG", "WEBP"])


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def source(size: int = 128, mode: str = "RGB") -> Image.Image:
    """A colourful square, 2x2 blocks so that halving it loses nothing."""
    small = np.random.default_rng(0).integers(0, 256, (size // 2, size // 2, 3), np.uint8)
    return Image.fromarray(small.repeat(2, 0).repeat(2, 1)).convert(mode)


def mask(size: int = 128) -> Image.Image:
    """Transparent in the lower right quarter."""
    alpha = np.full((size, size, 4), 255, np.uint8)
    alpha[size // 2 :, size // 2 :, 3] = 0
    return Image.fromarray(alpha)


def test_a_stream_shows_the_picture_in_the_making(server: Running) -> None:
    stream = server.openai().images.generate(
        model="champion", prompt=f"slow {PROMPT}", stream=True, partial_images=2,
        extra_body={"seed": 5},
    )  # fmt: skip
    came, seen = [], []
    for event in stream:
        came.append(time.monotonic())
        seen.append(event)
    partial, done = "image_generation.partial_image", "image_generation.completed"
    assert [event.type for event in seen] == [partial, partial, done]
    assert [event.partial_image_index for event in seen[:2]] == [0, 1]
    assert len({event.b64_json for event in seen}) == 3
    assert came[2] - came[0] > SLOW_S / STEPS, "previews come while it is drawn"
    assert (seen[2].size, seen[2].output_format, seen[2].seed) == ("64x64", "png", 5)
    assert seen[2].usage.total_tokens == 20
    whole = server.openai().images.generate(prompt=f"slow {PROMPT}", extra_body={"seed": 5})
    assert whole.data[0].b64_json == seen[2].b64_json


def test_a_stream_fails_with_a_status_before_and_with_an_event_after(server: Running) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.openai().images.generate(prompt="refuse", stream=True, partial_images=1)
    assert caught.value.param == "num_steps"


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_formats_say_that_a_machine_drew(server: Running, kind: str) -> None:
    answer = server.openai().images.generate(
        prompt="一个红苹果", output_format=kind, response_format="url", user="me",
        background="opaque", extra_body={"seed": 3, "negative_prompt": "green"},
    )  # fmt: skip
    url = answer.data[0].url
    assert url.startswith(f"{server.url}/files/") and answer.data[0].b64_json is None
    with urllib.request.urlopen(url) as opened:
        content = opened.read()
        assert opened.headers["content-type"] == f"image/{kind}"
    picture = Image.open(io.BytesIO(content), formats=[kind])
    assert picture.size == (64, 64) and answer.output_format == kind
    assert source_type(composite=False).encode() in content
    if kind == "png":
        said = dict(picture.text)
    else:
        comment = picture.getexif().get_ifd(0x8769)[0x9286]
        said = json.loads(comment.removeprefix(b"UNICODE\0").decode("utf-16-be"))
    assert (said["prompt"], said["seed"], said["model_version"]) == ("一个红苹果", "3", "3")
    assert json.loads(said["settings"]) == {"negative_prompt": "green"}


def test_compression_makes_it_smaller(server: Running) -> None:
    def size(compression: int) -> int:
        answer = server.openai().images.generate(
            prompt=PROMPT, output_format="jpeg", output_compression=compression,
            extra_body={"seed": 1},
        )  # fmt: skip
        return len(answer.data[0].b64_json)

    assert size(10) < size(100) / 2


def test_usage_is_counted(server: Running) -> None:
    usage = server.openai().images.generate(prompt=PROMPT, n=2).usage
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (6, 32, 38)
    assert usage.input_tokens_details.text_tokens == 6


@pytest.mark.parametrize("own_alpha", [False, True])
def test_an_edit_changes_what_the_mask_leaves_open(server: Running, own_alpha: bool) -> None:
    image, files = source(), {}
    if own_alpha:
        image.putalpha(mask().getchannel("A"))
    else:
        files["mask"] = ("mask.png", png(mask()))
    answer = server.openai().images.edit(
        image=("image.png", png(image)), prompt=PROMPT, n=2, extra_body={"seed": 1}, **files
    )
    original = np.asarray(source().resize((64, 64), Image.Resampling.LANCZOS))
    for picture in answer.data:
        drawn = np.asarray(decoded(picture.b64_json))
        assert np.array_equal(drawn[:28, :28], original[:28, :28]), "kept"
        assert (drawn[36:, 36:] != original[36:, 36:]).mean() > 0.9, "drawn"
    assert answer.data[0].b64_json != answer.data[1].b64_json
    assert answer.usage.input_tokens_details.image_tokens == 32


def test_an_edit_streams_too(server: Running) -> None:
    stream = server.openai().images.edit(
        image=[("image.png", png(source()))], mask=("mask.png", png(mask())), prompt=PROMPT,
        stream=True, partial_images=1,
    )  # fmt: skip
    kinds = [event.type for event in stream]
    assert kinds == ["image_edit.partial_image", "image_edit.completed"]


def test_variations_need_no_prompt(server: Running) -> None:
    answer = server.openai().images.create_variation(
        image=("image.png", png(source())), n=2, extra_body={"variation": 0.3}
    )
    assert decoded(answer.data[0].b64_json).size == (64, 64)
    assert answer.data[0].b64_json != answer.data[1].b64_json


def bomb() -> bytes:
    """A PNG that says it is 50,000 pixels wide and high."""
    head = bytearray(png(source()))
    head[16:24] = (50_000).to_bytes(4, "big") * 2
    head[29:33] = zlib.crc32(head[12:29]).to_bytes(4, "big")
    return bytes(head)


IMAGE = ("image.png", png(source()))
MASK = ("mask.png", png(mask()))
FORMS: list[tuple[str, dict[str, Any], Any, int, str | None, str]] = [
    ("edits", {"prompt": "a"}, {"mask": MASK}, 400, "image", "missing_required_parameter"),
    ("edits", {}, {"image": IMAGE, "mask": MASK}, 400, "prompt", "missing_required_parameter"),
    ("edits", {"prompt": "a", "strength": "0"}, {"image": IMAGE}, 400, "strength", "invalid_value"),
    ("edits", {"prompt": "a"}, {"image": IMAGE, "mask": IMAGE}, 400, "mask", "invalid_value"),
    (
        "edits",
        {"prompt": "a"},
        {"image": IMAGE, "mask": ("m.png", png(mask().crop((0, 0, 128, 64))))},
        400,
        "mask",
        "invalid_value",
    ),
    (
        "edits",
        {"prompt": "a"},
        {"image": IMAGE, "mask": ("m.png", png(source(mode="RGBA")))},
        400,
        "mask",
        "invalid_value",
    ),
    (
        "edits",
        {"prompt": "a"},
        [("image[]", IMAGE), ("image[]", IMAGE), ("mask", MASK)],
        400,
        "image",
        "invalid_value",
    ),
    (
        "edits",
        {"prompt": ["a", "b"]},
        {"image": IMAGE, "mask": MASK},
        400,
        "prompt",
        "invalid_value",
    ),
    ("edits", {"prompt": ""}, {"image": IMAGE}, 400, "prompt", "missing_required_parameter"),
    ("edits", {"prompt": "a" * 32_001}, {"image": IMAGE}, 400, "prompt", "invalid_value"),
    ("edits", {"prompt": "a" * 200_000}, {"image": IMAGE}, 400, None, "invalid_multipart"),
    ("edits", {"prompt": "a", "x": ""}, {"image": IMAGE}, 400, "x", "unknown_parameter"),
    (
        "edits",
        {"prompt": "a"},
        [(f"image{i}", IMAGE) for i in range(9)],
        400,
        None,
        "invalid_multipart",
    ),
    ("edits", {f"x{i}": "1" for i in range(41)}, {"image": IMAGE}, 400, None, "invalid_multipart"),
    ("edits", {"prompt": "a", "n": "two"}, {"image": IMAGE}, 400, "n", "invalid_value"),
    ("edits", {"prompt": "a", "n": "11"}, {"image": IMAGE}, 400, "n", "invalid_value"),
    ("edits", {"prompt": "a", "x": "1"}, {"image": IMAGE}, 400, "x", "unknown_parameter"),
    ("edits", {"prompt": "a"}, {"image": IMAGE, "y": IMAGE}, 400, "y", "unknown_parameter"),
    ("edits", {"prompt": "a", "image": "text"}, {"mask": MASK}, 400, "image", "invalid_type"),
    ("edits", {}, {"image": IMAGE, "prompt": ("p", b"a")}, 400, "prompt", "invalid_type"),
    ("variations", {"prompt": "a"}, {"image": IMAGE}, 400, "prompt", "unknown_parameter"),
    ("variations", {"variation": "0"}, {"image": IMAGE}, 400, "variation", "invalid_value"),
    ("variations", {"variation": "nan"}, {"image": IMAGE}, 400, "variation", "invalid_value"),
    ("variations", {}, {"image": ("a.png", b"")}, 400, "image", "invalid_value"),
    ("variations", {}, {"image": ("a.png", b"no picture")}, 400, "image", "invalid_value"),
    ("variations", {}, {"image": ("a.svg", b"<svg/>")}, 400, "image", "invalid_value"),
    ("variations", {}, {"image": ("a.png", IMAGE[1][:2000])}, 400, "image", "invalid_value"),
    ("variations", {}, {"image": ("a.png", bomb())}, 400, "image", "invalid_value"),
    (
        "variations",
        {},
        {"image": ("a.png", png(source().resize((200, 20))))},
        400,
        "image",
        "invalid_value",
    ),
    (
        "variations",
        {},
        {"image": ("a.png", png(source().resize((8, 8))))},
        400,
        "image",
        "invalid_value",
    ),
    ("variations", {}, {"image": ("a.png", b"\0" * 8_100_000)}, 413, None, "request_too_large"),
]


@pytest.mark.parametrize(("path", "fields", "files", "status", "param", "code"), FORMS)
def test_mistakes_in_forms(
    server: Running,
    path: str,
    fields: dict[str, Any],
    files: Any,
    status: int,
    param: str | None,
    code: str,
) -> None:
    with server.http() as http:
        answer = http.post(f"/v1/images/{path}", data=fields, files=files)
    check_envelope(answer, status, param, code)


BODY = b'--b\r\ncontent-disposition: form-data; name="image"; filename="a"\r\n\r\nxx\r\n--b--\r\n'
MULTIPART = {"content-type": "multipart/form-data; boundary=b"}


@pytest.mark.parametrize(
    ("content", "headers", "status", "code"),
    [
        (BODY, {"content-type": "application/json"}, 415, "unsupported_media_type"),
        (BODY, {"content-type": "multipart/form-data"}, 415, "unsupported_media_type"),
        (BODY[:-12], MULTIPART, 400, "invalid_multipart"),
        (b"", MULTIPART, 400, "invalid_multipart"),
        (b"junk--b--", MULTIPART, 400, "invalid_multipart"),
        (BODY.replace(b'name="image"', b"nothing"), MULTIPART, 400, "invalid_multipart"),
        (BODY, MULTIPART, 400, "invalid_value"),
        (
            BODY.replace(b'; filename="a"', b""),
            {"content-type": "multipart/form-data; boundary=b; charset=undefined"},
            400,
            "invalid_multipart",
        ),
    ],
)
def test_mistakes_in_multipart(
    server: Running, content: bytes, headers: dict[str, str], status: int, code: str
) -> None:
    with server.http() as http:
        answer = http.post("/v1/images/variations", content=content, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_a_client_that_leaves_frees_its_place(server: Running) -> None:
    """Endless pictures fill every place; all clients go; the next one is drawn at once."""

    def leave(seed: int) -> None:
        body = {"prompt": "endless", "seed": seed}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=1.5)

    before = len(server.rows_by_step())
    with ThreadPoolExecutor(6) as users:
        list(users.map(leave, range(6)))
    time.sleep(2.5)
    settled = len(server.rows_by_step())
    began = time.monotonic()
    assert server.post({"prompt": "a cat"}).status_code == 200
    assert time.monotonic() - began < 2.0
    rows = server.rows_by_step()[before:]
    assert sum(rows) < 6 * STEPS, rows
    assert len(server.rows_by_step()) - settled <= STEPS + 1


def test_who_cannot_wait_is_told_in_time(server: Running) -> None:
    began = time.monotonic()
    with server.http() as http:
        answer = http.post(
            "/v1/images/generations",
            json={"prompt": "endless"},
            headers={"x-deadline-s": "0.5"},
        )
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "deadline_exceeded")
    assert answer.headers["retry-after"] == "1" and time.monotonic() - began < 3.0


def test_a_killed_replica_costs_nobody_a_picture(server: Running) -> None:
    expected = server.post({"prompt": "slow cat", "seed": 9}).json()["data"][0]
    killer = threading.Timer(SLOW_S / 2, os.kill, (server.pid(), signal.SIGKILL))
    killer.start()
    with ThreadPoolExecutor(4) as users:
        bodies = [{"prompt": "slow cat", "seed": 9, "user": str(i), "n": 1 + i} for i in range(4)]
        answers = list(users.map(server.post, bodies))
    killer.join()
    for answer in answers:
        assert answer.status_code in {200, 503}, answer.text
        if answer.status_code == 200:
            assert answer.json()["data"][0] == expected
        else:
            assert int(answer.headers["retry-after"]) >= 1
    deadline = time.monotonic() + 60
    while server.post({"prompt": "a dog"}).status_code != 200:
        assert time.monotonic() < deadline
