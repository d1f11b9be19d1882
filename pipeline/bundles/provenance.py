"""What an image's file says of itself: how to generate it again, and that a machine made it.

images.encode_png(image, describe(request, model="tessera", version="3"))
"""

from __future__ import annotations

import json

from pipeline import __version__
from pipeline.contracts import GenerationRequest

UNFINISHED = {"Software": "Tessera (machine-made picture, unfinished)"}
"""The metadata of an image between two decoding steps."""


def describe(request: GenerationRequest, *, model: str, version: str) -> dict[str, str]:
    """The metadata of a finished image by name: PNG text chunks, or JSON in other formats."""
    canvas = request.canvas
    settings = {
        "style": request.style,
        "guidance_scale": request.guidance_scale,
        "temperature": request.temperature,
        "num_steps": request.num_steps,
        "negative_prompt": request.negative_prompt,
        "task": None if canvas is None else "completion",
        "variation": None if canvas is None or canvas.mask is not None else canvas.share,
    }
    return {
        "prompt": request.prompt,
        "seed": str(request.seed),
        "model": model,
        "model_version": version,
        "settings": json.dumps({k: v for k, v in settings.items() if v is not None}),
        "Software": f"Tessera {__version__} (machine-made picture)",
    }
