"""What a picture's file says of itself: how to draw it again, and that a machine drew it."""

from __future__ import annotations

import json

from pipeline import __version__
from pipeline.contracts import GenerationRequest


def describe(request: GenerationRequest, *, model: str, version: str) -> dict[str, str]:
    """A PNG's text chunks by keyword."""
    canvas = request.canvas
    chosen = {
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
        "settings": json.dumps({k: v for k, v in chosen.items() if v is not None}),
        "Software": f"Tessera {__version__} (machine-made picture)",
    }
