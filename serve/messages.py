"""The messages between the two deployments of the service, the ingress and the generator replicas.

    ingress -> replica    ImageJob, one per image
    replica -> ingress    GeneratedImage, PartialImage (of a stream), Refusal, ModelInfo

They are pickled from process to process, so they are frozen dataclasses of plain values. The
ingress imports this file and does without PyTorch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from pipeline.contracts import GenerationRequest, PromptTokens, TokenCount

PROBE_REQUEST = GenerationRequest(prompt="a red circle")
"""Generated once by a model before it serves, and again when readiness is asked for."""

ImageFormat = Literal["png", "jpeg", "webp"]

Fit = Literal["pad", "crop", "refuse"]
"""What becomes of an image of another shape: padded with white, cropped to its middle, or refused
as every other size is."""

Size = tuple[int, int]
"""Width and height in pixels."""


def written(size: Size) -> str:
    """As OpenAI's API writes it, for example "64x48"."""
    return f"{size[0]}x{size[1]}"


@dataclass(frozen=True)
class ModelInfo:
    """What clients may know of the served model.

    Attributes:
        name: its name in the registry.
        version: its version in the registry.
        image_size: height and width of its images, pixels.
        styles: the values that a request's `style` may have.
        loaded: when it was loaded, Unix time in seconds.
        tasks: what it was trained for; edits and variations need "completion".
        notice: why a newer version is not served; empty if the newest one is.
        num_steps: decoding steps of a request that names none; None where no request may choose.
    """

    name: str
    version: str
    image_size: int
    styles: tuple[str, ...]
    loaded: int
    tasks: frozenset[str] = frozenset({"text_to_image"})
    notice: str = ""
    num_steps: int | None = None

    @property
    def size(self) -> str:
        """Of its images, as OpenAI's API writes it."""
        return written((self.image_size, self.image_size))


@dataclass(frozen=True)
class OutputOptions:
    """How an image is delivered.

    Attributes:
        format: of the file.
        quality: 0 to 100, for jpeg and webp alone.
        size: of the image; None: as it was drawn.
        fit: how an image of another shape comes to that size.
    """

    format: ImageFormat = "png"
    quality: int = 100
    size: Size | None = None
    fit: Fit = "pad"


STRENGTH = 0.8
"""Share of an image's tokens that an edit without a mask generates anew, unless it says otherwise:
the shipped base begins to follow the prompt at 0.7 and keeps the layout up to 0.9."""


@dataclass(frozen=True)
class Upload:
    """A client's image to start from: still encoded, and not looked at yet.

    Attributes:
        image: a PNG, WebP or JPEG.
        mask: an image of the same shape that says where to generate anew: it is fully transparent
            there, or white in black.
        share: fraction of the image tokens that is generated anew where nothing says which, in
            (0, 1]; None: STRENGTH.
        transparency_is_mask: without `mask`, the image is generated anew where it is fully
            transparent, if it is so anywhere.
    """

    image: bytes = field(repr=False)
    mask: bytes | None = field(default=None, repr=False)
    share: float | None = None
    transparency_is_mask: bool = True

    @cached_property
    def digest(self) -> bytes:
        """sha256 of the whole upload, computed once for all images that start from it."""
        files = [file and hashlib.sha256(file).digest() for file in (self.image, self.mask)]
        content = files, self.share, self.transparency_is_mask
        return hashlib.sha256(repr(content).encode()).digest()


@dataclass(frozen=True)
class ImageJob:
    """One image to generate.

    Attributes:
        request: what to generate.
        deadline: Unix time in seconds after which the client has stopped waiting.
        output: how to encode the image.
        upload: the image to start from.
        num_partial_images: unfinished images to send before the finished one.
        num_following: further jobs of the same client request, sent right after this one.
    """

    request: GenerationRequest
    deadline: float
    output: OutputOptions = OutputOptions()
    upload: Upload | None = None
    num_partial_images: int = 0
    num_following: int = 0


@dataclass(frozen=True)
class Timing:
    """Where an image's time went, in seconds, and how many were generated together at its end."""

    queue: float
    model: float
    encode: float
    batch_size: int


@dataclass(frozen=True)
class PartialImage:
    """An image between two decoding steps, encoded; `index` counts from 0. The rest is as of a
    `GeneratedImage`."""

    index: int
    encoded: bytes = field(repr=False)
    seed: int = 0
    size: Size | None = None
    cut: Mapping[str, PromptTokens] = field(default_factory=dict)
    unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class GeneratedImage:
    """A finished image, encoded, and the model that generated it.

    Attributes:
        size: as delivered; None: as it was drawn.
        cut: by field the prompts that the model read only in part.
        unused: fields that were sent and change nothing, as the replica alone can tell.
    """

    encoded: bytes = field(repr=False)
    seed: int
    model: ModelInfo
    timing: Timing | None = None
    tokens: TokenCount | None = None
    size: Size | None = None
    cut: Mapping[str, PromptTokens] = field(default_factory=dict)
    unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refusal:
    """Why an image is not generated; `param` names the field at fault.

    It is a value because an exception would arrive in the ingress as a replica's traceback.
    """

    message: str
    param: str | None
    code: Literal["invalid_value", "content_policy_violation", "deadline_exceeded"] = (
        "invalid_value"
    )


DEADLINE_EXCEEDED = Refusal(
    "the picture cannot be drawn in time; try again later, or allow more time",
    param=None,
    code="deadline_exceeded",
)
