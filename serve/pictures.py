"""What the two deployments say to each other: cards, jobs, pictures and refusals.

Light on purpose: the ingress imports this and never loads PyTorch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from pipeline.contracts import GenerationRequest, TokenCount

PROBE = GenerationRequest(prompt="a red circle")
"""What a replica draws once before it takes requests, and what readiness asks of it."""

Format = Literal["png", "jpeg", "webp"]


@dataclass(frozen=True)
class Card:
    """What clients need to know of the served model.

    Attributes:
        name: its name in the registry.
        version: its version there.
        image_size: pixels a side.
        styles: what `style` may be.
        loaded: Unix time, seconds.
        tasks: what it can do; "completion" is what edits and variations need.
        notice: that a newer version is not served; empty if all is well.
    """

    name: str
    version: str
    image_size: int
    styles: tuple[str, ...]
    loaded: int
    tasks: frozenset[str] = frozenset({"text_to_image"})
    notice: str = ""

    @property
    def size(self) -> str:
        return f"{self.image_size}x{self.image_size}"


@dataclass(frozen=True)
class Output:
    """How a picture is encoded; quality 0 to 100, of jpeg and webp alone."""

    format: Format = "png"
    quality: int = 100


@dataclass(frozen=True)
class Upload:
    """A picture to go on from, as it was sent: encoded and not yet looked at.

    Attributes:
        image: a square PNG, WebP or JPEG.
        mask: a PNG of the same size, fully transparent where the picture is drawn anew. None: the
            image's own transparency says so, unless `share` is given.
        share: of the picture that is drawn anew, scattered; in (0, 1].
    """

    image: bytes = field(repr=False)
    mask: bytes | None = field(default=None, repr=False)
    share: float | None = None

    @cached_property
    def digest(self) -> bytes:
        """sha256 of all of it, computed once however many pictures go on from it."""
        files = [file and hashlib.sha256(file).digest() for file in (self.image, self.mask)]
        return hashlib.sha256(repr((files, self.share)).encode()).digest()


@dataclass(frozen=True)
class Job:
    """One picture to draw.

    Attributes:
        request: what to draw.
        deadline: Unix time, seconds, after which nobody waits for it.
        output: how to encode it.
        upload: a picture to go on from.
        previews: pictures to show while it is drawn.
        to_follow: jobs of the same request that are sent right after it.
    """

    request: GenerationRequest
    deadline: float
    output: Output = Output()
    upload: Upload | None = None
    previews: int = 0
    to_follow: int = 0


@dataclass(frozen=True)
class Timing:
    """Where a picture's time went, seconds, and how many were drawn with it."""

    queue: float
    model: float
    encode: float
    batch_size: int


@dataclass(frozen=True)
class Preview:
    """A picture as it stands, while it is drawn."""

    index: int
    image: bytes = field(repr=False)
    seed: int = 0


@dataclass(frozen=True)
class Picture:
    """A drawn picture, encoded, and the model that drew it."""

    image: bytes = field(repr=False)
    seed: int
    card: Card
    timing: Timing | None = None
    tokens: TokenCount | None = None


@dataclass(frozen=True)
class Refusal:
    """The picture is not drawn; `param` names the field at fault.

    A value and not an exception: exceptions cross processes as tracebacks.
    """

    message: str
    param: str | None
    code: Literal["invalid_value", "content_policy_violation", "deadline_exceeded"] = (
        "invalid_value"
    )


LATE = Refusal(
    "the picture cannot be drawn in time; try again later, or allow more time",
    param=None,
    code="deadline_exceeded",
)
