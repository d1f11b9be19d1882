"""What goes over the wire: the bodies of OpenAI's images API, as far as Tessera speaks it.

Fields, types and defaults are those that `openai.OpenAI().images.generate(...)` sends; seed,
guidance_scale, temperature and num_steps travel in its `extra_body`. Unknown fields are refused,
never ignored, and types are strict: "2" is not 2. A null means the default, as it does at OpenAI.
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
    field_validator,
    model_validator,
)

from pipeline.contracts import MAX_SEED, GenerationRequest
from pipeline.models._requests import MAX_GUIDANCE, MAX_STEPS, MAX_TEMPERATURE

CHAMPION = "champion"
"""The model name that stands for whatever is being served."""

MAX_PICTURES = 10
"""Pictures one request may ask for; ServeConfig.max_queued_requests is at least as large."""

MAX_PROMPT_CHARS = 1000


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
]


class ImageRequest(BaseModel):
    """POST /v1/images/generations: what to draw, how many times, how."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    prompt: Prompt = Field(description="what to draw, in any language the model reads")
    model: str = Field(CHAMPION, description="'champion' or the served model's own name")
    n: int = Field(1, ge=1, le=MAX_PICTURES, description="pictures")
    size: str = Field("auto", description="WIDTHxHEIGHT as the model draws, or 'auto'")
    response_format: Literal["b64_json"] = Field("b64_json", description="a PNG in base64")
    output_format: Literal["png"] = "png"
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="picture i is drawn with seed + i; random if absent"
    )
    style: str | None = Field(None, description="one of the styles that GET /v1/models lists")
    guidance_scale: float | None = Field(
        None, ge=1, le=MAX_GUIDANCE, description="classifier-free guidance; 1 switches it off"
    )
    temperature: float | None = Field(
        None, ge=0, le=MAX_TEMPERATURE, description="sampling noise; 0 is greedy"
    )
    num_steps: int | None = Field(None, ge=1, le=MAX_STEPS, description="decoding steps")

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {key: value for key, value in body.items() if value is not None}

    @field_validator("response_format", mode="before")
    @classmethod
    def _no_urls(cls, value: Any) -> Any:
        if value == "url":
            raise ValueError(
                "pictures are not stored, so there is no URL to give; ask for 'b64_json'"
            )
        return value

    def pictures(self, first_seed: int) -> list[GenerationRequest]:
        """The n pictures asked for, each with its own seed (wrapping after MAX_SEED)."""
        return [
            GenerationRequest(
                prompt=self.prompt,
                seed=(first_seed + i) % (MAX_SEED + 1),
                style=self.style,
                guidance_scale=self.guidance_scale,
                temperature=self.temperature,
                num_steps=self.num_steps,
            )
            for i in range(self.n)
        ]


class ImageData(BaseModel):
    """One picture."""

    b64_json: str = Field(description="the PNG in base64; its text chunks say how it was made")
    seed: int = Field(description="draws this picture again")


class ImagesResponse(BaseModel):
    """The pictures of one request, in order of their seeds."""

    created: int = Field(description="Unix time, seconds")
    data: list[ImageData]
    size: str
    output_format: Literal["png"] = "png"
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


class ModelList(BaseModel):
    """GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """GET /healthz and /readyz."""

    status: Literal["ok", "ready"]
