"""LangChain's image wrapper as it comes. Arguments: as of openai_python.py."""

import io
import json
import sys
import urllib.request
from importlib.metadata import version

import openai
from langchain_community.utilities.dalle_image_generator import DallEAPIWrapper
from PIL import Image

URL = sys.argv[1]
url = DallEAPIWrapper(base_url=URL, api_key="none").run("a red apple")
image = Image.open(io.BytesIO(urllib.request.urlopen(url).read()))
try:
    DallEAPIWrapper(base_url=URL, api_key="none", size="4096x4096").run("a red apple")
except openai.BadRequestError as error:
    refusal = str(error)
found = {"version": version("langchain-community"), "generated": "{}x{}".format(*image.size)}
print(json.dumps(found | {"edited": None, "refusal": refusal}))
