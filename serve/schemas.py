"""What goes over the wire: the bodies of OpenAI's images API, as far as Tessera speaks it.

Fields, types and defaults are those that `openai.OpenAI().images.generate(...)` sends; seed, style,
negative_prompt, guidance_scale, temperature and num_steps travel in its `extra_body`. Unknown
fields are refused, never ignored, and types are strict: "2" is not 2. A null means the default, as
it does at OpenAI.
"""

from __future__ import annotations

import unicodedata
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from pipeline.config import MAX_GUIDANCE, MAX_STEPS, MAX_TEMPERATURE
from pipeline.contracts import MAX_SEED, GenerationRequest
from serve.pictures import Format, Output

CHAMPION = "champion"
"""The model name that stands for whatever is being served."""

MAX_PICTURES = 10
"""Pictures one request may ask for; ServeConfig.max_queued_requests is at least as large."""

MAX_PROMPT_CHARS = 1000
MAX_PREVIEWS = 3


_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_CONTROL = r"\x00-\x1f\x7f-\x9f"
_ONE_LINE = rf"^[{_SPACE}]*[^{_SPACE}{_CONTROL}]([^{_CONTROL}]*[^{_SPACE}{_CONTROL}])?[{_SPACE}]*$"
"""What `Prompt` checks, for the schema: no control characters but around it."""


def _printable(prompt: str) -> str:
    """Refuse control characters (Unicode category Cc: NUL, escape, line breaks, ...)."""
    for position, char in enumerate(prompt):
        if unicodedata.category(char) == "Cc":
            raise ValueError(
                f"control character U+{ord(char):04X} at position {position}; "
                "write the prompt as one line of text"
            )
    return prompt


Prompt = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_PROMPT_CHARS),
    AfterValidator(_printable),
    WithJsonSchema(
        {"type": "string", "minLength": 1, "maxLength": MAX_PROMPT_CHARS, "pattern": _ONE_LINE}
    ),
]


class Drawable(BaseModel):
    """What the three ways to ask for pictures have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    model: str = Field(CHAMPION, description="'champion' or the served model's own name")
    n: int = Field(1, ge=1, le=MAX_PICTURES, description="pictures; a stream carries one")
    size: str = Field("auto", description="WIDTHxHEIGHT as the model draws, or 'auto'")
    response_format: Literal["b64_json", "url"] = Field(
        "b64_json", description="'url' gives a data: URL; pictures are not stored"
    )
    output_format: Format = "png"
    output_compression: int | None = Field(
        None, ge=0, le=100, description="quality of jpeg and webp, 100 if absent; not for png"
    )
    background: Literal["auto", "opaque"] = Field(
        "auto", description="pictures are opaque: the model knows no transparency"
    )
    user: str | None = Field(
        None, max_length=256, description="whom the picture is for, noted in the log"
    )
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="picture i is drawn with seed + i; random if absent"
    )
    style: str | None = Field(None, description="one of the styles that GET /v1/models lists")
    negative_prompt: Prompt | None = Field(None, description="what guidance leads away from")
    guidance_scale: float | None = Field(
        None, ge=1, le=MAX_GUIDANCE, description="classifier-free guidance; 1 switches it off"
    )
    temperature: float | None = Field(
        None, ge=0, le=MAX_TEMPERATURE, description="sampling noise; 0 is greedy"
    )
    num_steps: int | None = Field(None, ge=1, le=MAX_STEPS, description="decoding steps")
    stream: bool = Field(False, description="answer with server-sent events")
    partial_images: int = Field(
        0, ge=0, le=MAX_PREVIEWS, description="pictures in the making, in a stream"
    )

    @model_validator(mode="before")
    @classmethod
    def _as_json_means_it(cls, body: Any) -> Any:
        """A null stands for the default, and 2.0 is an integer (JSON Schema, 6.1.1)."""
        if not isinstance(body, dict):
            return body
        return {
            key: int(value) if isinstance(value, float) and value.is_integer() else value
            for key, value in body.items()
            if value is not None
        }

    @field_validator("background", mode="before")
    @classmethod
    def _no_transparency(cls, value: Any) -> Any:
        if value == "transparent":
            raise ValueError("the model draws opaque pictures; leave background out")
        return value

    @field_validator("output_compression")
    @classmethod
    def _lossy_alone(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value not in (None, 100) and info.data.get("output_format") == "png":
            raise ValueError("png is lossless; choose output_format jpeg or webp")
        return value

    @field_validator("stream")
    @classmethod
    def _one_picture(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("n") != 1:
            raise ValueError("a stream carries one picture; ask for n=1")
        if value and info.data.get("response_format") == "url":
            raise ValueError("a stream carries base64; ask for response_format b64_json")
        return value

    @field_validator("partial_images")
    @classmethod
    def _in_a_stream(cls, value: int, info: ValidationInfo) -> int:
        if value and info.data.get("stream") is False:
            raise ValueError("pictures in the making come in a stream; ask for stream=true")
        return value

    @property
    def said(self) -> str:
        """The prompt, empty where there is none."""
        return ""

    @property
    def output(self) -> Output:
        quality = 100 if self.output_compression is None else self.output_compression
        return Output(self.output_format, quality)

    def pictures(self, first_seed: int) -> list[GenerationRequest]:
        """The n pictures asked for, each with its own seed (wrapping after MAX_SEED)."""
        return [
            GenerationRequest(
                prompt=self.said,
                seed=(first_seed + i) % (MAX_SEED + 1),
                style=self.style,
                guidance_scale=self.guidance_scale,
                temperature=self.temperature,
                num_steps=self.num_steps,
                negative_prompt=self.negative_prompt,
            )
            for i in range(self.n)
        ]


class ImageRequest(Drawable):
    """POST /v1/images/generations: what to draw, how many times, how."""

    prompt: Prompt = Field(description="what to draw, in any language the model reads")

    @property
    def said(self) -> str:
        return self.prompt


class EditRequest(ImageRequest):
    """POST /v1/images/edits, beside the files: what to draw where the mask is transparent."""


class VariationRequest(Drawable):
    """POST /v1/images/variations, beside the file: the picture again, a part of it drawn anew."""

    variation: float = Field(
        0.5, gt=0, le=1, description="share of the picture's tokens that are drawn anew"
    )


class ImageData(BaseModel):
    """One picture, as base64 or as a data: URL."""

    b64_json: str | None = Field(None, description="base64; its metadata says how it was made")
    url: str | None = Field(None, description="a data: URL")
    seed: int = Field(description="draws this picture again")
    model_version: str = Field(description="that drew it; another one's may be among the others")


class InputDetails(BaseModel):
    """Tokens read."""

    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """Tokens read and drawn, over all pictures of a request."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    total_tokens: int


class ImagesResponse(BaseModel):
    """The pictures of one request, in order of their seeds."""

    created: int = Field(description="Unix time, seconds")
    data: list[ImageData]
    size: str
    output_format: Format
    background: Literal["opaque"] = "opaque"
    usage: Usage | None = Field(None, description="absent for models that draw without tokens")
    model: str
    model_version: str


class ImageEvent(BaseModel):
    """One server-sent event of a stream; its type is also the event's name."""

    type: str
    b64_json: str
    created_at: int = Field(description="Unix time, seconds")
    size: str
    output_format: Format
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


class Health(BaseModel):
    """GET /healthz and /readyz."""

    status: Literal["ok", "ready"]
    model: str | None = None
    model_version: str | None = None
    notice: str | None = Field(None, description="that a newer version is not served")
