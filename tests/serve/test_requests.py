"""What popular clients send, as they send it: each request is understood, and nothing in it is
ignored in silence."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from direct import Ask, ask_replica, generation
from harness import settings
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from pipeline.contracts import PromptTokens
from serve.access import new_key
from serve.messages import STRENGTH, Fit, ModelInfo
from serve.schemas import ImageRequest
from serve.settings import ApiKey, ServiceConfig
from serve.text_values import integers
from serve.understand import understand


def opened(answer: Any, index: int = 0) -> Image.Image:
    """An image of an answer."""
    encoded = base64.b64decode(answer.json()["data"][index]["b64_json"])
    return Image.open(io.BytesIO(encoded), formats=["PNG", "JPEG", "WEBP"])


SENT: list[tuple[str, dict[str, Any], str, str]] = [
    ("Open WebUI", {"n": 1, "size": "512x512", "response_format": "b64_json"}, "512x512", ""),
    ("Open WebUI, no size", {"n": 1, "response_format": "b64_json"}, "64x64", ""),
    ("Open WebUI before 0.9, no size", {"size": "", "response_format": "b64_json"}, "64x64", ""),
    ("Open WebUI, no model", {"model": "dall-e-2", "n": 1}, "64x64", ""),
    ("Nextcloud", {"size": "1024x1024", "n": 1, "model": "tessera"}, "1024x1024", ""),
    (
        "Vercel AI SDK",
        {"n": 1, "size": "1024x1024", "response_format": "b64_json"},
        "1024x1024",
        "",
    ),
    (
        "LibreChat",
        {
            "model": "gpt-image-1", "n": 1, "background": "auto", "output_format": "png",
            "quality": "auto", "size": "auto",
        },
        "64x64",
        "",
    ),
    ("LangChain, Python", {"model": "dall-e-2", "n": 1, "size": "1024x1024"}, "1024x1024", ""),
    ("LangChain, Python, all set", {"size": "auto", "quality": "standard"}, "64x64", ""),
    (
        "LangChain, JavaScript",
        {
            "model": "dall-e-3", "n": 1, "size": "1024x1024", "response_format": "url",
            "style": "vivid", "quality": "standard",
        },
        "1024x1024",
        "style",
    ),
    ("a chat bot", {"quality": "low"}, "64x64", ""),
    ("a moderated client", {"moderation": "low"}, "64x64", "moderation"),
    ("front ends of A1111 and ComfyUI", {"seed": -1, "negative_prompt": ""}, "64x64", ""),
]  # fmt: skip
"""Who sends by default what beside the prompt, the size that they get, and what is unused."""


@pytest.mark.parametrize(("who", "sent", "size", "unused"), SENT, ids=lambda value: str(value)[:24])
def test_popular_clients_get_their_image(
    who: str, sent: dict[str, Any], size: str, unused: str, tmp_path: Path
) -> None:
    (answer, file), _ = ask_replica([generation(**sent), linked_or_models], tmp_path)
    assert answer.status_code == 200, f"{who}: {answer.text}"
    assert answer.json()["size"] == size
    assert answer.headers.get("x-tessera-unused", "") == unused
    image = opened(answer) if "b64_json" in answer.text else Image.open(io.BytesIO(file.content))
    assert "{}x{}".format(*image.size) == size


def linked_or_models(answer: httpx.Response) -> Ask:
    """A request for the image that an answer links to, if it does."""
    return linked(answer) if "url" in answer.json()["data"][0] else LISTED


@pytest.mark.parametrize(
    ("sent", "meant"),
    [
        ({"negative_prompt": ""}, {}),
        ({"negative_prompt": " \n\t"}, {}),
        ({"style": ""}, {}),
        ({"size": ""}, {}),
        ({"response_format": "", "output_format": "", "background": ""}, {}),
        ({"user": "", "model": "", "n": "", "seed": 5, "stream": ""}, {"seed": 5}),
        ({"seed": "7", "num_steps": " 3 "}, {"seed": 7, "num_steps": 3}),
        ({"guidance_scale": "2.5", "temperature": "1"}, {"guidance_scale": 2.5, "temperature": 1}),
        ({"stream": "False", "partial_images": None, "n": None}, {}),
        ({"n": "2"}, {"n": 2}),
    ],
)
def test_empty_text_is_not_set_and_numbers_may_be_text(
    sent: dict[str, Any], meant: dict[str, Any], tmp_path: Path
) -> None:
    seed = {"seed": 1}
    asked = [generation(**seed | sent), generation(**seed | meant)]
    (answer, plain), jobs = ask_replica(asked, tmp_path)
    assert (answer.status_code, plain.status_code) == (200, 200), answer.text
    assert answer.json()["data"] == plain.json()["data"]
    assert [job.request for job in jobs[: len(jobs) // 2]] == [
        job.request for job in jobs[len(jobs) // 2 :]
    ]


def test_a_seed_of_minus_one_is_random(tmp_path: Path) -> None:
    answers, _ = ask_replica([generation(seed=-1), generation(seed="-1")], tmp_path)
    seeds = [answer.json()["data"][0]["seed"] for answer in answers]
    assert seeds[0] != seeds[1] and min(seeds) >= 0


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("A red apple.\nStyle: emoji.", "A red apple. Style: emoji."),
        ("A red apple,\r\n\tshiny", "A red apple, shiny"),
        ("## Subject\n\nBooks.\n\n## Mood\n\nStudious. ", "## Subject Books. ## Mood Studious."),
        ("一个\u3000红苹果\u2028", "一个 红苹果"),
        ("A cosy kitchen. " * 2_000, ("A cosy kitchen. " * 2_000).strip()),
    ],
)
def test_a_prompt_of_several_lines_is_one_line(prompt: str, read: str, tmp_path: Path) -> None:
    (answer,), (job,) = ask_replica([generation(prompt=prompt, seed=1)], tmp_path)
    assert (answer.status_code, job.request.prompt) == (200, read)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("char", ['"', "\\", "一", "🍎"])
def test_the_longest_prompts_leave_room_in_every_file(kind: str, char: str, tmp_path: Path) -> None:
    long = char * 32_000
    asked = generation(prompt=long, negative_prompt=long, output_format=kind)
    (answer,), _ = ask_replica([asked], tmp_path)
    assert answer.status_code == 200, answer.text
    image = opened(answer)
    if kind == "png":
        said = dict(image.text)  # type: ignore[attr-defined]
    else:
        comment = image.getexif().get_ifd(0x8769)[0x9286]
        said = json.loads(comment.removeprefix(b"UNICODE\0").decode("utf-16-be"))
    assert said["prompt"] == char * 4_000
    assert json.loads(said["settings"])["negative_prompt"] == char * 4_000


@given(low=st.integers(-1, 1), high=st.integers(1, 3_000), number=st.integers(-5, 4_000))
def test_the_schema_knows_integers_as_text(low: int, high: int, number: int) -> None:

    assert bool(re.fullmatch(integers(low, high), str(number))) == (low <= number <= high)


UNUSED: list[tuple[dict[str, Any], str]] = [
    ({}, ""),
    ({"quality": "auto", "background": "auto", "output_format": "png", "size": "auto"}, ""),
    ({"quality": "standard", "size": "auto"}, ""),
    ({"quality": "low"}, ""),
    ({"quality": "hd", "num_steps": 3}, "quality"),
    ({"style": "vivid"}, "style"),
    ({"style": "noto"}, ""),
    ({"moderation": "low"}, "moderation"),
    ({"moderation": "auto", "quality": "low", "num_steps": 1}, "quality, moderation"),
    ({"input_fidelity": "high"}, "input_fidelity"),
    ({"output_compression": 100}, "output_compression"),
    ({"output_compression": 50, "output_format": "jpeg"}, ""),
    ({"partial_images": 2}, "partial_images"),
    ({"stream": True, "response_format": "url"}, "response_format"),
    ({"user": "me", "seed": 1}, ""),
]


@pytest.mark.parametrize(("sent", "unused"), UNUSED)
def test_what_changes_nothing_is_named(
    sent: dict[str, Any], unused: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="ray.serve"):
        (answer,), (job,) = ask_replica([generation(**sent)], tmp_path)
    assert answer.status_code == 200, answer.text
    assert answer.headers.get("x-tessera-unused", "") == unused
    (line,) = [record.http for record in caplog.records if hasattr(record, "http")]
    assert line.get("unused", "") == unused
    assert job.request.style == (sent.get("style") if "style" not in unused else None)


@pytest.mark.parametrize(
    ("quality", "steps"),
    [("auto", None), ("standard", None), ("medium", None), ("low", 6), ("high", 24), ("hd", 24)],
)
def test_quality_is_a_number_of_steps(quality: str, steps: int | None, tmp_path: Path) -> None:
    asked = [generation(quality=quality)]
    (answer,), (job,) = ask_replica(asked, tmp_path, num_steps=12)
    assert (answer.status_code, job.request.num_steps) == (200, steps)
    _, (job,) = ask_replica(asked, tmp_path, num_steps=1)
    assert job.request.num_steps in (None, 1, 2)
    _, (job,) = ask_replica(asked, tmp_path, num_steps=50)
    assert job.request.num_steps in (None, 25, 64)


def test_a_style_of_the_model_is_drawn_whatever_its_name(tmp_path: Path) -> None:
    (answer,), (job,) = ask_replica([generation(style="vivid")], tmp_path, styles=("vivid",))
    assert job.request.style == "vivid" and "x-tessera-unused" not in answer.headers


def test_a_model_of_fixed_steps_says_that_quality_is_unused() -> None:
    body = ImageRequest(prompt="a", quality="high")
    fixed = ModelInfo("tiny", "3", 64, (), loaded=0, num_steps=None)
    understood = understand(body, None, fixed, ServiceConfig())
    assert (understood.request.num_steps, understood.unused) == (None, ("quality",))


def described(image: Image.Image) -> dict[str, str]:
    """What a PNG says of itself."""
    return dict(image.text)  # type: ignore[attr-defined]


def drawn(image: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("size", ["512x512", "32x32", " 256x256 "])
def test_a_square_of_any_size_is_the_drawn_one_resized(size: str, tmp_path: Path) -> None:
    asked = [generation(seed=1, size="auto"), generation(seed=1, size=size)]
    (plain, resized), _ = ask_replica(asked, tmp_path)
    side = int(size.split("x")[0])
    wanted = opened(plain).resize((side, side), Image.Resampling.LANCZOS)
    assert np.array_equal(drawn(opened(resized)), drawn(wanted))
    assert resized.json()["size"] == f"{side}x{side}"
    said = described(opened(resized))
    assert (said["drawn"], said["delivered"]) == ("64x64", f"{side}x{side}")
    assert plain.json()["size"] == "64x64" and "drawn" not in described(opened(plain))


@pytest.mark.parametrize("size", ["448x256", "256x448", "2048x16", "16x2048"])
@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_another_shape_is_padded_or_cropped(size: str, kind: str, fit: Fit, tmp_path: Path) -> None:
    service = settings(fit=fit)
    (answer,), _ = ask_replica([generation(size=size, output_format=kind)], tmp_path, service)
    image = opened(answer)
    assert (f"{image.width}x{image.height}", answer.json()["size"]) == (size, size)
    if kind == "png":
        corner = drawn(image)[:, :3] if image.width > image.height else drawn(image)[:3]
        assert bool((corner == 255).all()) == (fit == "pad")


def test_a_setting_refuses_other_sizes(tmp_path: Path) -> None:
    asked = [generation(size="512x512"), generation(size="64x64"), generation(size="auto")]
    answers, _ = ask_replica(asked, tmp_path, settings(fit="refuse"))
    assert [answer.status_code for answer in answers] == [400, 200, 200]
    assert answers[0].json()["error"]["param"] == "size"
    assert "64x64" in answers[0].json()["error"]["message"]


def test_a_stream_delivers_the_size_too(tmp_path: Path) -> None:
    (answer,), _ = ask_replica([generation(size="96x64", stream=True, partial_images=1)], tmp_path)
    events = streamed(answer)
    assert [event["size"] for event in events] == ["96x64"] * 2
    for event in events:
        image = Image.open(io.BytesIO(base64.b64decode(event["b64_json"])), formats=["PNG"])
        assert image.size == (96, 64)


def test_each_size_is_kept_as_an_image_of_its_own(tmp_path: Path) -> None:
    sizes = ("64x64", "auto", "128x128", "128x64", "128x128")
    answers, jobs = ask_replica(
        [generation(seed=1, size=size) for size in sizes], tmp_path, settings()
    )
    assert [answer.json()["size"] for answer in answers] == [
        "64x64", "64x64", "128x128", "128x64", "128x128",
    ]  # fmt: skip
    assert len(jobs) == 3


def test_pixels_are_charged_as_they_are_delivered() -> None:
    model = ModelInfo("tiny", "3", 64, (), loaded=0)
    for size, pixels in (("auto", 4096), ("32x32", 4096), ("1024x512", 524_288)):
        body = ImageRequest(prompt="a", size=size)
        assert understand(body, None, model, ServiceConfig()).pixels == pixels


def words_read(prompt: str) -> PromptTokens:
    """A model that reads eight words."""
    given = len(prompt.split())
    return PromptTokens(min(given, 8), given)


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_cut_of_a_prompt_is_told(stream: bool, tmp_path: Path) -> None:
    asked = [
        generation(prompt="word " * 30, negative_prompt="word " * 9, seed=1, stream=stream),
        generation(prompt="word " * 30, seed=1, stream=stream),
        generation(prompt="word " * 8, negative_prompt="word", seed=1, stream=stream),
    ]
    answers, _ = ask_replica(asked + asked, tmp_path, settings(), count_prompt=words_read)
    told = [
        (answer.headers.get("x-tessera-prompt-tokens"),
         answer.headers.get("x-tessera-negative-prompt-tokens"))
        for answer in answers
    ]  # fmt: skip
    assert told == [("8/30", "8/9"), ("8/30", None), (None, None)] * 2


LISTED: Ask = ("GET", "/v1/models", {})


@pytest.mark.parametrize(
    ("service", "served", "refused"),
    [
        (settings(), ["gpt-image-1", "gpt-image-2", "dall-e-2", "dall-e-3"], ["sdxl"]),
        (settings(aliases=("sdxl", "my-*")), ["sdxl", "my-model"], ["dall-e-3", "my"]),
        (settings(aliases=()), [], ["dall-e-3"]),
        (settings(allow_anonymous=True), [], ["dall-e-3"]),
        (settings(allow_anonymous=True, aliases=("dall-e-3",)), ["dall-e-3"], ["dall-e-2"]),
    ],
)
def test_names_that_clients_have_fixed(
    service: ServiceConfig, served: list[str], refused: list[str], tmp_path: Path
) -> None:
    names = ["champion", "tiny", *served, *refused]
    asked = [generation(model=name) for name in names]
    asked += [("GET", f"/v1/models/{name}", {}) for name in names]
    (models, *answers), _ = ask_replica([LISTED, *asked], tmp_path, service)
    statuses = [answer.status_code for answer in answers]
    assert statuses == ([200] * (2 + len(served)) + [404] * len(refused)) * 2
    assert {answer.json()["model"] for answer in answers[: 2 + len(served)]} == {"tiny"}
    listed = {model["id"] for model in models.json()["data"]}
    assert set(names) - set(refused) - {"gpt-image-2", "my-model"} <= listed
    assert not any("*" in name for name in listed) and not set(refused) & listed


def photo(width: int, height: int, kind: str = "JPEG") -> bytes:
    """A photograph-like file: blue, with a red ellipse."""
    image = Image.new("RGB", (width, height), (90, 160, 220))
    box = (width // 4, height // 4, width // 2, height // 2)
    ImageDraw.Draw(image).ellipse(box, fill=(200, 30, 30))
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def hole(width: int, height: int, *, alpha: bool) -> bytes:
    """A mask that is open in its upper left quarter: transparent there, or white in black."""
    if alpha:
        image, fill = Image.new("RGBA", (width, height), "black"), (0, 0, 0, 0)
    else:
        image, fill = Image.new("RGB", (width, height)), (255, 255, 255)
    ImageDraw.Draw(image).rectangle((0, 0, width // 2 - 1, height // 2 - 1), fill=fill)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def edit(image: bytes, mask: bytes | None = None, *, field: str = "image", **form: str) -> Ask:
    """A request to edit an image, as a form."""
    files = [(field, ("x", image))] + ([("mask", ("m.png", mask))] if mask else [])
    return "POST", "/v1/images/edits", {"data": {"prompt": "a top hat"} | form, "files": files}


@pytest.mark.parametrize(
    ("width", "height", "kind", "delivered"),
    [
        (256, 256, "PNG", "64x64"),
        (640, 480, "JPEG", "64x48"),
        (480, 640, "JPEG", "48x64"),
        (1000, 125, "WEBP", "64x8"),
    ],
)
def test_a_plain_photograph_is_edited_and_given_back_in_its_shape(
    width: int, height: int, kind: str, delivered: str, tmp_path: Path
) -> None:
    asked = [
        edit(photo(width, height, kind), field="image[]", model="champion", quality="auto"),
        edit(photo(width, height, kind), strength="0.3"),
        edit(photo(width, height, kind), size="128x128"),
        edit(photo(width, height, kind), size=f"{width}x{height}"),
    ]
    answers, jobs = ask_replica(asked, tmp_path)
    assert [answer.status_code for answer in answers] == [200] * 4, answers[0].text
    assert [answer.json()["size"] for answer in answers] == [
        delivered, delivered, "128x128", f"{width}x{height}",
    ]  # fmt: skip
    assert "{}x{}".format(*opened(answers[0]).size) == delivered
    assert [job.upload.share for job in jobs] == [None, 0.3, None, None]
    said = json.loads(described(opened(answers[0]))["settings"])
    assert (said["task"], said["variation"]) == ("completion", STRENGTH)
    assert not any("x-tessera-unused" in answer.headers for answer in answers)


@pytest.mark.parametrize("alpha", [True, False])
@pytest.mark.parametrize("fit", ["pad", "crop"])
@pytest.mark.parametrize("of_the_models_size", [True, False])
def test_a_photograph_changes_where_its_mask_is_open(
    alpha: bool, fit: Fit, of_the_models_size: bool, tmp_path: Path
) -> None:
    mask = hole(64, 48, alpha=alpha) if of_the_models_size else hole(640, 480, alpha=alpha)
    (answer,), _ = ask_replica([edit(photo(640, 480), mask)], tmp_path, settings(fit=fit))
    assert answer.status_code == 200, answer.text
    given = Image.open(io.BytesIO(photo(640, 480)))
    image = opened(answer)
    assert image.size == ((64, 48) if fit == "pad" else (85, 64))
    changed = np.abs(drawn(image).astype(int) - drawn(given.resize(image.size))).max(2) > 60
    width, height = image.width // 2, image.height // 2
    start = 0 if fit == "pad" else 10  # what was cropped stays as it was
    assert changed[: height - 2, start : width - 2].mean() > 0.8
    assert changed[height + 2 :].mean() < 0.02 and changed[:, width + 2 :].mean() < 0.02
    assert not changed[:, :start].any()


def test_strength_beside_a_mask_is_named_as_unused(tmp_path: Path) -> None:
    transparent = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    stream = io.BytesIO()
    transparent.save(stream, "PNG")
    asked = [
        edit(photo(64, 64), hole(64, 64, alpha=True), strength="0.5", input_fidelity="high"),
        edit(stream.getvalue(), strength="0.5"),
        edit(photo(64, 64), strength="0.5"),
    ]
    answers, _ = ask_replica(asked, tmp_path)
    unused = [answer.headers.get("x-tessera-unused") for answer in answers]
    assert unused == ["input_fidelity, strength", "strength", None]


def test_a_setting_refuses_other_shapes(tmp_path: Path) -> None:
    asked = [edit(photo(640, 480)), edit(photo(256, 256))]
    (refused, drawn), _ = ask_replica(asked, tmp_path, settings(fit="refuse"))
    assert (refused.status_code, drawn.status_code) == (400, 200)
    assert "not square" in refused.json()["error"]["message"]


def test_several_images_are_refused_by_name(tmp_path: Path) -> None:
    form = [("image[]", ("x.png", photo(64, 64))), ("image[]", ("y.png", photo(64, 64)))]
    several = ("POST", "/v1/images/edits", {"data": {"prompt": "a hat"}, "files": form})
    as_json = ("POST", "/v1/images/edits", {"json": {"prompt": "a hat", "images": []}})
    (answer, told), _ = ask_replica([several, as_json], tmp_path)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "image")
    assert "starts from one image" in answer.json()["error"]["message"]
    assert told.status_code == 415 and "multipart/form-data" in told.json()["error"]["message"]


def linked(answer: httpx.Response, **headers: str) -> Ask:
    """A request for the first image that an answer links to."""
    return "GET", answer.json()["data"][0]["url"], {"headers": headers}


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_url_is_a_real_one(kind: str, tmp_path: Path) -> None:
    asked = generation(response_format="url", output_format=kind, seed=1)
    (answer, file, again, other), _ = ask_replica([asked, linked, asked, linked], tmp_path)
    (image,) = answer.json()["data"]
    assert re.fullmatch(rf"http://test/files/[\w-]{{43}}\.{kind}", image["url"])
    assert "b64_json" not in image and image["url"] != again.json()["data"][0]["url"]
    assert (file.status_code, file.headers["content-type"]) == (200, f"image/{kind}")
    assert file.content == other.content
    assert Image.open(io.BytesIO(file.content), formats=[kind]).size == (64, 64)


@pytest.mark.parametrize(
    ("service", "sent", "format_"),
    [
        (settings(), {}, "b64_json"),
        (settings(), {"model": "gpt-image-1"}, "b64_json"),
        (settings(), {"model": "dall-e-3"}, "url"),
        (settings(), {"model": "dall-e-2", "response_format": "b64_json"}, "b64_json"),
        (settings(), {"response_format": "url"}, "url"),
        (settings(response_format="url"), {}, "url"),
        (settings(response_format="url"), {"response_format": "b64_json"}, "b64_json"),
        (settings(response_format="b64_json"), {"model": "dall-e-3"}, "b64_json"),
    ],
)
def test_the_default_format_is_a_setting(
    service: ServiceConfig, sent: dict[str, Any], format_: str, tmp_path: Path
) -> None:
    (answer,), _ = ask_replica([generation(**sent)], tmp_path, service)
    assert {"b64_json", "url"} & answer.json()["data"][0].keys() == {format_}


def test_a_url_asks_for_the_key_of_whoever_asked(tmp_path: Path) -> None:
    keys = {name: new_key() for name in ("alice", "bob")}
    service = settings(keys=[ApiKey(name=name, sha256=keys[name][1]) for name in keys])
    alice, bob = ({"authorization": f"Bearer {key}"} for key, _ in keys.values())
    method, path, body = generation(response_format="url")
    drawn: Ask = (method, path, body | {"headers": alice})
    asked: list[Any] = []
    for sender in (alice, bob, {}):
        asked += [drawn, partial(linked, **sender)]
    answers, _ = ask_replica(asked, tmp_path, service)
    assert [file.status_code for file in answers[1::2]] == [200, 404, 401]


@pytest.mark.parametrize(
    ("service", "host", "base"),
    [
        (settings(), "images.example:8443", "http://images.example:8443"),
        (settings(public_url="https://a.example/images/"), "b", "https://a.example/images"),
    ],
)
def test_a_url_names_the_host_that_the_client_asked(
    service: ServiceConfig, host: str, base: str, tmp_path: Path
) -> None:
    method, path, body = generation(response_format="url")
    (answer,), _ = ask_replica(
        [(method, path, body | {"headers": {"host": host}})], tmp_path, service
    )
    assert answer.json()["data"][0]["url"].startswith(f"{base}/files/")


def test_a_url_that_is_not_known_is_not_found(tmp_path: Path) -> None:
    (answer,), _ = ask_replica([("GET", "/files/nothing.png", {})], tmp_path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "file_not_found")


def streamed(answer: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream."""
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line[:5] == "data:"]


def test_a_stream_carries_several_images(tmp_path: Path) -> None:
    asked = [
        generation(prompt="slow apple", n=3, seed=5, stream=True, partial_images=2),
        generation(prompt="slow apple", n=3, seed=5),
    ]
    (stream, plain), jobs = ask_replica(asked, tmp_path)
    for image in plain.json()["data"]:
        partial_1, partial_2, done = (e for e in streamed(stream) if e["seed"] == image["seed"])
        assert [partial_1["partial_image_index"], partial_2["partial_image_index"]] == [0, 1]
        assert done["type"] == "image_generation.completed"
        assert done["b64_json"] == image["b64_json"]
    assert len(streamed(stream)) == 9
    assert [job.num_following for job in jobs[:3]] == [2, 1, 0], "they are drawn together"


@pytest.mark.parametrize("prompt", ["refuse slow", "explode slow"])
def test_a_stream_of_several_fails_as_one(prompt: str, tmp_path: Path) -> None:
    (answer,), _ = ask_replica([generation(prompt=prompt, n=3, stream=True)], tmp_path)
    assert answer.status_code == (400 if "refuse" in prompt else 500)
