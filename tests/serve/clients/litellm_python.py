"""LiteLLM, which sends a request on as OpenAI's. Arguments: as of openai_python.py."""

import base64
import io
import json
import sys
from importlib.metadata import version
from pathlib import Path

import litellm
from PIL import Image

URL, PHOTO, MASK = sys.argv[1:]
where = {"api_base": URL, "api_key": "none"}


def size(answer):
    (image,) = answer.data
    opened = Image.open(io.BytesIO(base64.b64decode(image.b64_json)))
    return "{}x{}".format(*opened.size)


made = litellm.image_generation(
    model="openai/gpt-image-1", prompt="a red apple", size="1024x1024", quality="high", **where
)
with Path(PHOTO).open("rb") as photo:
    edited = litellm.image_edit(model="openai/gpt-image-1", image=photo, prompt="a hat", **where)
try:
    litellm.image_generation(
        model="openai/gpt-image-1", prompt="a red apple", size="4096x4096", **where
    )
except litellm.BadRequestError as error:
    refusal = str(error)
found = {"version": version("litellm"), "generated": size(made), "edited": size(edited)}
print(json.dumps(found | {"refusal": refusal}))
