"""OpenAI's Python client. Arguments: the service's URL with /v1, a photograph, a mask for it."""

import base64
import io
import json
import sys
import urllib.request
import warnings
from pathlib import Path

import openai
from PIL import Image

warnings.simplefilter("ignore", DeprecationWarning)  # variations are
URL, PHOTO, MASK = sys.argv[1:]
client = openai.OpenAI(base_url=URL, api_key="none", max_retries=0, timeout=60)


def upload(path):
    return path, Path(path).read_bytes()


def size(image):
    if image.url:
        encoded = urllib.request.urlopen(image.url).read()
    else:
        encoded = base64.b64decode(image.b64_json)
    return "{}x{}".format(*Image.open(io.BytesIO(encoded)).size)


made = client.images.generate(
    model="gpt-image-1", prompt="a red apple", n=2, size="1024x1024", quality="low", user="me",
    extra_body={"seed": 1, "guidance_scale": 3},
)  # fmt: skip
assert len(made.data) == 2 and made.created > 0
(linked,) = client.images.generate(model="dall-e-3", prompt="a red apple", size="512x512").data
assert linked.url and size(linked) == "512x512"
(masked,) = client.images.edit(image=upload(PHOTO), mask=upload(MASK), prompt="a hat").data
(edited,) = client.images.edit(model="gpt-image-1", image=[upload(PHOTO)], prompt="a hat").data
assert size(masked) == size(edited)
varied = client.images.create_variation(image=upload(PHOTO), n=2)
assert len(varied.data) == 2
assert "dall-e-2" in [model.id for model in client.models.list()]
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
more = {"partial_images": 2, "seed": 5}
if openai.__version__.startswith("1."):  # 1.x learnt to stream images late; its raw stream always
    with client.images.with_streaming_response.generate(
        model="champion", prompt="slow cat", n=2, extra_body={"stream": True} | more
    ) as answer:
        events = [line[7:] for line in answer.iter_lines() if line.startswith("event: ")]
else:
    stream = client.images.generate(
        model="champion", prompt="slow cat", n=2, stream=True, partial_images=2,
        extra_body={"seed": 5},
    )  # fmt: skip
    events = [event.type for event in stream]
assert sorted(events) == ["image_generation.completed"] * 2 + ["image_generation.partial_image"] * 4
try:
    client.images.generate(prompt="a cat", size="4096x4096")
except openai.BadRequestError as error:
    refusal = str(error)
found = {"version": openai.__version__, "generated": size(made.data[0]), "edited": size(edited)}
print(json.dumps(found | {"refusal": refusal}))
