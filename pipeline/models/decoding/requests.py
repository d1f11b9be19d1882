"""Generation requests checked against a model's limits, with its defaults filled in.

Every family's generator resolves a batch before it computes anything, so a request that is refused
costs nothing and leaves a batch under way as it was:

    for request in resolve_requests(requests, config, styles, guidance_scale=3.0):
        request.num_steps  # never None
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from pipeline.config import MAX_GUIDANCE, MAX_STEPS, MAX_TEMPERATURE, GeneratorConfig
from pipeline.contracts import MAX_SEED, Canvas, GenerationRequest
from pipeline.errors import RequestError

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class ResolvedRequest:
    """A request within the model's limits, its defaults filled in.

    Attributes:
        prompt: without spaces around it; empty stands for no caption.
        negative_prompt: what guidance leads away from; empty stands for no caption.
        seed: 0 to contracts.MAX_SEED.
        style_id: 0 to config.num_styles, which stands for no style.
        guidance_scale: 1 to config.MAX_GUIDANCE.
        temperature: 0 to config.MAX_TEMPERATURE.
        num_steps: decoding steps; 1 to config.MAX_STEPS where a request may choose.
        canvas: the image to start from, of the model's image size.
    """

    prompt: str
    negative_prompt: str
    seed: int
    style_id: int
    guidance_scale: float
    temperature: float
    num_steps: int
    canvas: Canvas | None


def resolve_requests(
    requests: Sequence[GenerationRequest],
    config: GeneratorConfig,
    styles: Sequence[str],
    *,
    guidance_scale: float,
    canvas_size: int | None = None,
    fixed_steps: int | None = None,
) -> list[ResolvedRequest]:
    """Check every request and fill in what it leaves out.

    Args:
        requests: one per image.
        config: the model's, which has the defaults.
        styles: their names by style id.
        guidance_scale: the family's default, for a config that has none.
        canvas_size: pixels per side of a canvas; None if the model cannot go on from one.
        fixed_steps: the family's only number of decoding steps; None if a request may choose.

    Raises:
        RequestError: names the field, the value and what is allowed.
    """
    default = guidance_scale if config.guidance_scale is None else config.guidance_scale
    return [
        ResolvedRequest(
            num_steps=_num_steps(request, config, fixed_steps),
            seed=_within("seed", request.seed, 0, MAX_SEED),
            guidance_scale=_within(
                "guidance_scale",
                default if request.guidance_scale is None else request.guidance_scale,
                1.0,
                MAX_GUIDANCE,
            ),
            temperature=_within(
                "temperature",
                config.temperature if request.temperature is None else request.temperature,
                0.0,
                MAX_TEMPERATURE,
            ),
            prompt=_prompt(request),
            style_id=config.num_styles if request.style is None else _style(request.style, styles),
            negative_prompt=(request.negative_prompt or "").strip(),
            canvas=None if request.canvas is None else _canvas(request.canvas, canvas_size),
        )
        for request in requests
    ]


def _within(name: str, value: Number, low: Number, high: Number) -> Number:
    if not (math.isfinite(value) and low <= value <= high):
        raise RequestError(f"{name}={value} is outside {low} to {high}", param=name)
    return value


def _num_steps(request: GenerationRequest, config: GeneratorConfig, fixed: int | None) -> int:
    if fixed is None:
        num_steps = config.num_steps if request.num_steps is None else request.num_steps
        return _within("num_steps", num_steps, 1, MAX_STEPS)
    if request.num_steps not in (None, fixed):
        raise RequestError(
            f"num_steps={request.num_steps}: this model always draws in {fixed}; leave it out",
            param="num_steps",
        )
    return fixed


def _prompt(request: GenerationRequest) -> str:
    """A canvas needs no caption beside it; without one an empty prompt is a mistake."""
    if not request.prompt.strip() and request.canvas is None:
        raise RequestError("the prompt is empty; say what to draw", param="prompt")
    return request.prompt.strip()


def _style(style: str, styles: Sequence[str]) -> int:
    if style not in styles:
        raise RequestError(f"style={style!r} is not one of: {', '.join(styles)}", param="style")
    return list(styles).index(style)


def _canvas(canvas: Canvas, size: int | None) -> Canvas:
    if size is None:
        raise RequestError("this model cannot go on from a picture", param="image")
    if len(canvas.pixels) != 3 * size * size:
        raise RequestError(
            f"the canvas has {len(canvas.pixels)} bytes, not {size}x{size}x3", param="image"
        )
    if canvas.mask is not None and len(canvas.mask) != size * size:
        raise RequestError(
            f"the mask has {len(canvas.mask)} bytes, not {size}x{size}", param="mask"
        )
    if canvas.mask is not None and not any(canvas.mask):
        raise RequestError("the mask leaves nothing to draw", param="mask")
    if not 0 < canvas.share <= 1:
        raise RequestError(f"share={canvas.share} is outside 0 to 1", param="share")
    return canvas
