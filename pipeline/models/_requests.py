"""Checking generation requests against a model, once for every family."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.config import GeneratorConfig
from pipeline.contracts import MAX_SEED, GenerationRequest
from pipeline.errors import RequestError

MAX_GUIDANCE = 20.0
MAX_TEMPERATURE = 4.0
MAX_STEPS = 64


@dataclass(frozen=True)
class Settings:
    """A batch of requests as columns, the model's defaults filled in; styles as ids or None."""

    prompts: list[str]
    seeds: list[int]
    styles: list[int | None]
    guidance_scales: list[float]
    temperatures: list[float]
    num_steps: list[int]


def check_requests(
    requests: Sequence[GenerationRequest], config: GeneratorConfig, styles: Sequence[str]
) -> Settings:
    """Fill in defaults and check every limit before anything is drawn.

    Raises:
        RequestError: names the field, the value and what is allowed.
    """
    settings = Settings([], [], [], [], [], [])
    for request in requests:
        guidance = (
            config.guidance_scale if request.guidance_scale is None else request.guidance_scale
        )
        temperature = config.temperature if request.temperature is None else request.temperature
        num_steps = config.num_steps if request.num_steps is None else request.num_steps
        _within("seed", request.seed, 0, MAX_SEED)
        _within("guidance_scale", guidance, 1.0, MAX_GUIDANCE)
        _within("temperature", temperature, 0.0, MAX_TEMPERATURE)
        _within("num_steps", num_steps, 1, MAX_STEPS)
        settings.prompts.append(_prompt(request.prompt))
        settings.seeds.append(request.seed)
        settings.styles.append(_style(request.style, styles))
        settings.guidance_scales.append(guidance)
        settings.temperatures.append(temperature)
        settings.num_steps.append(num_steps)
    return settings


def _within(name: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise RequestError(f"{name}={value} is outside {low} to {high}", param=name)


def _prompt(prompt: str) -> str:
    if not prompt.strip():
        raise RequestError("the prompt is empty; say what to draw", param="prompt")
    return prompt.strip()


def _style(style: str | None, styles: Sequence[str]) -> int | None:
    if style is None:
        return None
    if style not in styles:
        raise RequestError(f"style={style!r} is not one of: {', '.join(styles)}", param="style")
    return list(styles).index(style)
