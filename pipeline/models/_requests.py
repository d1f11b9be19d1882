"""Checking generation requests against a model, once for every family."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.config import MAX_GUIDANCE, MAX_STEPS, MAX_TEMPERATURE, GeneratorConfig
from pipeline.contracts import MAX_SEED, Canvas, GenerationRequest
from pipeline.errors import RequestError


@dataclass(frozen=True)
class Settings:
    """A batch of requests as columns, the model's defaults filled in; styles as ids or None, an
    empty text for no caption."""

    prompts: list[str]
    seeds: list[int]
    styles: list[int | None]
    guidance_scales: list[float]
    temperatures: list[float]
    num_steps: list[int]
    negative_prompts: list[str]
    canvases: list[Canvas | None]


def check_requests(
    requests: Sequence[GenerationRequest],
    config: GeneratorConfig,
    styles: Sequence[str],
    *,
    guidance_scale: float,
    canvas_size: int | None = None,
    fixed_steps: int | None = None,
) -> Settings:
    """Fill in defaults and check every limit before anything is drawn.

    Args:
        guidance_scale: the family's default, for a config that has none.
        canvas_size: pixels a side of the canvas it can go on from; None if it cannot.
        fixed_steps: the family's only number of decoding steps; None if a request may choose.

    Raises:
        RequestError: names the field, the value and what is allowed.
    """
    settings = Settings([], [], [], [], [], [], [], [])
    default = guidance_scale if config.guidance_scale is None else config.guidance_scale
    for request in requests:
        guidance = default if request.guidance_scale is None else request.guidance_scale
        temperature = config.temperature if request.temperature is None else request.temperature
        num_steps = _steps(request, config, fixed_steps)
        _within("seed", request.seed, 0, MAX_SEED)
        _within("guidance_scale", guidance, 1.0, MAX_GUIDANCE)
        _within("temperature", temperature, 0.0, MAX_TEMPERATURE)
        settings.prompts.append(_prompt(request))
        settings.seeds.append(request.seed)
        settings.styles.append(_style(request.style, styles))
        settings.guidance_scales.append(guidance)
        settings.temperatures.append(temperature)
        settings.num_steps.append(num_steps)
        settings.negative_prompts.append((request.negative_prompt or "").strip())
        settings.canvases.append(_canvas(request.canvas, canvas_size))
    return settings


def _within(name: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise RequestError(f"{name}={value} is outside {low} to {high}", param=name)


def _steps(request: GenerationRequest, config: GeneratorConfig, fixed: int | None) -> int:
    if fixed is None:
        num_steps = config.num_steps if request.num_steps is None else request.num_steps
        _within("num_steps", num_steps, 1, MAX_STEPS)
        return num_steps
    if request.num_steps not in (None, fixed):
        raise RequestError(
            f"num_steps={request.num_steps}: this model always draws in {fixed}; leave it out",
            param="num_steps",
        )
    return fixed


def _prompt(request: GenerationRequest) -> str:
    """Empty stands for no caption at all: a canvas alone may say enough."""
    if not request.prompt.strip() and request.canvas is None:
        raise RequestError("the prompt is empty; say what to draw", param="prompt")
    return request.prompt.strip()


def _canvas(canvas: Canvas | None, size: int | None) -> Canvas | None:
    if canvas is None:
        return None
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


def _style(style: str | None, styles: Sequence[str]) -> int | None:
    if style is None:
        return None
    if style not in styles:
        raise RequestError(f"style={style!r} is not one of: {', '.join(styles)}", param="style")
    return list(styles).index(style)
