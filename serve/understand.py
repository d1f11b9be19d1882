"""What a request means to the served model: what to draw, what to deliver, and what was not used.

Nothing is ignored in silence. What is understood is done. What cannot be used but does no harm is
accepted and named, in the header `x-tessera-unused` and in the log. What would change the meaning
is refused by name.

    understood = understand(body, upload, model, service)
    understood.request, understood.output, understood.unused
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from pipeline.config import MAX_STEPS
from pipeline.contracts import MAX_SEED, GenerationRequest
from serve.errors import ApiError, quoted
from serve.messages import ModelInfo, OutputOptions, Size, Upload
from serve.schemas import CHAMPION, ImageOptions, Quality
from serve.settings import ServiceConfig

STEPS_BY_QUALITY: Mapping[Quality, float] = {"low": 0.5, "high": 2.0, "hd": 2.0}
"""Decoding steps as a multiple of the model's own number; 1 for every other quality."""

URL_MODELS = frozenset({"dall-e-2", "dall-e-3"})
"""OpenAI's models that answer with URLs unless they are asked not to."""

OPENAI_STYLES = frozenset({"vivid", "natural"})
"""Of dall-e-3: no style is asked for, unless the model has one of that name."""


@dataclass(frozen=True)
class Understood:
    """A request that the served model can answer.

    Attributes:
        model: that understood it.
        request: what to draw; of `num_images` images the first.
        num_images: with seeds that count on from the first, wrapping after MAX_SEED.
        seed: of the first image; None: any.
        output: what to deliver.
        upload: the image to start from.
        num_partial_images: unfinished images to show of each.
        links: deliver URLs instead of the images themselves.
        unused: the names of fields that were sent and change nothing.
        sent: all fields as JSON, by which a request that is sent again is known.
    """

    model: ModelInfo
    request: GenerationRequest
    num_images: int
    seed: int | None
    output: OutputOptions
    upload: Upload | None
    num_partial_images: int
    links: bool
    unused: tuple[str, ...]
    sent: str

    @property
    def pixels(self) -> int:
        """Of one image, for the client's limit: as it is drawn or delivered, whichever is more."""
        width, height = self.output.size or (0, 0)
        return max(self.model.image_size**2, width * height)

    def requests(self, first_seed: int) -> list[GenerationRequest]:
        """One request per image."""
        seeds = range(first_seed, first_seed + self.num_images)
        return [replace(self.request, seed=seed % (MAX_SEED + 1)) for seed in seeds]


def understand(
    body: ImageOptions, upload: Upload | None, model: ModelInfo, service: ServiceConfig
) -> Understood:
    """What `model` is to do, under the settings of `service`.

    Raises:
        ApiError: 404 another model is asked for; 400 the model cannot do it.
    """
    check_model(body.model, model, service)
    if upload is not None and "completion" not in model.tasks:
        raise ApiError(
            400,
            f"the model {model.name!r} cannot go on from a picture; use /v1/images/generations",
            code="unsupported_task",
            param="image",
        )
    quality = 100 if body.output_compression is None else body.output_compression
    return Understood(
        model=model,
        request=GenerationRequest(
            prompt=body.prompt_text,
            style=_style(body, model),
            guidance_scale=body.guidance_scale,
            temperature=body.temperature,
            num_steps=_num_steps(body, model),
            negative_prompt=body.negative_prompt,
        ),
        num_images=body.n,
        seed=body.seed,
        output=OutputOptions(body.output_format, quality, _size(body, model, service), service.fit),
        upload=upload,
        num_partial_images=body.partial_images if body.stream else 0,
        links=not body.stream and _format(body, service) == "url",
        unused=tuple(_unused(body, model)),
        sent=body.model_dump_json(),
    )


def model_names(model: ModelInfo, service: ServiceConfig) -> tuple[str, ...]:
    """The names that a request may call the served model by, but for those that an alias with a *
    stands for."""
    aliases = (alias for alias in service.model_aliases if "*" not in alias)
    return tuple(dict.fromkeys((CHAMPION, model.name, *aliases)))


def check_model(name: str, model: ModelInfo, service: ServiceConfig) -> None:
    """Raises ApiError 404 unless `name` is one of the served model's names."""
    names = model_names(model, service)
    if name not in names and not any(fnmatchcase(name, alias) for alias in service.model_aliases):
        raise ApiError(
            404,
            f"the model {quoted(name)} is not served here; use one of: {', '.join(names)}",
            code="model_not_found",
            param="model",
        )


def _size(body: ImageOptions, model: ModelInfo, service: ServiceConfig) -> Size | None:
    """To be delivered; None: as the model draws it."""
    if body.size in ("auto", model.size):
        return None
    if service.fit == "refuse":
        raise _unsupported(
            "size", body.size, f"this service gives {model.size} alone; ask for that or 'auto'"
        )
    width, height = body.size.split("x")
    return int(width), int(height)


def _format(body: ImageOptions, service: ServiceConfig) -> str:
    """How the images are answered: as the request says, else as the service's setting does."""
    if body.response_format is not None:
        return body.response_format
    if service.response_format == "auto":
        return "url" if body.model in URL_MODELS else "b64_json"
    return service.response_format


def _style(body: ImageOptions, model: ModelInfo) -> str | None:
    if body.style is None or body.style in model.styles:
        return body.style
    if body.style in OPENAI_STYLES:
        return None
    known = ", ".join(model.styles) or "none; leave style out"
    raise _unsupported("style", body.style, f"this model's styles are {known}")


def _num_steps(body: ImageOptions, model: ModelInfo) -> int | None:
    """As the request says, else as its quality does; None: the model's own number."""
    share = STEPS_BY_QUALITY.get(body.quality)
    if body.num_steps is not None or share is None or model.num_steps is None:
        return body.num_steps
    return min(max(1, round(share * model.num_steps)), MAX_STEPS)


def _unused(body: ImageOptions, model: ModelInfo) -> Iterator[str]:
    """The fields that were sent and change nothing."""
    if body.quality in STEPS_BY_QUALITY and (body.num_steps or model.num_steps is None):
        yield "quality"
    if body.style in OPENAI_STYLES and body.style not in model.styles:
        yield "style"
    if body.moderation is not None:
        yield "moderation"
    if body.input_fidelity is not None:
        yield "input_fidelity"
    if body.output_compression is not None and body.output_format == "png":
        yield "output_compression"
    if body.partial_images and not body.stream:
        yield "partial_images"
    if body.response_format == "url" and body.stream:
        yield "response_format"


def _unsupported(param: str, value: str, why: str) -> ApiError:
    return ApiError(400, f"{param}={quoted(value)}: {why}", code="invalid_value", param=param)
