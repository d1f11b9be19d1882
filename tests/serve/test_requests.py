"""What popular clients send, as they send it: each request is understood, and nothing in it is
ignored in silence."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from direct import ask_replica, generation
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from serve.text_values import integers


def opened(answer: Any, index: int = 0) -> Image.Image:
    """An image of an answer."""
    encoded = base64.b64decode(answer.json()["data"][index]["b64_json"])
    return Image.open(io.BytesIO(encoded), formats=["PNG", "JPEG", "WEBP"])


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
