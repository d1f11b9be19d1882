"""The bodies of OpenAI's images API, as far as Tessera speaks it: what goes over the wire.

Fields, types and defaults are those that `openai.OpenAI().images.generate(...)` sends; seed,
negative_prompt, guidance_scale, temperature, num_steps and variation travel in its `extra_body`.
Names that no image model of OpenAI's ever took are refused. null and empty text mean the default,
and text that is a number is one, in JSON as in forms (text_values.py); a form knows no null.
understand.py says what comes of each field.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from fastapi import UploadFile
from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from starlette.datastructures import UploadFile as ParsedFile

from pipeline.config import MAX_GUIDANCE, MAX_STEPS, MAX_TEMPERATURE
from pipeline.contracts import MAX_SEED
from serve.messages import STRENGTH, ImageFormat
from serve.text_values import BLANK, allow_text, amid_blanks, one_line, typed_values

CHAMPION = "champion"
"""The model name that stands for whatever is being served."""

MAX_IMAGES = 10
"""Images per request; ServeConfig.max_queued_requests is at least as large."""

MAX_PROMPT_CHARS = 32_000
RANDOM_SEED = -1
"""What programs around other image models send for a random seed."""

MAX_PARTIAL_IMAGES = 3

_CONTROL = r"\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f"
"""Control characters (Unicode category Cc) that are no blanks: NUL, escape, ..."""

_READABLE = rf"^[{BLANK}]*[^{BLANK}{_CONTROL}][^{_CONTROL}]*$"
"""What `Prompt` checks, for the schema: not blank, and without control characters."""


def _as_one_line(prompt: str) -> str:
    """Line breaks, tabs and runs of blanks become single spaces; control characters are refused."""
    line = one_line(prompt)
    if found := re.search(f"[{_CONTROL}]", line):
        raise ValueError(
            f"control character U+{ord(found[0]):04X} at position {found.start()}; leave it out"
        )
    return line


Prompt = Annotated[
    str,
    StringConstraints(max_length=MAX_PROMPT_CHARS),
    AfterValidator(_as_one_line),
    WithJsonSchema({"type": "string", "maxLength": MAX_PROMPT_CHARS, "pattern": _READABLE}),
]


_SIDE = "(1[6-9]|[2-9][0-9]|[1-9][0-9]{2}|1[0-9]{3}|20[0-3][0-9]|204[0-8])"
_SIZE = rf"auto|{_SIDE}x{_SIDE}"


def _is_size(size: str) -> str:
    size = one_line(size)
    if not re.fullmatch(_SIZE, size):
        raise ValueError("write WIDTHxHEIGHT with 16 to 2048 pixels each, or 'auto'")
    return size


ImageSize = Annotated[
    str,
    AfterValidator(_is_size),
    WithJsonSchema({"type": "string", "pattern": amid_blanks(_SIZE)}),
]

Quality = Literal["auto", "standard", "low", "medium", "high", "hd"]

_UNUSED = "accepted as some model of OpenAI's takes it; unused"


def _is_file(value: Any) -> Any:
    if not isinstance(value, ParsedFile):
        raise PydanticCustomError("file_type", "send it as a file, with a file name")
    return value


ImageFile = Annotated[UploadFile, BeforeValidator(_is_file)]


def _no_null(schema: dict[str, Any]) -> None:
    """A form's schema: no field can be null."""
    for field in schema["properties"].values():
        for choice in field.pop("anyOf", ()):
            field |= choice if choice != {"type": "null"} else {}
        if field.get("default", "") is None:
            del field["default"]


class ImageOptions(BaseModel):
    """The fields that all three ways to ask for images have in common."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        json_schema_extra=allow_text,
    )

    model: str = Field(CHAMPION, description="one of the names that GET /v1/models lists")
    n: int = Field(1, ge=1, le=MAX_IMAGES, description="number of images")
    size: ImageSize = Field(
        "auto", description="WIDTHxHEIGHT, 16 to 2048 pixels each; 'auto' is the model's own"
    )
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="'url' is good for an hour; the service's setting if absent"
    )
    output_format: ImageFormat = "png"
    output_compression: int | None = Field(
        None, ge=0, le=100, description="quality of jpeg and webp, 100 if absent; unused for png"
    )
    quality: Quality = Field(
        "auto", description="sets num_steps: low half of the model's own, high and hd twice as many"
    )
    moderation: Literal["auto", "low"] | None = Field(None, description=_UNUSED)
    input_fidelity: Literal["low", "high"] | None = Field(None, description=_UNUSED)
    background: Literal["auto", "opaque"] = Field(
        "auto", description="images are opaque: the model knows no transparency"
    )
    user: str | None = Field(
        None, min_length=1, max_length=256, description="whom the images are for; logged"
    )
    seed: int | None = Field(
        None,
        ge=RANDOM_SEED,
        lt=MAX_SEED + 1,  # OpenAPI's limits are floats: 2**63 is one, 2**63 - 1 is not
        description="image i is generated with seed + i; random if absent or -1",
    )
    style: str | None = Field(
        None, description="one of those that GET /v1/models lists; vivid and natural always pass"
    )
    negative_prompt: Prompt | None = Field(None, description="what guidance leads away from")
    guidance_scale: float | None = Field(
        None, ge=1, le=MAX_GUIDANCE, description="classifier-free guidance; 1 switches it off"
    )
    temperature: float | None = Field(
        None, ge=0, le=MAX_TEMPERATURE, description="sampling temperature; 0 is greedy"
    )
    num_steps: int | None = Field(None, ge=1, le=MAX_STEPS, description="decoding steps")
    stream: bool = Field(False, description="answer with server-sent events")
    partial_images: int = Field(
        0, ge=0, le=MAX_PARTIAL_IMAGES, description="unfinished images to show in a stream"
    )

    @model_validator(mode="before")
    @classmethod
    def _typed(cls, body: Any) -> Any:
        return typed_values(body, cls.model_fields) if isinstance(body, dict) else body

    @field_validator("seed")
    @classmethod
    def _random(cls, value: int | None) -> int | None:
        return None if value == RANDOM_SEED else value

    @field_validator("background", mode="before")
    @classmethod
    def _no_transparency(cls, value: Any) -> Any:
        if value == "transparent":
            raise ValueError("the model draws opaque pictures; leave background out")
        return value

    @property
    def prompt_text(self) -> str:
        """The prompt, empty where the request has none."""
        return ""


class ImageRequest(ImageOptions):
    """POST /v1/images/generations, a JSON body."""

    prompt: Prompt = Field(description="what to draw, in any language the model reads")

    @property
    def prompt_text(self) -> str:
        return self.prompt


class UploadForm(BaseModel):
    """The fields that the two forms have in common; text, so types are not strict."""

    model_config = ConfigDict(strict=False, json_schema_extra=_no_null)

    image: ImageFile = Field(
        exclude=True,
        validation_alias=AliasChoices("image", "image[]"),  # OpenAI's client may send a list of one
        description="PNG, WebP or JPEG to start from",
    )


class EditRequest(ImageRequest, UploadForm):
    """POST /v1/images/edits, a form: what to draw where the mask says so, or anywhere."""

    mask: ImageFile | None = Field(
        None,
        exclude=True,
        description="image of the same shape, where to draw fully transparent, or white in black; "
        "without one the image's own transparency counts",
    )
    strength: float | None = Field(
        None,
        gt=0,
        le=1,
        description="without a mask: share of the image's tokens that is generated anew, "
        f"{STRENGTH:g} if absent",
    )


class VariationRequest(ImageOptions, UploadForm):
    """POST /v1/images/variations, a form: the image again, a part of it generated anew."""

    variation: float = Field(
        0.5, gt=0, le=1, description="share of the image's tokens that is generated anew"
    )


class ImageData(BaseModel):
    """One image, as base64 or as a URL."""

    b64_json: str | None = Field(None, description="base64; its metadata says how it was made")
    url: str | None = Field(None, description="good for an hour; asks for the same key")
    seed: int = Field(description="generates this image again")
    model_version: str = Field(description="that generated it; others may be of another version")


class InputDetails(BaseModel):
    """Tokens read."""

    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """Tokens read and generated, over all images of a request."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    total_tokens: int


class ImagesResponse(BaseModel):
    """The images of one request, in order of their seeds."""

    created: int = Field(description="Unix time, seconds")
    data: list[ImageData]
    size: str
    output_format: ImageFormat
    background: Literal["opaque"] = "opaque"
    usage: Usage | None = Field(None, description="absent for models that work without tokens")
    model: str
    model_version: str


class ImageEvent(BaseModel):
    """One server-sent event of a stream; its type is also the event's name."""

    type: str
    b64_json: str
    created_at: int = Field(description="Unix time, seconds")
    size: str
    output_format: ImageFormat
    background: Literal["opaque"] = "opaque"
    quality: Literal["auto"] = "auto"
    partial_image_index: int | None = None
    seed: int
    usage: Usage | None = None
    model: str
    model_version: str


class Model(BaseModel):
    """One entry of GET /v1/models."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Unix time the model was loaded, seconds")
    owned_by: str = "tessera"
    version: str
    size: str
    styles: tuple[str, ...]
    tasks: tuple[str, ...]


class ModelList(BaseModel):
    """GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetail(BaseModel):
    """What went wrong: for people, for programs, and with which field."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorEnvelope(BaseModel):
    """Every answer that is not a success."""

    error: ErrorDetail
    detail: str = Field(description="the message again, where clients of FastAPI services look")


class Health(BaseModel):
    """GET /healthz and /readyz."""

    status: Literal["ok", "ready"]
    model: str | None = None
    model_version: str | None = None
    notice: str | None = Field(None, description="why the newest version is not served")
