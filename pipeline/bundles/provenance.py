"""What an image's file says of itself: how to generate it again, and that a machine made it.

images.encode_png(image, describe(request, model="tessera", version="3"))
"""

from __future__ import annotations

import json

from pipeline import __version__
from pipeline.contracts import GenerationRequest

UNFINISHED = {"Software": "Tessera (machine-made picture, unfinished)"}
"""The metadata of an image between two decoding steps."""

MAX_PROMPT_CHARS = 4_000
"""Of a prompt that are written into a file: the EXIF of a JPEG has 64 KB for all."""


def describe(request: GenerationRequest, *, model: str, version: str) -> dict[str, str]:
    """The metadata of a finished image by name: PNG text chunks, or JSON in other formats. Prompts
    longer than MAX_PROMPT_CHARS are cut."""
    canvas, negative = request.canvas, request.negative_prompt
    settings = {
        "style": request.style,
        "guidance_scale": request.guidance_scale,
        "temperature": request.temperature,
        "num_steps": request.num_steps,
        "negative_prompt": None if negative is None else negative[:MAX_PROMPT_CHARS],
        "task": None if canvas is None else "completion",
        "variation": None if canvas is None or canvas.mask is not None else canvas.share,
    }
    return {
        "prompt": request.prompt[:MAX_PROMPT_CHARS],
        "seed": str(request.seed),
        "model": model,
        "model_version": version,
        "settings": json.dumps(
            {k: v for k, v in settings.items() if v is not None}, ensure_ascii=False
        ),
        "Software": f"Tessera {__version__} (machine-made picture)",
    }
