"""Every major version of OpenAI's own Python client, each installed aside and run by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import harness
import pytest
from test_features import mask, png

SCRIPT = """
import base64, io, os, sys, urllib.request
import openai
from PIL import Image

assert openai.__version__.split(".")[0] == sys.argv[2], openai.__version__
client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0, timeout=60)
picture = open(sys.argv[3], "rb").read()
upload = ("image.png", picture, "image/png")


def size(encoded):
    return Image.open(io.BytesIO(base64.b64decode(encoded))).size


made = client.images.generate(
    model="champion", prompt="a red apple", n=2, size="64x64", response_format="b64_json",
    user="me", extra_body={"seed": 1, "guidance_scale": 3, "num_steps": 2},
)
assert [size(p.b64_json) for p in made.data] == [(64, 64)] * 2 and made.created > 0
(linked,) = client.images.generate(prompt="a red apple", response_format="url").data
assert Image.open(io.BytesIO(urllib.request.urlopen(linked.url).read())).size == (64, 64)
edited = client.images.edit(image=upload, mask=upload, prompt="a hat", n=1)
assert size(edited.data[0].b64_json) == (64, 64)
varied = client.images.create_variation(image=upload, n=2)
assert len(varied.data) == 2
assert [m.id for m in client.models.list()][:3] == ["champion", "tiny", "dall-e-2"]
assert client.models.retrieve("champion").object == "model"
for wrong, kind in (
    ({"n": 11}, openai.BadRequestError),
    ({"model": "sdxl"}, openai.NotFoundError),
    ({"extra_body": {"sede": 1}}, openai.BadRequestError),
):
    try:
        client.images.generate(**{"model": "champion", "prompt": "a cat"} | wrong)
    except kind as error:
        assert error.code and error.param and error.message, error
    else:
        raise AssertionError(f"{wrong} was accepted")
events = []
more = {"partial_images": 2, "seed": 5}
if sys.argv[2] == "1":  # 1.x learnt to stream pictures late; its raw stream does everywhere
    with client.images.with_streaming_response.generate(
        model="champion", prompt="slow cat", extra_body={"stream": True} | more
    ) as answer:
        events = [line[7:] for line in answer.iter_lines() if line.startswith("event: ")]
else:
    stream = client.images.generate(
        model="champion", prompt="slow cat", stream=True, partial_images=2, extra_body={"seed": 5}
    )
    events = [event.type for event in stream]
assert events == ["image_generation.partial_image"] * 2 + ["image_generation.completed"], events
print("fine")
"""


@pytest.mark.slow
@pytest.mark.parametrize("major", [1, 2, 3])
def test_a_client_of_this_version_gets_pictures(
    major: int, server: harness.Running, tmp_path: Path
) -> None:
    aside = tmp_path / "client"
    wanted = f"openai>={major},<{major + 1}"
    if major == 1:
        wanted += " httpx<0.28"  # what the early 1.x expect
    install = [sys.executable, "-m", "pip", "install", "-q", "--target", str(aside)]
    installed = subprocess.run(
        [*install, *wanted.split()], capture_output=True, text=True, timeout=600
    )
    assert installed.returncode == 0, (
        f"pip cannot install {wanted}; this test needs a package index:\n{installed.stderr[-800:]}"
    )
    picture = tmp_path / "picture.png"
    picture.write_bytes(png(mask()))
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, f"{server.url}/v1", str(major), str(picture)],
        env=os.environ | {"PYTHONPATH": str(aside)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout.strip()) == (0, "fine"), ran.stderr[-2000:]
